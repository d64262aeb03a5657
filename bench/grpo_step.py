"""One whole GRPO step of TRL's stock trainer and of laser_fast, in turns in one process, on a CPU.

    python -m bench.grpo_step --json OUT                  a random Qwen2, V = 49152
    python -m bench.grpo_step --model FOLDER --json OUT   a real model of that folder
    python -m bench.grpo_step --smoke                     one round of a tiny one
    python -m bench.grpo_step --vllm ...                  both sample with vLLM in process

    rollout    from the prompts to completions: transformers' `generate` there, the engine "hf"
               here; with vLLM both also send their weights to it
    reward     the same function, there in the process, here in a worker
    prepare    advantages and the batch's tensors
    update     log-probs, loss, backward, clipping of the norm and AdamW

Both train a copy of the same model in float32 by plain GRPO on the same prompts, every one in each
step, with one update for all completions at once and neither a reference nor recomputed
activations. Every completion has the same length: no EOS may be drawn (`min_new_tokens` there, a
ban in the engine here; `min_tokens` of both with vLLM, which runs eagerly in float32 for both).
TRL's own `train()` runs, and its callback makes each of our steps after one of its own; the first
round is left out. Seconds are those of the CPU in this process, which with one thread is what a
quiet machine's clock would say; those of the clock stand beside them. The peak is of the resident
memory, above what was held when the step began: weights and AdamW's state are left out, gradients
and activations are in.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback

from bench import runner, word_problems
from bench.provenance import header
from bench.random_qwen2 import SMOKE, Sizes, random_qwen2
from laser_fast.config import Config
from laser_fast.log.jsonl import write_lines
from laser_fast.log.timer import StageTimer
from laser_fast.model.distributed import open_world
from laser_fast.sandbox.task import RESERVED_TOKENS, rows, write_tokenizer
from laser_fast.training import run as training_run

SIZES = Sizes(384, 1024, 8, 6, 2, 49152)
STAGES = ("rollout", "reward", "prepare", "update")
OURS = dict(prompt="rollout", sync="rollout", rollout="rollout", reward="reward")
OURS |= dict(score="prepare", advantage="prepare", pack="prepare", loss="update", step="update")
MAX_MODEL_LEN = 512
TRL, LASER = "TRL", "laser_fast"
CHAT = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def reward(
    completions: list[str], completion_ids: list[list[int]] | None = None, **_: Any
) -> list[float]:
    """Half of them are right, and no skill tells which."""
    sums = [sum(ids) for ids in completion_ids or map(str.encode, completions)]
    return [float(number % 2) for number in sums]


class Stages(StageTimer):
    """The stages of one trainer's steps: seconds of clock and CPU, and the peak of the memory."""

    def __init__(self) -> None:
        super().__init__()
        self.cpu: defaultdict[str, float] = defaultdict(float)
        self.mark, self.steps = 0.0, list[dict[str, Any]]()

    def _charge(self) -> None:
        now = time.process_time()
        if self._stages:
            self.cpu[self._stages[-1]] += now - self.mark
        self.mark = now
        super()._charge()

    def begin(self, stage: str) -> None:
        """Start a step, in a stage that holds what no other one claims."""
        ctypes.CDLL(None).malloc_trim(0)  # else a step reuses pages that are resident already
        self.held = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is now
        self.whole = self.only(stage)
        self.whole.__enter__()

    def end(self, names: dict[str, str], num_tokens: int) -> None:
        """End it and keep what it took, by the common names of the stages."""
        self.whole.__exit__(None, None, None)
        found: dict[str, Any] = {"tokens": num_tokens}
        wall = {name.removeprefix("time/"): seconds for name, seconds in self.pop().items()}
        for kind, seconds in (("wall", wall), ("cpu", dict(self.cpu))):
            found[kind] = dict.fromkeys(STAGES, 0.0)
            for name, value in seconds.items():
                found[kind][names.get(name, name)] += value
        self.cpu.clear()
        self.steps.append(found | {"peak_mib": (resident("VmHWM") - self.held) / 2**20})

    def around(self, owner: Any, method: str, stage: str) -> None:
        """Count a method of a trainer as a stage."""
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.only(stage):
                return inner(*args, **kwargs)

        setattr(owner, method, timed)


def resident(kind: str) -> int:
    """Resident memory now ("VmRSS") or at its peak ("VmHWM"), in bytes."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


class Turns(TrainerCallback):
    """After each of TRL's steps one of ours."""

    def __init__(self, stages: Stages, num_tokens: int, other: Callable[[int], None]) -> None:
        self.stages, self.num_tokens, self.other = stages, num_tokens, other

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """TRL fetches, generates and trains from here on."""
        self.stages.begin("update")

    def on_step_end(self, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
        """Let the other one make its step."""
        self.stages.end({}, self.num_tokens)
        self.other(state.global_step - 1)


def trl_trainer(folder: str, data: list[dict], args: argparse.Namespace, rounds: int) -> Any:
    """TRL's trainer with its stages counted, and the counter."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    sampling: dict[str, Any] = {"generation_kwargs": {"min_new_tokens": args.length}}
    if args.vllm:
        from trl.generation import vllm_generation

        # What TRL leaves to vLLM, which would choose bfloat16 for itself alone.
        vllm_generation.LLM = partial(vllm_generation.LLM, dtype="float32", enforce_eager=True)
        vllm_generation.VLLMGeneration.sync_weights = reload_weights
        sampling = {"generation_kwargs": {"min_tokens": args.length}, "use_vllm": True}
        sampling |= {"vllm_mode": "colocate", "vllm_max_model_length": MAX_MODEL_LEN}
    trainer = GRPOTrainer(
        model=folder,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=f"{folder}/trl",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "float32"},
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            max_steps=rounds,
            num_generations=args.group_size,
            per_device_train_batch_size=args.prompts * args.group_size,
            max_completion_length=args.length,
            **sampling,
        ),
        train_dataset=Dataset.from_list([{"prompt": row["problem"]} for row in data]),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.remove_callback(PrinterCallback)
    stages = Stages()
    stages.around(trainer, "_generate_and_score_completions", "prepare")
    stages.around(trainer, "_generate", "rollout")
    stages.around(trainer, "_calculate_rewards", "reward")
    return trainer, stages


def laser_config(folder: str, data: list[dict], args: argparse.Namespace, rounds: int) -> Config:
    """The same training, in our words; all tokens are one microbatch, as there."""
    write_lines(Path(folder, "train.jsonl"), data)
    tokens = args.prompts * args.group_size * (args.length + 1024)
    return Config.parse(
        {
            "output_dir": f"{folder}/laser",
            "model": {"path": folder},
            "data": {
                "train": f"{folder}/train.jsonl",
                "template": "{prompt}",
                "prompts_per_step": args.prompts,
            },
            "rollout": {
                "group_size": args.group_size,
                "max_new_tokens": args.length,
                "score": "off",
                "engine": "vllm" if args.vllm else "hf",
            },
            "reward": {"kind": "bench.grpo_step:reward", "workers": 1},
            "score": {"token": args.score_token, "loss_coef": 0.0},
            "advantage": {"score_coef": 0.0},
            "optim": {"steps": rounds, "tokens_per_microbatch": tokens},
        },
        source="bench",
    )


def reload_weights(generation: Any) -> None:
    """TRL's sync for vLLM's CPU build, whose packed layers have no loader for the one it uses."""
    weights = {"weights_iterator": generation.model.state_dict().items()}
    generation.llm.collective_rpc("reload_weights", kwargs=weights | {"is_checkpoint_format": True})
    generation.llm.reset_prefix_cache()


def keep_on(engine: Any, length: int) -> None:
    """Let our vLLM draw no EOS before the last token."""
    params = engine._sampling_params

    def longer(*asked: Any) -> Any:
        found = params(*asked)
        found.min_tokens = length
        return found

    engine._sampling_params = longer


def measure(folder: str, data: list[dict], args: argparse.Namespace) -> dict[str, list[dict]]:
    """The steps of both, the first of each left out."""
    rounds, num_tokens = args.rounds + 1, args.prompts * args.group_size * args.length
    stages = Stages()
    with open_world() as world, ExitStack() as stack:
        config = laser_config(folder, data, args, rounds)
        sampler, _, _ = training_run._build_sampler(config, world, stack, None)
        if args.vllm:
            keep_on(sampler.engine, args.length)
        else:
            sampler.engine._banned_ids += sampler.vocabulary.special.eos_token_ids
        ours, *_ = training_run._build_trainer(sampler, None, None)
        ours.stage = sampler.stage = stages
        counted = []

        def step(number: int) -> None:
            stages.begin("prepare")
            metrics, groups = ours.step(number)
            lengths = [len(c.completion_ids) for group in groups for c in group.completions]
            counted.append((sum(lengths), {len(group.prompt.prompt_ids) for group in groups}))
            stages.end(OURS, num_tokens)
            took = (sum(side.steps[-1]["cpu"].values()) for side in (their_stages, stages))
            print(f"round {number}: CPU s", *(f"{s:.1f}" for s in took), file=sys.stderr)

        theirs, their_stages = trl_trainer(folder, data, args, rounds)
        theirs.add_callback(Turns(their_stages, num_tokens, step))
        theirs.train()
        if args.vllm:  # whose end would take our process group with it
            theirs.vllm_generation.llm.llm_engine.engine_core._finalizer.detach()
        tokenizer = sampler.vocabulary.tokenizer
        lengths = {len(tokenizer(row["problem"])["input_ids"]) for row in data}
        assert counted == [(num_tokens, lengths)] * rounds
        # Tokens there: only the log knows them, as means over completions.
        mean = [log["completions/mean_length"] for log in theirs.state.log_history if "loss" in log]
        assert set(mean) == {args.length}, mean
    args.prompt_tokens = "-".join(str(n) for n in sorted({min(lengths), max(lengths)}))
    return {TRL: their_stages.steps[1:], LASER: stages.steps[1:]}


def table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Of each case the medians, and the medians of the ratios of each round."""
    cells = []
    for case in dict.fromkeys(row["case"] for row in rows):
        sides = [[r for r in rows if (r["case"], r["trainer"]) == (case, n)] for n in (TRL, LASER)]
        name = f"{case}; {len(sides[0])} rounds; {sides[0][0]['measured']}"
        cells += [[name, *line] for line in lines(*sides)]
    return ["case", "", TRL, LASER, f"{TRL} / {LASER} (range)"], cells


def lines(theirs: list[dict], ours: list[dict]) -> list[list[str]]:
    """The table of one case."""

    def over(name: str, value: Callable[[dict], float], digits: int = 2) -> list[str]:
        sides = [[value(step) for step in steps] for steps in (theirs, ours)]
        shown = [f"{median(side):.{digits}f}" for side in sides]
        ratios = sorted(a / b if b else 0.0 for a, b in zip(*sides, strict=True))
        return [name, *shown, f"{median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"]

    return [
        *(over(f"{name}, CPU s", lambda step, name=name: step["cpu"][name]) for name in STAGES),
        over("whole step, CPU s", lambda step: sum(step["cpu"].values())),
        over("whole step, clock s", lambda step: sum(step["wall"].values())),
        over("tokens per CPU s", lambda step: step["tokens"] / sum(step["cpu"].values()), 1),
        over("peak MiB of the step", lambda step: step["peak_mib"], 0),
    ]


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Run the benchmark; returns its rows."""
    parser = runner.base_parser(__doc__, smoke="one round of a tiny model")
    parser.add_argument("--model", help="Hugging Face folder; default: random weights")
    parser.add_argument("--score-token", default=RESERVED_TOKENS[0], help="a reserved one")
    parser.add_argument("--vllm", action="store_true", help="both sample with vLLM")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=2, help="of a step")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="of every completion")
    args = parser.parse_args(argv)
    if args.smoke:
        args.rounds, args.length, args.group_size = 1, 6, 2
    with tempfile.TemporaryDirectory() as folder:
        if args.model:
            for path in Path(args.model).resolve().iterdir():
                Path(folder, path.name).symlink_to(path)
            data = word_problems.rows("train", args.prompts)
            data = [row | {"problem": CHAT.format(prompt=row["problem"])} for row in data]
        else:
            model = random_qwen2(
                SMOKE if args.smoke else SIZES, tie_word_embeddings=True, eos_token_id=1
            )
            model.save_pretrained(folder)
            write_tokenizer(folder)
            data = [
                {"problem": "".join(row["problem"] for row in several)[:64], "answer": "1"}
                for several in zip(*[iter(rows("train", seed=0))] * 8, strict=False)
            ][: args.prompts]
        found = measure(folder, data, args)
    name = Path(args.model).name if args.model else "random Qwen2"
    name += " on vLLM" if args.vllm else ""
    case = (
        f"{name}; {args.prompts} prompt(s) of {args.prompt_tokens} tokens, {args.group_size} "
        f"completions of {args.length} each"
    )
    facts = {"op": "grpo_step"} | header(torch.device("cpu"))
    # The header is that of the last case; the others were measured by other code and versions.
    measured = f"{facts['date']}, commit {facts['commit']}, {facts['versions']}"
    about = {"case": case, "measured": measured}
    new = [{"trainer": n} | about | step for n, steps in found.items() for step in steps]
    if args.json and args.json.exists():
        kept = json.loads(args.json.read_text())["rows"]
        new = [row for row in kept if row["case"] != case] + new
    return runner.publish(args, facts, *table(new), new)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
