"""The snippets of the integrations' page; run by itself, those that need two ranks.

    python snippets.py

prints the largest relative error of a gradient against one process: "fsdp2 1e-7".
"""

from pathlib import Path

import torch
import torch.distributed as dist
from page_code import code_blocks

PAGE = Path(__file__).parents[2] / "laser_fast" / "integrations" / "README.md"


def snippet(heading, index=0):
    """What the block of Python below a heading defines."""
    namespace = {"torch": torch}
    exec(code_blocks(PAGE, heading)[index], namespace)
    return namespace


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def check():
    """On each of two ranks."""
    from tiny_models import make_model
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    ids = torch.randint(6, 97, (4, 9))
    labels = ids.masked_fill(torch.arange(9) < 3, -100)
    sft_loss = snippet("SFT")["sft_loss"]
    whole = make_model()  # tied
    sft_loss(whole, ids, labels).backward()
    expected = {name: p.grad for name, p in whole.named_parameters()}

    model = make_model()
    root = snippet("FSDP2")["shard"](model, sft_loss)
    mine = slice(2 * rank, 2 * rank + 2)
    root(ids[mine], labels[mine]).backward()
    grads = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    errors = {"fsdp2": max(error(grads[name], expected[name]) for name in expected)}

    mesh = init_device_mesh("cpu", (2,))
    tensor_parallel = snippet("Tensor parallel")
    heads = [make_model(tie_word_embeddings=False) for _ in range(2)]
    hidden = [torch.randn(12, 32, requires_grad=True) for _ in range(2)]
    hidden[1].data = hidden[0].data
    targets, upstream = torch.randint(97, (12,)), torch.randn(12)
    tensor_parallel["split_head"](heads[0], mesh)
    found = tensor_parallel["parallel_logprobs"](heads[0], hidden[0], targets, mesh)
    logits = hidden[1] @ heads[1].lm_head.weight.t()
    plain = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    for logprobs in (found, plain):
        (logprobs * upstream).sum().backward()
    errors["tensor_parallel"] = max(
        error(found, plain),
        error(hidden[0].grad, hidden[1].grad),
        error(heads[0].lm_head.weight.grad.full_tensor(), heads[1].lm_head.weight.grad),
    )
    if rank == 0:
        for name, value in errors.items():
            print(name, value)
    dist.destroy_process_group()


if __name__ == "__main__":
    from fork_ranks import run_ranks

    run_ranks(2, check)
