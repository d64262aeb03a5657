"""Peak memory and time of a TRL GRPO step with a vocabulary of 49152: one trainer, one process.

    python -m bench.trl_memory stock --json OUT    GRPOTrainer of the installed TRL, of any version
    python -m bench.trl_memory laser --json OUT    LaserGRPOTrainer
    python -m bench.trl_memory kernels --json OUT  GRPOTrainer after use_laser_kernels

Each adds its row to OUT. A Qwen2 of two layers and width 256, 8 completions of 256 tokens after
prompts of 16, given instead of generated; float32. A step is the forward, the backward and AdamW,
the first of four is left out of the time. The peak is that of the resident memory, above what it
was before training: weights and data are left out, gradients and AdamW's state are in.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from bench.markdown import page
from bench.provenance import header, save
from laser_fast.sandbox.task import EOS_TOKEN, PAD_TOKEN, make_tokenizer

VOCAB, WIDTH, LENGTH, PROMPT, COMPLETIONS, STEPS = 49152, 256, 256, 16, 8, 4


def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions of one length, which end by EOS."""
    rng = torch.Generator().manual_seed(0)
    shape = (len(prompts), PROMPT + LENGTH)
    ids = torch.randint(40, VOCAB, shape, generator=rng)
    ids[:, -1] = trainer.processing_class.eos_token_id
    return {
        "prompt_ids": ids[:, :PROMPT].tolist(),
        "completion_ids": ids[:, PROMPT:].tolist(),
        "logprobs": [[0.0] * LENGTH for _ in prompts],
    }


def reward(completions: list[str], **_: Any) -> list[float]:
    """Half of them are right."""
    return [float(index % 2) for index in range(len(completions))]


class Clock(TrainerCallback):
    """CPU seconds at the end of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.ends.append(time.process_time())


def resident(kind: str) -> int:
    """Resident memory now ("VmRSS") or at its peak ("VmHWM"), in bytes."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def measure(kind: str, folder: str, num_steps: int) -> dict[str, Any]:
    """Train some steps; the row of the table."""
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(), eos_token=EOS_TOKEN, pad_token=PAD_TOKEN
    )
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    options: dict[str, Any] = {}
    trainer_type, config_type = trl.GRPOTrainer, trl.GRPOConfig
    if kind != "stock":
        from laser_fast.integrations.trl import LaserConfig, LaserGRPOTrainer, use_laser_kernels
    if kind == "laser":
        trainer_type, config_type = LaserGRPOTrainer, LaserConfig
        options = {"score_token": "<|reserved_0|>", "score_beta": 0.2}
    clock = Clock()
    trainer = trainer_type(
        model=Qwen2ForCausalLM(config),
        reward_funcs=reward,
        args=config_type(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            max_steps=num_steps,
            num_generations=COMPLETIONS,
            per_device_train_batch_size=COMPLETIONS,
            max_completion_length=LENGTH,
            **options,
        ),
        train_dataset=Dataset.from_list([{"prompt": "1+2="}] * num_steps),
        processing_class=tokenizer,
        rollout_func=rollout,
        callbacks=[clock],
    )
    if kind == "kernels":
        use_laser_kernels(trainer)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is now
    trainer.train()
    steps = [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)]
    return {
        "trainer": kind,
        "trl": trl.__version__,
        "peak_mib": (resident("VmHWM") - before) / 2**20,
        "cpu_s": statistics.median(steps),
    }


def main() -> None:
    """Measure one trainer and add its row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trainer", choices=["stock", "laser", "kernels"])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="two steps, to see that it runs")
    args = parser.parse_args()
    rows = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        rows.append(measure(args.trainer, folder, 2 if args.smoke else STEPS))
    facts = {"op": "trl_memory"} | header(torch.device("cpu"))
    cells = [
        [row["trainer"], row["trl"], f"{row['peak_mib']:.0f}", f"{row['cpu_s']:.1f}"]
        for row in rows
    ]
    text = page(facts, ["trainer", "TRL", "peak MiB above the start", "CPU s of a step"], cells)
    save(args.json, facts, rows, text)
    print(text)


if __name__ == "__main__":
    main()
