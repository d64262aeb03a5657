"""The sandbox task with TRL's trainer and data, stock and with LaSeR, and what 400 held-out say.

    python -m bench.trl_sandbox --json OUT            120 steps of 256 completions each
    python -m bench.trl_sandbox --smoke --json OUT    one step

Both start from the sandbox model of one seed, which a short supervised phase makes first. The
held-out problems get one completion each, sampled at temperature 1.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from bench.markdown import page
from bench.provenance import header, save
from laser_fast.integrations.trl import LaserConfig, LaserGRPOTrainer
from laser_fast.rewards.boxed import sandbox
from laser_fast.sandbox.model import STEPS, make_sandbox_model
from laser_fast.sandbox.task import rows

# Those of configs/quickstart.toml that TRL has, with its own schedule and clipping.
COMMON = {
    "use_cpu": not torch.cuda.is_available(),
    "bf16": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "max_completion_length": 48,
    "num_generations": 8,
    "num_generations_eval": 1,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 100,
    "gradient_accumulation_steps": 4,
    "learning_rate": 1.5e-4,
    "adam_beta2": 0.99,
    "warmup_steps": 10,
}
SCORE = {
    "score_token": "<|reserved_0|>",
    "score_beta": 0.15,
    "score_loss_coef": 1.0,
    "score_advantage_warmup_steps": 20,
}
METRICS = {
    "accuracy": "eval_reward",
    "F1": "eval_score/f1",
    "AUROC": "eval_score/auroc",
    "mean score of correct": "eval_score/mean_correct",
    "of incorrect": "eval_score/mean_incorrect",
}


def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """The sandbox's verifier."""
    return [sandbox(text, right) for text, right in zip(completions, answer, strict=True)]


def run(
    name: str, model: str, folder: str, seed: int, steps: int, score: dict[str, Any]
) -> dict[str, Any]:
    """Train one of the two and evaluate it before and after; a row of the table for each."""
    trainer_type, config, own = GRPOTrainer, GRPOConfig, {}
    if name == "LaSeR":
        trainer_type, config, own = LaserGRPOTrainer, LaserConfig, score
    data = {
        split: Dataset.from_list(
            [{"prompt": row["problem"], "answer": row["answer"]} for row in rows(split, seed=seed)]
        )
        for split in ("train", "eval")
    }
    trainer = trainer_type(
        model=model,
        reward_funcs=reward,
        args=config(output_dir=folder, seed=seed, max_steps=steps, **COMMON | own),
        train_dataset=data["train"],
        eval_dataset=data["eval"],
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    before = trainer.evaluate()
    start, start_cpu = time.perf_counter(), time.process_time()
    trainer.train()
    seconds = {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - start_cpu}
    after = trainer.evaluate()
    steps = [step for step in trainer.state.log_history if "loss" in step]
    found = {"before": before, "after": after}
    evaluations = {
        when: {label: values.get(key) for label, key in METRICS.items()}
        for when, values in found.items()
    }
    return {"trainer": name, **seconds, "evaluations": evaluations, "steps": steps}


def main() -> None:
    """Run both and print, or save, the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="result file; a .md is written beside it")
    parser.add_argument("--smoke", action="store_true", help="one step, to see that it runs")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="the sandbox model of this seed, if it is there")
    args = parser.parse_args()
    steps = 1 if args.smoke else args.steps
    # After two steps of warm-up the token is not yet improbable.
    score = SCORE | {"score_beta": 5.0} if args.smoke else SCORE
    facts = {"op": "trl_sandbox"} | header(torch.device("cpu"))
    facts |= {"seed": str(args.seed), "steps": str(steps)}
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or Path(folder, "model")
        if args.model is None:
            make_sandbox_model(model, seed=args.seed, steps=2 if args.smoke else STEPS)
        results: list[dict[str, Any]] = []
        for name in ("LaSeR", "stock"):
            results.append(run(name, str(model), folder, args.seed, steps, score))
            text = document(facts, results)
            if args.json:
                save(args.json, facts, results, text)
    print(text)


def document(facts: dict[str, str], results: list[dict[str, Any]]) -> str:
    """Header and table as Markdown."""
    cells = [
        [f"{row['trainer']}, {when}", *(_number(value) for value in values.values())]
        + [f"{row['cpu_s']:.0f}" if when == "after" else "-"]
        for row in results
        for when, values in row["evaluations"].items()
    ]
    return page(facts, ["400 held-out problems", *METRICS, "CPU s of training"], cells)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
