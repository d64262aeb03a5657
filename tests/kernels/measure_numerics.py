"""Print the numerics table of kernels/README.md: errors against float64 of bf16 inputs, on a CPU.

`python tests/kernels/measure_numerics.py` takes about two minutes. What a GPU does and this CPU
does not is emulated: the accumulators that a tensor core cuts toward zero, in the forward, and the
kept int16 logits and the bfloat16 dlogits.
"""

import sys
from pathlib import Path

import torch

from laser_kernels import linear_logprob, linear_logprob_loss, reference

sys.path.append(str(Path(__file__).parents[1] / "helpers"))
from tensor_core import truncating_mm  # noqa: E402 (one model of a tensor core for all tests)

N, V, D = 64, 32768, 3584


def make_head(spread):
    """Logits of that standard deviation; every other row is half certain, as in test_gpu.py."""
    torch.manual_seed(0)
    weight = torch.randn(V, D) / D**0.5
    labels = torch.randint(V, (N,))
    hidden_states = spread * torch.randn(N, D)
    lead = (hidden_states @ weight.T).logsumexp(1).mean() - 4 + 8 * torch.rand(N, 1)
    hidden_states[::2] += lead[::2] * weight[labels[::2]]
    return hidden_states.bfloat16(), weight.bfloat16(), labels


def gradients_from(dlogits, hidden_states, weight):
    """Return dH, dW as the GEMMs would, each rounded to bfloat16."""
    d = dlogits.bfloat16().double()
    return (d @ weight.double()).bfloat16(), (d.T @ hidden_states.double()).bfloat16()


def rows_of_table(head, g):
    """Yield name, log-probs, dH, dW; the last three may be None."""
    h, w, labels = head
    rows = torch.arange(N)

    def dlogits(logprobs):
        d = -logprobs.exp() * g[:, None]
        d[rows, labels] += g
        return d

    logprobs = torch.log_softmax((h @ w.T).float(), 1)
    yield "bf16 logits", logprobs[rows, labels], *gradients_from(dlogits(logprobs), h, w)

    logits = truncating_mm(h, w.T)
    logprobs = torch.log_softmax(logits.double(), 1)
    grads = gradients_from(dlogits(logprobs), h, w)
    yield "float32-output GEMM, exact softmax, bf16 dlogits", logprobs[rows, labels], *grads

    # E = bf16(exp(z - z_y)) goes into the GEMMs; its row factor v = g / S goes into H.
    shifted = logits - logits[rows, labels][:, None]
    total = shifted.exp().sum(1)
    e = shifted.exp()
    e[rows, labels] = 1 - total
    e, v = e.bfloat16().double(), -g / total
    scaled = (v[:, None] * h.float()).bfloat16().double()
    grad_hidden = (v[:, None].double() * (e @ w.double())).bfloat16()
    yield "bf16 E, factor in H", -total.log(), grad_hidden, (e.T @ scaled).bfloat16()

    hg, wg = h.clone().requires_grad_(), w.clone().requires_grad_()
    loss = linear_logprob_loss(hg, wg, labels, lambda x, i: (g[i] * x).sum(), impl="chunked")
    grads = torch.autograd.grad(loss, (hg, wg))
    yield "laser_kernels, CPU", linear_logprob(h, w, labels, impl="chunked"), *grads

    # Where the sum overflows, the largest logit is the anchor in place of the target's.
    x = shifted * 1.4426950408889634
    x -= torch.where(total > 2**60, x.amax(1), 0.0)[:, None]
    log_total = x.exp2().sum(1).log2()[:, None]
    kept = (x * 512).round().clamp(-(2**15), 2**15 - 1) / 512
    d = dlogits((kept - log_total) * 0.6931471805599453)
    logprobs = (x[rows, labels] - log_total[:, 0]) * 0.6931471805599453
    d[rows, labels] = g * (1 - logprobs.exp())
    yield "laser_kernels, Triton", logprobs, *gradients_from(d, h, w)


def main():
    print(f"| N={N}, V={V}, D={D} | largest logit | max error of logprob | of dH | of dW |")
    print("|---|---|---|---|---|")
    for spread in (2, 7):
        h, w, labels = head = make_head(spread)
        largest = round((h.float() @ w.float().T).abs().max().item())
        g = torch.randn(N)
        hd, wd = h.double().requires_grad_(), w.double().requires_grad_()
        exact = reference.linear_logprob(hd, wd, labels)
        exact_grads = torch.autograd.grad(exact, (hd, wd), g.double())
        for name, logprobs, *grads in rows_of_table(head, g):
            error = (logprobs - exact).abs().max().item()
            relative = [
                ((a.double() - e).norm() / e.norm()).item()
                for a, e in zip(grads, exact_grads, strict=True)
            ]
            print(f"| {name} | {largest} | {error:.1e} | {relative[0]:.2e} | {relative[1]:.2e} |")


if __name__ == "__main__":
    main()
