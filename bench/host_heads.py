"""Log-probs, gradients, time and memory of the heads of other trainers, with and without our op.

    python -m bench.host_heads verl host --json OUT         verl's own fused head "torch"
    python -m bench.host_heads verl kernels --json OUT      the same call after our import
    python -m bench.host_heads prime-rl kernels --source DIR --json OUT
    python -m bench.host_heads torchtitan kernels --json OUT

One head and one process each, which adds its row to OUT; --dtype bfloat16 for 16-bit inputs. 1024
rows of width 256, a vocabulary of 32768. verl: the forward of a patched model. prime-rl: its head's
module, from a checkout, without the rest of its package. torchtitan: its wrapper around the GRPO
loss, 8 chunks. The errors are those against float64 on the same inputs, of log-probs and entropies
the largest, of gradients the relative norm. The time is the best of three passes; the peak of
resident memory, above what was held before it, that of the second.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import types
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import peak_extra_bytes
from bench.markdown import page
from bench.provenance import header, save

SIZES = {"rows": 1024, "width": 256, "vocabulary": 32768}
SMOKE = {"rows": 64, "width": 16, "vocabulary": 97}
TEMPERATURE = 0.7
Found = tuple[Tensor, Tensor, Tensor]  # log-probs [N], entropies [N], the loss


class Inputs:
    """One head, its rows, and the upstream gradient or what makes it."""

    def __init__(self, sizes: dict[str, int], dtype: torch.dtype) -> None:
        rng = torch.Generator().manual_seed(0)
        rows, width, vocabulary = sizes.values()
        self.hidden = torch.randn(rows, width, generator=rng).to(dtype)
        self.weight = (0.2 * torch.randn(vocabulary, width, generator=rng)).to(dtype)
        # Half of the labels are likely.
        likely = (self.hidden @ self.weight.t()).argmax(1)
        other = torch.randint(vocabulary, (rows,), generator=rng)
        self.labels = torch.where(torch.arange(rows) % 2 == 0, likely, other)
        self.advantages = torch.randn(rows, generator=rng)
        self.head = torch.nn.Linear(width, vocabulary, bias=False, dtype=dtype)
        self.head.weight.data = self.weight


def reference(inputs: Inputs, temperature: float) -> tuple[Tensor, ...]:
    """Log-probs, entropies, dH and dW of sum A logprob / N in float64, a few rows at a time."""
    weight, parts = inputs.weight.double(), []
    grad_weight = torch.zeros_like(weight)
    for rows in torch.arange(len(inputs.labels)).split(256):
        hidden, labels = inputs.hidden[rows].double(), inputs.labels[rows]
        table = (hidden @ weight.t() / temperature).log_softmax(1)
        p = table.exp()
        upstream = inputs.advantages[rows].double()[:, None] / len(inputs.labels) / temperature
        dlogits = -upstream * p
        dlogits.scatter_add_(1, labels[:, None], upstream)
        entropy = -(p * table).sum(1)
        parts.append((table.gather(1, labels[:, None])[:, 0], entropy, dlogits @ weight))
        grad_weight += dlogits.t() @ hidden
    logprobs, entropy, grad_hidden = (torch.cat(part) for part in zip(*parts, strict=True))
    return logprobs, entropy, grad_hidden, grad_weight


def weighted(inputs: Inputs, logprobs: Tensor) -> Tensor:
    """The loss whose gradients `reference` has."""
    return (inputs.advantages * logprobs.flatten()).sum() / len(inputs.labels)


def verl(inputs: Inputs, kind: str, source: Path | None) -> Callable[[Tensor], Found]:
    """The forward that verl gives a patched text model, with a backbone that returns its input."""
    if kind == "kernels":
        importlib.import_module("laser_fast.integrations.verl")
    from verl.models.transformers import monkey_patch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = inputs.head
            self.config = types.SimpleNamespace(
                model_type="qwen2", output_attentions=False, output_hidden_states=False
            )
            self.config.get_text_config = lambda: self.config

        def get_output_embeddings(self) -> torch.nn.Linear:
            return self.lm_head

        def model(self, input_ids: Tensor, **_: Any) -> Any:
            from transformers.modeling_outputs import BaseModelOutputWithPast

            return BaseModelOutputWithPast(last_hidden_state=input_ids)

    model = Model()
    options = {"use_fused_kernels": True, "fused_kernels_backend": "torch"}
    monkey_patch.patch_forward_with_backends(model, **options)

    def call(hidden: Tensor) -> Found:
        out = model(
            input_ids=hidden[None],
            shift_labels=inputs.labels[None],
            temperature=TEMPERATURE,
            return_dict=True,
        )
        return out.log_probs[0], out.entropy[0], weighted(inputs, out.log_probs)

    return call


def prime_rl(inputs: Inputs, kind: str, source: Path | None) -> Callable[[Tensor], Found]:
    """The module that prime-rl puts in the place of the head, chunks of 1024 tokens."""
    assert source is not None, "--source"
    sys.path.insert(0, str(source / "src"))
    for name in ("prime_rl.trainer", "prime_rl.trainer.models"):  # their __init__ needs a GPU's
        package = types.ModuleType(name)
        package.__path__ = [str(source / "src" / name.replace(".", "/"))]
        sys.modules[name] = package
    from prime_rl.trainer.models.layers import lm_head

    if kind == "kernels":
        importlib.import_module("laser_fast.integrations.prime_rl")
    head = lm_head.FusedOutputLinear(*reversed(inputs.weight.shape), chunk_size=1024)
    head.weight = inputs.head.weight
    temperature = torch.full((1, len(inputs.labels)), TEMPERATURE)

    def call(hidden: Tensor) -> Found:
        out = head(hidden[None], inputs.labels[None], temperature=temperature)
        return out["logprobs"][0], out["entropy"][0], weighted(inputs, out["logprobs"])

    return call


def torchtitan(inputs: Inputs, kind: str, source: Path | None) -> Callable[[Tensor], Found]:
    """The wrapper that torchtitan's RL trainer calls, where every ratio is 1."""
    if source is not None:
        sys.path.insert(0, str(source))
    from torchtitan.components.loss import ChunkedLossWrapper
    from torchtitan.experiments.rl.losses import GRPOLoss, dapo

    wrapper_type, options = ChunkedLossWrapper, {"num_chunks": 8}
    if kind == "kernels":
        from laser_fast.integrations.torchtitan import LaserLossWrapper

        wrapper_type, options = LaserLossWrapper, {}
    found, compute = [], dapo.compute_logprobs

    def recorded(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        logprobs, entropy = compute(*args, **kwargs)
        # A ratio of 1 has the gradient A: the log-probs of the sampling policy are these.
        found.append((logprobs, entropy))
        return logprobs, entropy

    dapo.compute_logprobs = recorded
    wrapper = wrapper_type(wrapper_type.Config(loss_fn=GRPOLoss.Config(), **options))
    wrapper.set_lm_head(inputs.head)
    # 0.3 has tokens as [B, S], later commits as [T].
    lead = (slice(None),) if source else (None,)
    old = reference(inputs, 1.0)[0].float()

    def call(hidden: Tensor) -> Found:
        found.clear()
        loss, _ = wrapper(
            hidden[lead],
            inputs.labels[lead],
            len(inputs.labels),
            generator_logprobs=old[lead],
            advantages=-inputs.advantages[lead],
            loss_mask=torch.ones_like(inputs.labels, dtype=torch.bool)[lead],
        )
        logprobs, entropy = (
            torch.cat([x.flatten() for x in xs]) for xs in zip(*found, strict=True)
        )
        return logprobs, entropy, loss

    return call


HOSTS = {"verl": (verl, TEMPERATURE), "prime-rl": (prime_rl, TEMPERATURE)}
HOSTS |= {"torchtitan": (torchtitan, 1.0)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run one head; the row of the table."""
    inputs = Inputs(SMOKE if args.smoke else SIZES, getattr(torch, args.dtype))
    make, temperature = HOSTS[args.host]
    call = make(inputs, args.kind, args.source)
    hidden = inputs.hidden.requires_grad_()
    result: list[Found] = []

    def step() -> None:
        hidden.grad = inputs.head.weight.grad = None
        result[:] = [call(hidden)]
        result[0][2].backward()

    seconds: list[float] = []

    def timed() -> None:
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)

    timed()
    peak = peak_extra_bytes(timed, torch.device("cpu"))
    timed()
    hidden.requires_grad_(False)
    logprobs, entropy, grad_hidden, grad_weight = reference(inputs, temperature)
    found = (hidden.grad, inputs.head.weight.grad)
    errors = {
        "logprob": (result[0][0].double() - logprobs).abs().max().item(),
        "entropy": (result[0][1].double() - entropy).abs().max().item(),
    }
    for name, grad, expected in zip(("dH", "dW"), found, (grad_hidden, grad_weight), strict=True):
        errors[name] = ((grad.double() - expected).norm() / expected.norm()).item()
    named = args.commit or version(args.host)
    return {
        "host": f"{args.host} {named}",
        "head": args.kind,
        "dtype": args.dtype,
        "errors": errors,
        "cpu_s": min(seconds),
        "peak_mib": None if peak is None else peak / 2**20,
    }


def main() -> None:
    """Measure one head and add its row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("host", choices=HOSTS)
    parser.add_argument("kind", choices=["host", "kernels"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--source", type=Path, help="checkout of prime-rl, or of torchtitan for tokens as [T]"
    )
    parser.add_argument("--commit", help="of the checkout")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="a few rows, to see that it runs")
    args = parser.parse_args()
    rows = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
    rows.append(measure(args))
    facts = {"op": "host_heads"} | header(torch.device("cpu"))
    columns = ["host", "head", "inputs", "log-prob", "entropy", "dH", "dW", "CPU s", "peak MiB"]
    cells = [
        [row["host"], row["head"], row["dtype"], *(f"{e:.1e}" for e in row["errors"].values())]
        + [f"{row['cpu_s']:.1f}", "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"]
        for row in rows
    ]
    text = page(facts, columns, cells)
    save(args.json, facts, rows, text)
    print(text)


if __name__ == "__main__":
    main()
