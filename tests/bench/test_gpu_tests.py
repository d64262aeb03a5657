"""The runner of GPU tests says what became of every test, also where a package is missing."""

import json
import os
import subprocess
import sys
from collections import Counter

from bench import gpu_tests
from bench.provenance import ROOT

TESTS = """
import pytest
pytestmark = pytest.mark.sample
@pytest.mark.parametrize("a", [1, 2])
@pytest.mark.parametrize(("b", "c"), [(1, 2), pytest.param(3, 4, id="named")])
def test_product(a, b, c):
    assert c == b + 1
def test_fails():
    with pytest.raises(ValueError):
        pass
@pytest.mark.skipif(True, reason="never")
def test_skipped():
    assert False
def test_skips_itself():
    pytest.skip("not here")
"""
# Hides what a GPU image may lack, as if it were not installed.
HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
from bench import gpu_tests
sys.exit(gpu_tests.main(sys.argv[1:]))
"""


def test_outcomes_are_counted_and_written(tmp_path):
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "test_sample.py").write_text(TESTS)
    (tmp_path / "test_other.py").write_text("import not_installed_here\n")  # without the marker
    path = tmp_path / "out" / "tests.json"
    assert gpu_tests.main([str(tmp_path), "--marker", "sample", "--json", str(path)]) == 1
    rows = json.loads(path.read_text())["rows"]
    expected = {"passed": 4, "failed": 1, "skipped": 2}
    assert Counter(row["outcome"] for row in rows) == expected
    text = path.with_suffix(".md").read_text()
    assert "1 failed, 4 passed, 2 skipped" in text
    assert "test_fails | failed | Failed: DID NOT RAISE" in text


def test_a_missing_package_skips_its_file_and_a_missing_module_of_ours_fails(tmp_path):
    for name in ("not_installed_here", "laser_kernels.gone"):
        path = tmp_path / f"test_{name.partition('.')[0]}.py"
        path.write_text(f"import pytest, {name}\npytestmark = pytest.mark.sample\n")
    path = tmp_path / "tests.json"
    assert gpu_tests.main([str(tmp_path), "--marker", "sample", "--json", str(path)]) == 1
    found = {row["outcome"]: row["reason"] for row in json.loads(path.read_text())["rows"]}
    assert set(found) == {"skipped", "failed"}
    assert "No module named 'not_installed_here'" in found["skipped"]
    assert "No module named 'laser_kernels.gone'" in found["failed"]


def test_runs_on_an_image_with_torch_triton_transformers_and_pytest(tmp_path):
    """Our own GPU tests are found; without pydantic and datasets, none of them fails."""
    code = HIDE.format(names=["pydantic", "datasets", "pytest_timeout", "math_verify", "pebble"])
    path = tmp_path / "tests.json"
    command = [sys.executable, "-c", code, "--json", path]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads(path.read_text())["rows"]
    files = {row["test"].partition("::")[0] for row in rows}
    assert {"tests/kernels/test_gpu.py", "tests/test_plan_gpu.py"} <= files
    in_kernels = [row for row in rows if row["test"].startswith("tests/kernels/test_gpu.py::")]
    assert len(in_kernels) > 40  # each test on its own: the file can be imported
