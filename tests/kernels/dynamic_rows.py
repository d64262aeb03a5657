"""Count the graphs of a compiled op over 13 numbers of rows; each result must equal the eager one.

`python dynamic_rows.py loss` prints the count. A script of its own, because what torch.compile
learnt about a size in the same process changes what it traces next.
"""

import sys

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from laser_kernels import linear_logprob, linear_logprob_loss

SIZES = (17, 40, 50, 33, 256, 700, 130, 128, 129, 5, 64, 90, 300)


def loss(h, w, labels, advantages):
    def loss_fn(logprobs, rows):
        return (advantages[rows] * logprobs.exp()).sum()

    return linear_logprob_loss(h, w, labels, loss_fn, temperature=0.7, impl="chunked")


def selected(h, w, labels, advantages):
    (rows,) = torch.nonzero(advantages > 0, as_tuple=True)
    return loss(h[rows], w, labels[rows], advantages[rows])


def constant(h, w, labels, advantages):  # a loss_fn whose closure holds no tensor
    return linear_logprob_loss(h, w, labels, lambda logprobs, rows: -logprobs.sum(), impl="chunked")


def logprob(h, w, labels, advantages):
    return (linear_logprob(h, w, labels, temperature=0.7, impl="chunked") * advantages).sum()


def main(function):
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    torch.manual_seed(0)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    w = torch.randn(97, 16, requires_grad=True)
    for num_rows in SIZES:
        h = torch.randn(num_rows, 16, requires_grad=True)
        labels, advantages = torch.randint(97, (num_rows,)), torch.randn(num_rows)
        eager, traced = (f(h, w, labels, advantages) for f in (function, compiled))
        torch.testing.assert_close(traced, eager)
        grads = (torch.autograd.grad(result, (h, w)) for result in (eager, traced))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(b, a)
    print(counter.frame_count)


if __name__ == "__main__":
    main({f.__name__: f for f in (loss, selected, constant, logprob)}[sys.argv[1]])
