"""The shell script's own work: acts, limits, failures, the archive and the last table."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from bench.provenance import ROOT
from bench.shapes import SHAPES, make_inputs

SCRIPT = ROOT / "bench" / "gpu_check.sh"
# Stands in for the interpreter: the tests write an outcome and hang, as does the last token of the
# act "full"; one step crashes, the others leave nothing.
INTERPRETER = """#!{python}
import json, os, sys, time
arguments = sys.argv[1:]
if arguments[0] == "-c":
    sys.exit({no_gpu} if "cuda" in arguments[1] else print("vllm"))
if arguments[1] == "bench.targets":
    os.execv("{python}", ["{python}", *arguments])
path = arguments[arguments.index("--json") + 1]
act, name = path.split("/")[-2:]
if name == "gpu_tests.json":
    rows = [{{"test": "a", "outcome": "passed", "reason": ""}}]
    json.dump({{"header": {{"op": "gpu_tests", "device": "GPU"}}, "rows": rows}}, open(path, "w"))
    time.sleep(60)
elif name == "loss_8192.json":
    sys.exit("the driver is gone: " + " ".join(arguments[:3]))
elif (act, name) == ("full", "last_token_128.json"):
    time.sleep(60)
"""
# Neither is on a bare PyTorch image.
HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pydantic", "tomli_w", "datasets", "math_verify", "vllm"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""


def check(tmp_path, act, *, no_gpu=0, seconds="12"):
    """Run an act; its process and the files of its archive."""
    interpreter = tmp_path / "python"
    interpreter.write_text(INTERPRETER.format(python=sys.executable, no_gpu=no_gpu))
    interpreter.chmod(0o755)
    environment = os.environ | {"PYTHON": str(interpreter), "GPU_CHECK_SECONDS": seconds}
    environment["TMPDIR"] = str(tmp_path)
    out = tmp_path / "out"
    result = subprocess.run([SCRIPT, act, out], env=environment, capture_output=True, text=True)
    if no_gpu:
        return result, None
    assert result.returncode == 0, result.stderr
    assert [path.name for path in out.iterdir()] == [f"{act}.tar.gz"]
    assert not list(tmp_path.glob("tmp.*"))
    shutil.unpack_archive(out / f"{act}.tar.gz", tmp_path)
    return result, tmp_path / act


def test_probe_survives_failing_and_hanging_steps(tmp_path):
    result, folder = check(tmp_path, "probe")
    steps = {path.stem for path in folder.glob("*.json")}
    assert steps == {"truncation", "csrc", "loss_8192", "last_token_64", "gpu_tests"}
    assert all((folder / f"{step}.md").exists() for step in steps - {"gpu_tests"})
    assert json.loads((folder / "loss_8192.json").read_text())["rows"] == []
    text = (folder / "loss_8192.md").read_text()
    assert "the driver is gone: -m bench.guard bench.linear_logprob_loss" in text
    assert "gpu_tests: exit code 124" in result.stdout
    table = result.stdout[result.stdout.index("| target |") :]
    assert "| GPU tests that fail | 0 | - | 1 passed, 0 failed, 0 skipped | met | GPU |" in table
    assert re.search(
        r"scoring, 7B head, .* \| 1.10x \| 1\.\d+ triton on H200, [^|]+ \| not measured \|", table
    )
    assert (folder / "targets.md").read_text() == table


def test_full_gives_its_time_to_the_most_valuable_steps(tmp_path):
    result, folder = check(tmp_path, "full")
    assert len(list(folder.glob("*.json"))) == 22
    assert "last_token_128: exit code 124" in result.stdout
    # The hang took all of the time.
    assert "exit code no-time" in (folder / "gpu_tests.md").read_text()
    assert "rollout_score: skipped, no vllm" in result.stdout
    assert "weight_sync: no result, no vllm" in (folder / "weight_sync.md").read_text()


def limits(act):
    """The limits of an act's steps, in order; those of a loop as often as it runs them."""
    body = re.search(rf"^{act}\(\) {{\n(.*?)^}}", SCRIPT.read_text(), re.M | re.S)[1]
    found = []
    for line in body.splitlines():
        if loop := re.match(r" *for rows in ([\d ]+); do", line):
            times = len(loop[1].split())
        elif step := re.match(r"( +)(?:step|bench|needs_vllm) (\S+) (\d+)", line):
            found += [(step[2], int(step[3]))] * (times if len(step[1]) > 4 else 1)
    return found


def test_the_steps_of_every_target_fit_into_their_act():
    probe, full = dict(limits("probe")), limits("full")
    # The build runs beside the steps up to the loss; tests take what is left, at least 40 s.
    assert probe["truncation"] + probe["last_token_64"] + probe["loss_8192"] <= 100
    needed = [name for name, _ in full].index("loss_8192_compiled")
    assert sum(limit for _, limit in full[: needed + 1]) <= 410


def test_every_step_imports_on_a_bare_image():
    text = SCRIPT.read_text()
    modules = set(re.findall(r"-m bench\.(\w+)", text))
    modules |= set(re.findall(r"^ +bench \S+ \d+ (\w+)", text, re.M))
    assert {"last_token", "train_step", "csrc", "truncation", "targets", "guard"} <= modules
    code = HIDE + "".join(f"import bench.{name}\n" for name in sorted(modules))
    # What the tests of a GPU make there, beside the benchmarks.
    code += "import laser_fast.model.policy, laser_fast.model.logprobs, laser_fast.rollout.hf\n"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_steps_select_providers_that_exist():
    text = SCRIPT.read_text().replace("\\\n", " ")
    arrays = dict(re.findall(r"^(\w+)=\((.*)\)$", text, re.M))
    text = re.sub(r'"\$\{(\w+)\[@\]\}"', lambda match: arrays[match[1]], text)
    sets = [make_inputs(SHAPES["smoke"], 4, torch.float32, torch.device("cpu"), seed=0)]
    checked = 0
    for module, options in re.findall(r"^ +bench \S+ \d+ (\w+)(.*)$", text, re.M):
        if module == "train_step":
            continue
        entries = importlib.import_module(f"bench.{module}").entries(sets)
        names = sum((x.split(",") for x in re.findall(r'--only "([^"]+)"', options)), [])
        names += re.findall(r'--skip "([^"=]+)=', options)
        assert names and set(names) <= {entry.name for entry in entries}, options
        checked += 1
    assert checked == 12


def test_refuses_a_machine_without_a_gpu(tmp_path):
    result, _ = check(tmp_path, "probe", no_gpu=1)
    assert result.returncode == 1 and "expected a PyTorch that sees an NVIDIA GPU" in result.stderr


@pytest.mark.parametrize("arguments", [[], ["out"], ["quick", "out"], ["full", "a", "b"]])
def test_explains_its_use(arguments):
    result = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True)
    assert result.returncode == 2 and "bench/gpu_check.sh probe OUT" in result.stdout
