"""A weight split over ranks gives what the whole weight gives; gloo, on the CPU.

As a script it is the ranks, with the rows of their shards as arguments. They leave by `os._exit`:
whatever holds a DTensor's mesh holds gloo's threads as well, and a thread that still wants the
interpreter aborts one that is ending.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DeviceMesh, DTensor, Replicate

from laser_kernels import linear_logprob, linear_logprob_entropy, linear_logprob_loss

N, D = 12, 16


def outputs_and_gradients(hidden_states, weight, labels, g, temperature, **how):
    h, w = hidden_states.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs, entropy = linear_logprob_entropy(h, w, labels, temperature=temperature, **how)
    grads = torch.autograd.grad([logprobs, entropy], [h, w], [g, g.flip(0)])
    h, w = hidden_states.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_logprob_loss(
        h,
        w,
        labels,
        lambda x, rows: (g[rows] * (x + x.exp())).sum(),
        temperature=temperature,
        **how,
    )
    return logprobs, entropy, *grads, loss, *torch.autograd.grad(loss, [h, w])


def relative_error(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm()).item()


def compare_shards_with_whole(impl, dtype, sizes, rank, group, N=N):
    V, start = sum(sizes), sum(sizes[:rank])
    hidden_states, weight = (torch.randn(n, D).to(dtype) for n in (N, V))
    labels, g, temperature = torch.randint(V, (N,)), torch.randn(N), torch.rand(N) + 0.5
    # One shard holds next to nothing of rows 0 and 1; the target of row 0 lies in it.
    hidden_states[:2] = 4 * weight[V // 2 + 3]
    labels[:3] = torch.tensor([1, V // 2 + 3, V - 1])
    shard = slice(start, start + sizes[rank])

    doubles = (hidden_states.double(), weight.double())
    exact = outputs_and_gradients(*doubles, labels, g.double(), temperature, impl="reference")
    rows = (hidden_states, weight[shard], labels, g, temperature)
    how = dict(impl=impl, process_group=group)
    split = outputs_and_gradients(*rows, **how)
    # In float32, a logsumexp that is rounded at the logits of rows 0 and 1 costs 5e-6 and more.
    tolerance = 2e-6 if dtype == torch.float32 else 1.5e-3
    for i, (actual, expected) in enumerate(zip(split, exact, strict=True)):
        if i in (3, 6):  # the gradients of the weight
            assert relative_error(actual, expected[shard]) <= tolerance
            continue
        assert relative_error(actual, expected) <= tolerance, i
        every_rank = [torch.empty_like(actual.detach()) for _ in sizes]
        dist.all_gather(every_rank, actual.detach())
        assert all(torch.equal(every_rank[0], other) for other in every_rank)

    parts = outputs_and_gradients(*rows, **how, reduce_hidden_grad=False)
    for i, (part, whole) in enumerate(zip(parts, split, strict=True)):
        if i not in (2, 5):  # the gradients of the hidden states
            assert torch.equal(part, whole)
            continue
        assert relative_error(part, exact[i]) > 0.1
        dist.all_reduce(part, group=group)
        assert relative_error(part, exact[i]) <= tolerance


def compare_compiled_with_eager(sizes, rank, group):
    hidden_states = torch.randn(N, D, requires_grad=True)
    weight = torch.randn(sizes[rank], D, requires_grad=True)
    labels, g = torch.randint(sum(sizes), (N,)), torch.randn(N)

    def op(h, w):
        return linear_logprob(h, w, labels, process_group=group, reduce_hidden_grad=False)

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    eager, traced = op(hidden_states, weight), compiled(hidden_states, weight)
    assert torch.equal(eager, traced)
    grads = (torch.autograd.grad(x, [hidden_states, weight], g) for x in (eager, traced))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def refuse_bad_shards(sizes, rank, group):
    hidden_states, weight, V = torch.randn(N, D), torch.randn(sizes[rank], D), sum(sizes)
    labels = torch.zeros(N, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"labels: expected values in \[0, {V}\).* got {V}"):
        linear_logprob(hidden_states, weight, labels + V, process_group=group)
    with pytest.raises(ValueError, match=r"labels: .* got -1"):
        linear_logprob(hidden_states, weight, labels - 1, process_group=group)
    with pytest.raises(ValueError, match="impl='reference' expected the whole weight"):
        linear_logprob(hidden_states, weight, labels, impl="reference", process_group=group)
    sharded = DTensor.from_local(weight, DeviceMesh.from_group(group, "cpu"), [Replicate()])
    with pytest.raises(ValueError, match="weight as a plain tensor .* got a DTensor"):
        linear_logprob(hidden_states, sharded, labels)


def run_rank():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    sizes = [int(size) for size in sys.argv[1:]]
    compare_shards_with_whole("chunked", torch.float32, sizes, rank, group)
    # Another head, of which only the last rank could see that its shards have other sizes.
    compare_shards_with_whole("chunked", torch.float32, [*sizes[:-1], 40], rank, group)
    if len(sizes) == 2:
        if os.environ.get("TRITON_INTERPRET") == "1":
            compare_shards_with_whole("triton", torch.float16, sizes, rank, group)
        compare_compiled_with_eager(sizes, rank, group)
        # 256 rows of 50 columns would fit, but only 128 of 51; each chunk has a collective.
        os.environ["LASER_KERNELS_WORKSPACE_MB"] = "0.0516"
        torch.manual_seed(1)  # the ranks have drawn shards of their own size
        compare_shards_with_whole("chunked", torch.float32, sizes, rank, group, N=300)
    refuse_bad_shards(sizes, rank, group)
    dist.barrier()
    dist.destroy_process_group()
    print(f"rank {rank} is done\n", end="", flush=True)  # one write, which no other rank can split


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(51, 50), (127, 127, 127, 126)], ids=str)
def test_shards_give_what_the_whole_weight_gives(sizes):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, *map(str, sizes)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert sorted(run.stdout.splitlines()) == [f"rank {i} is done" for i in range(len(sizes))]


if __name__ == "__main__":
    from fork_ranks import run_ranks

    run_ranks(len(sys.argv) - 1, run_rank)
