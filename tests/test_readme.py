"""What README.md says about the code: sizes, the files of a step and the names of its stages."""

import ast
import re
import sys
import threading
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# Budgets of Python lines. The core has passed its first one, 10,500: what reads answers whole and
# strictly, refuses broken models and data, and survives faults took 1,300 lines; LoRA, the families
# of models, messages and nested fields took 650; mixes of data sets and rewards, exports, saving in
# the background, the curriculum, what saves memory, and `init` take 1,250.
CORE_LINES, BESIDE_LINES, KERNEL_LINES = 14_000, 2_550, 2_800
BESIDE = ("report", "plan", "sandbox", "integrations", "minimal")
SUFFIXES = {"csrc": (".cu", ".cuh")}
MOST_FILES_OF_A_STEP = 26
# What runs in a step beside the files of the walk: records, clocks, collectives and metrics, and
# in place of vLLM the engine on the model itself.
PLUMBING = {
    "laser_fast/algorithm/verification.py",
    "laser_fast/log/timer.py",
    "laser_fast/model/distributed.py",
    "laser_fast/model/vocabulary.py",
    "laser_fast/records.py",
    "laser_fast/rollout/engine.py",
    "laser_fast/rollout/hf.py",
    "laser_fast/stopping.py",
}


def section(title):
    """The text below a heading of the README."""
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


# The tree of modules, with their sizes.


def modules():
    """Path -> first line of the docstring, of every module of the layers, high to low."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    found = {}
    for module in re.findall(r"\w+", " ".join(layers)):
        folder = ROOT / "laser_fast" / module
        path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        shown = f"laser_fast/{module}" + ("/" if folder.is_dir() else ".py")
        found[shown] = ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]
    kernels = "kernels/laser_kernels"
    docstring = ast.get_docstring(ast.parse((ROOT / kernels / "__init__.py").read_text()))
    return found | {
        f"{kernels}/": docstring.splitlines()[0],
        "csrc/": "The same kernels in CUDA C++ for Hopper, built on first use.",
    }


def count_lines(path):
    """Lines of a file, or of the sources in a folder."""
    path = ROOT / path
    if path.is_file():
        return path.read_bytes().count(b"\n")
    suffixes = SUFFIXES.get(path.name, (".py",))
    files = [file for file in path.rglob("*") if file.suffix in suffixes]
    return sum(file.read_bytes().count(b"\n") for file in files)


def tree_block():
    """The tree as it should be, with the README's own words where it has some."""
    words = {path: text for path, _, text in written_tree()}
    return "\n".join(
        f"{path:<28} {count_lines(path) / 1000:.1f}k lines   {words.get(path, text)}"
        for path, text in modules().items()
    )


def written_tree():
    """(path, lines, words) of each line of the README's tree."""
    return re.findall(r"^(\S+) +([\d.]+k?) lines +(.*)$", section("How a step goes"), re.M)


def test_the_tree_names_every_module_in_the_order_of_the_layers_with_its_size():
    problems = []
    tree = written_tree()
    if [path for path, *_ in tree] != list(modules()):
        problems.append("other modules or another order")
    for path, written, _ in tree:
        digits = written.removesuffix("k")
        scale = 1000 if written.endswith("k") else 1
        precision = scale / 10 ** len(digits.partition(".")[2])
        if abs(count_lines(path) - float(digits) * scale) > precision / 2:
            problems.append(f"{path} has {count_lines(path)} lines")
    assert not problems, f"{problems}; the block of the README should be\n{tree_block()}"


def test_sizes_stay_within_their_budgets():
    beside = sum(
        count_lines(path)
        for path in modules()
        if path.removeprefix("laser_fast/").rstrip("/").removesuffix(".py") in BESIDE
    )
    found = {
        "core": (count_lines("laser_fast") - beside, CORE_LINES),
        "beside": (beside, BESIDE_LINES),
        "kernels": (count_lines("kernels/laser_kernels"), KERNEL_LINES),
    }
    too_many = {name: (lines, most) for name, (lines, most) in found.items() if lines > most}
    assert not too_many


# The walk of a prompt.


def stages():
    """Name of a stage -> the files that its row names, in the order of the table."""
    table = section("How a step goes").partition("|---")[2]  # below the head
    rows = re.findall(r"^\| (\w+) \|.*\| ([^|]*) \|$", table, re.M)
    return {stage: re.findall(r"`([\w/]+\.py)`", files) for stage, files in rows}


def walk():
    """Paths of the files of the walk, the step itself first."""
    found = ["laser_fast/training/trainer.py"]
    for file in sum(stages().values(), []):
        folder = "kernels" if file.startswith("laser_kernels/") else "laser_fast"
        found.append(f"{folder}/{file}")
    return found


def test_the_walk_names_existing_files_once_and_not_too_many():
    files = walk()
    missing = [path for path in files if not (ROOT / path).is_file()]
    assert not missing
    assert len(files) == len(set(files)) <= MOST_FILES_OF_A_STEP


def test_the_walk_and_the_code_have_the_same_stages():
    texts = [path.read_text() for path in (ROOT / "laser_fast" / "training").glob("*.py")]
    named = re.findall(r'\bstage(?:\.only)?\("(\w+)"\)', "\n".join(texts))
    assert set(named) == set(stages())


@pytest.mark.slow
def test_the_walk_has_every_file_that_runs_in_a_step(tmp_path, monkeypatch, world):
    from laser_fast.config import Config
    from laser_fast.log.jsonl import write_lines
    from laser_fast.sandbox.model import make_sandbox_model
    from laser_fast.sandbox.task import RESERVED_TOKENS, rows
    from laser_fast.training.run import train
    from laser_fast.training.trainer import Trainer

    make_sandbox_model(tmp_path / "model", seed=0, steps=8)
    write_lines(tmp_path / "train.jsonl", rows("train", seed=0)[:64])
    config = {
        "output_dir": str(tmp_path / "run"),
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": str(tmp_path / "train.jsonl"), "template": "{prompt}"},
        "rollout": {"max_new_tokens": 30, "group_size": 4},
        "reward": {"kind": "math", "workers": 1},
        "score": {"token": RESERVED_TOKENS[0], "beta": 0.2, "ref_logprob": -11.0},
        "optim": {"steps": 1},
        "checkpoint": {"every": 0},
    }
    config["data"] |= {"max_prompt_tokens": 24, "prompts_per_step": 4}
    files, step = set(), Trainer.step

    def record(frame, event, argument):
        files.add(frame.f_code.co_filename)

    def recorded_step(*arguments):
        threading.setprofile(record)
        sys.setprofile(record)
        try:
            return step(*arguments)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    monkeypatch.setattr(Trainer, "step", recorded_step)
    train(Config.parse(config, source="test"), world=world)
    ran = {str(Path(file).relative_to(ROOT)) for file in files if file.startswith(str(ROOT))}
    ran = {path for path in ran if path.startswith("laser_fast/")}
    print(*sorted(ran), sep="\n")
    assert {"laser_fast/training/trainer.py", "laser_fast/model/packing.py"} < ran
    assert not sorted(ran - set(walk()) - PLUMBING)
