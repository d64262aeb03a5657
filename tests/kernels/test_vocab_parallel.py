"""A weight split over two ranks gives what the whole weight gives; gloo, on the CPU.

As a script it is the two ranks. They leave by `os._exit`: whatever holds a DTensor's mesh holds
gloo's threads as well, and a thread that still wants the interpreter aborts one that is ending.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DeviceMesh, DTensor, Replicate

from laser_kernels import linear_logprob, linear_logprob_entropy, linear_logprob_loss

WORLD = 2
N, D, V = 12, 16, 50


def outputs_and_gradients(hidden_states, weight, labels, g, temperature, **how):
    h, w = hidden_states.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs, entropy = linear_logprob_entropy(h, w, labels, temperature=temperature, **how)
    grads = torch.autograd.grad([logprobs, entropy], [h, w], [g, g.flip(0)])
    h, w = hidden_states.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_logprob_loss(
        h, w, labels, lambda x, rows: (g[rows] * x.exp()).sum(), temperature=temperature, **how
    )
    return logprobs, entropy, *grads, loss, *torch.autograd.grad(loss, [h, w])


def compare_shards_with_whole(impl, dtype, rank, group):
    hidden_states, weight = (torch.randn(n, D).to(dtype) for n in (N, V))
    labels, g, temperature = torch.randint(V, (N,)), torch.randn(N), torch.rand(N) + 0.5
    # One shard holds next to nothing of rows 0 and 1; the target of row 0 lies in it.
    hidden_states[:2] = 4 * weight[V // 2 + 3]
    labels[:2] = torch.tensor([1, V // 2 + 3])
    shard = slice(rank * V // WORLD, (rank + 1) * V // WORLD)

    whole = outputs_and_gradients(hidden_states, weight, labels, g, temperature, impl=impl)
    split = outputs_and_gradients(
        *(hidden_states, weight[shard], labels, g, temperature), impl=impl, process_group=group
    )
    tolerance = dict(rtol=1e-4, atol=2e-5) if dtype == torch.float32 else dict(rtol=1e-2, atol=5e-3)
    for i, (actual, expected) in enumerate(zip(split, whole, strict=True)):
        if i in (3, 6):  # the gradients of the weight
            torch.testing.assert_close(actual, expected[shard], **tolerance)
            continue
        torch.testing.assert_close(actual, expected, **tolerance)
        every_rank = [torch.empty_like(actual.detach()) for _ in range(WORLD)]
        dist.all_gather(every_rank, actual.detach())
        assert torch.equal(*every_rank)


def refuse_bad_shards(rank, group):
    hidden_states, weight = torch.randn(N, D), torch.randn(V // WORLD, D)
    labels = torch.zeros(N, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 50\).* got 50"):
        linear_logprob(hidden_states, weight, labels + V, process_group=group)
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
    compare_shards_with_whole("chunked", torch.float32, rank, group)
    if os.environ.get("TRITON_INTERPRET") == "1":
        compare_shards_with_whole("triton", torch.float16, rank, group)
    refuse_bad_shards(rank, group)
    dist.barrier()
    dist.destroy_process_group()
    print(f"rank {rank} is done", flush=True)


@pytest.mark.slow
def test_shards_give_what_the_whole_weight_gives():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert sorted(run.stdout.splitlines()) == ["rank 0 is done", "rank 1 is done"]


if __name__ == "__main__":
    from fork_ranks import run_ranks

    run_ranks(WORLD, run_rank)
