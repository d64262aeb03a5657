"""A training step of verl's FSDP2 engine on a CPU: its own fused head, ours, and ours with a score.

    python -m bench.verl_head torch --json OUT             verl's fused head "torch"
    python -m bench.verl_head kernels --json OUT           the same after our import
    python -m bench.verl_head score --json OUT             with EosScore, too
    python -m bench.verl_head kernels --untied --json OUT  an embedding that is not the head
    python -m bench.verl_head kernels --padded --json OUT  use_remove_padding=False

One head and one process each, which adds its row to OUT. A Qwen2 of two layers and width 256,
vocabulary 32768, 8 sequences of 112 to 128 tokens, float32, temperature 0.7; the engine's own
forward_backward_batch, with a loss that weighs log-probs and entropies of the answers. The errors
are those against the model in float64: of log-probs, entropies and scores the largest, of gradients
the largest relative norm of a parameter. The time is the better of two steps; the peak of resident
memory, above what was held before it, that of the second.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.plugin.platform import platform_manager
from verl.plugin.platform.platform_cuda import PlatformCUDA

from bench.harness import peak_extra_bytes
from bench.markdown import page
from bench.provenance import header, save

SIZES = {"vocab_size": 32768, "hidden_size": 256, "intermediate_size": 512}
SMOKE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48}
LENGTHS = [128, 112, 120, 128, 116, 128, 124, 128]
PROMPT, TEMPERATURE, EOS, SCORE = 16, 0.7, 2, 5


class Cpu(PlatformCUDA):
    """verl knows no CPU: what its FSDP engine asks of a platform."""

    device_name = "cpu"
    device_module = torch.cpu

    def current_device(self) -> torch.device:
        """The only one."""
        return torch.device("cpu")

    def empty_cache(self) -> None:
        """There is none."""


def sequences() -> list[Tensor]:
    """Token ids; every other sequence ends by an EOS."""
    rng = torch.Generator().manual_seed(0)
    rows = [torch.randint(6, 97, (length,), generator=rng) for length in LENGTHS]
    for row in rows[::2]:
        row[-1] = EOS
    return rows


def weights(rows: list[Tensor]) -> list[Tensor]:
    """Of the log-probs that verl's losses use: the tokens after the prompt, the last one's not."""
    weights = [torch.linspace(-1, 1, len(row)) / 100 for row in rows]
    for weight in weights:
        weight[: PROMPT - 1] = weight[-1] = 0
    return weights


def reference(model: torch.nn.Module, rows: list[Tensor]) -> dict[str, Any]:
    """Log-probs, entropies, scores and gradients in float64, one sequence at a time."""
    model = copy.deepcopy(model).double()
    found: dict[str, Any] = {"logprob": [], "entropy": [], "score": []}
    for row, weight in zip(rows, weights(rows), strict=True):
        logits = model.lm_head(
            model.model(row[None]).last_hidden_state[0]
        )  # verl patches the class
        table = (logits / TEMPERATURE).log_softmax(1)
        logprobs = table.gather(1, row.roll(-1)[:, None])[:, 0]
        entropy = -(table.exp() * table).sum(1)
        (weight * (logprobs + 0.1 * entropy)).sum().backward()
        found["score"].append(logits[-1].log_softmax(0)[SCORE].detach())
        for name, values in (("logprob", logprobs), ("entropy", entropy)):
            found[name].append(values.detach()[PROMPT - 1 : -1])
    found = {name: torch.cat([x.flatten() for x in values]) for name, values in found.items()}
    return found | {"grads": {name: p.grad for name, p in model.named_parameters()}}


def make_engine(folder: str, *, is_packed: bool) -> Any:
    """The engine of a worker, in a process group of one."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    model = HFModelConfig(
        path=folder,
        load_tokenizer=False,
        use_remove_padding=is_packed,
        use_fused_kernels=True,
        fused_kernel_options={"impl_backend": "torch"},
        override_config={"attn_implementation": "sdpa"},
        enable_gradient_checkpointing=False,
    )
    engine = FSDPEngineConfig(
        strategy="fsdp2",
        mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        use_torch_compile=False,
    )
    optimizer = FSDPOptimizerConfig(lr=1e-3, total_training_steps=1)
    engine = FSDPEngineWithLMHead(model, engine, optimizer, CheckpointConfig())
    engine.initialize()
    return engine


def make_batch(rows: list[Tensor], *, is_packed: bool) -> TensorDict:
    """What a worker hands to its engine."""
    from verl.utils import tensordict_utils

    def nested(values: list[Tensor]) -> Tensor:
        return torch.nested.as_nested_tensor(values, layout=torch.jagged)

    positions = [torch.arange(len(row)) for row in rows]
    batch = {
        "input_ids": nested(rows),
        "position_ids": nested(positions),
        "loss_mask": nested([(position >= PROMPT).long() for position in positions]),
    }
    batch = TensorDict(batch, batch_size=[len(rows)])
    tensordict_utils.assign_non_tensor(
        batch,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=len(rows),
        use_fused_kernels=True,
        use_remove_padding=is_packed,
        temperature=TEMPERATURE,
        calculate_entropy=True,
        pad_token_id=0,
    )
    return batch


def measure(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Two steps; the row of the table."""
    score = None
    if args.head != "torch":
        from laser_fast.integrations.verl import EosScore

        score = EosScore(token_id=SCORE, eos_token_ids=(EOS,))
    if args.head == "score":
        score.install()
    sizes = SMOKE if args.smoke else SIZES
    torch.manual_seed(0)
    config = Qwen2Config(
        **sizes,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=not args.untied,
        initializer_range=0.1,
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    rows = sequences()
    engine = make_engine(folder, is_packed=not args.padded)
    upstream, found, seconds = torch.cat(weights(rows)), {}, []

    def loss_fn(model_output: Any, data: TensorDict, dp_group: Any = None) -> tuple[Tensor, dict]:
        logprobs, entropy = (model_output[key].values() for key in ("log_probs", "entropy"))
        is_used = upstream != 0
        found.update(logprob=logprobs.detach()[is_used], entropy=entropy.detach()[is_used])
        if args.head == "score":
            scores, is_finished = score.logprobs(model_output, data)
            found.update(score=scores.detach()[is_finished])
        return (upstream * (logprobs + 0.1 * entropy)).sum(), {}

    def step() -> None:
        start = time.process_time()
        engine.optimizer_zero_grad()
        engine.forward_backward_batch(make_batch(rows, is_packed=not args.padded), loss_fn)
        seconds.append(time.process_time() - start)

    row = {"head": args.head, "tied": not args.untied, "packed": not args.padded}
    with engine.train_mode():
        try:
            step()
        except RuntimeError as error:
            return row | {"failure": str(error).splitlines()[0]}
        peak = peak_extra_bytes(step, torch.device("cpu"))
        grads = {name: p.grad.full_tensor() for name, p in engine.module.named_parameters()}
    expected = reference(model, rows)
    expected["score"] = expected["score"][::2]
    errors = {
        name: (values.double() - expected[name]).abs().max().item()
        for name, values in found.items()
    }
    errors["gradient"] = max(
        ((grads[name].double() - grad).norm() / grad.norm()).item()
        for name, grad in expected["grads"].items()
    )
    return row | {"errors": errors, "cpu_s": min(seconds), "peak_mib": peak and peak / 2**20}


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    start = [row["head"], "yes" if row["tied"] else "no", "yes" if row["packed"] else "no"]
    if "failure" in row:
        return [*start, row["failure"], *["-"] * 5]
    errors = [row["errors"].get(name) for name in ("logprob", "entropy", "score", "gradient")]
    shown = ["-" if error is None else f"{error:.1e}" for error in errors]
    peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    return [*start, *shown, f"{row['cpu_s']:.1f}", peak]


def main() -> None:
    """Measure one head and add its row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("head", choices=["torch", "kernels", "score"])
    parser.add_argument("--untied", action="store_true")
    parser.add_argument("--padded", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that it runs")
    args = parser.parse_args()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    platform_manager.set_platform(Cpu())
    rows = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        rows.append(measure(args, folder))
    facts = {"op": "verl_head"} | header(torch.device("cpu"))
    columns = ["head", "tied", "packed", "log-prob", "entropy", "score", "gradient", "CPU s"]
    text = page(facts, [*columns, "peak MiB"], [cells(row) for row in rows])
    save(args.json, facts, rows, text)
    print(text)


if __name__ == "__main__":
    main()
