"""The runner of GPU tests says the same with pytest and without."""

import json
import sys

import pytest

from bench import gpu_tests, mini_pytest

CONFTEST = """
import pytest
@pytest.fixture
def two():
    return 2
"""
TESTS = """
import os
import pytest
pytestmark = pytest.mark.sample
@pytest.fixture
def four(two):
    os.environ["FOUR"] = "1"
    yield two * 2
    del os.environ["FOUR"]
@pytest.mark.parametrize("a", [1, 2])
@pytest.mark.parametrize(("b", "c"), [(1, 2), pytest.param(3, 4, id="named")])
def test_product(a, b, c, four, tmp_path):
    assert four == 4 and c == b + 1 and tmp_path.is_dir() and os.environ["FOUR"]
def test_teardown(monkeypatch):
    assert "FOUR" not in os.environ
    monkeypatch.setenv("HELLO", "1")
def test_environment_is_restored():
    assert "HELLO" not in os.environ
def test_raises():
    with pytest.raises(ValueError, match="y"):
        raise ValueError("xyz")
def test_fails():
    with pytest.raises(ValueError):
        pass
@pytest.mark.skipif(True, reason="never")
def test_skipped():
    assert False
def test_skips_itself():
    pytest.skip("not here")
"""
EXPECTED = {"passed": 7, "failed": 1, "skipped": 2}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "test_sample.py").write_text(TESTS)
    (tmp_path / "test_other.py").write_text("import not_installed_here\n")
    return tmp_path


def counts(rows):
    return {kind: sum(row[1] == kind for row in rows) for kind in EXPECTED}


def test_with_pytest(folder):
    path = folder / "out" / "tests.json"
    code = gpu_tests.main([str(folder), "--marker", "sample", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert code == 1
    assert counts([(row["test"], row["outcome"]) for row in rows]) == EXPECTED
    text = path.with_suffix(".md").read_text()
    assert "1 failed, 7 passed, 2 skipped" in text and "test_fails | failed" in text


def test_without_pytest(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytest", pytest)  # put back afterwards
    mini_pytest.install()
    rows = []
    path = folder / "deeper" / "test_sample.py"
    mini_pytest.run_file(path, "sample", lambda *row: rows.append(row))
    assert counts(rows) == EXPECTED
    (failed,) = [row for row in rows if row[1] == "failed"]
    assert failed[0] == "test_sample.py::test_fails" and "did not raise" in failed[2]
    mini_pytest.run_file(path, "gpu", lambda *row: pytest.fail("no test carries this marker"))


@pytest.mark.parametrize("has_pytest", [True, False])
def test_a_missing_package_skips_its_file_and_a_missing_module_of_ours_fails(
    has_pytest, tmp_path, monkeypatch
):
    for name in ("not_installed_here", "laser_kernels.gone"):
        path = tmp_path / f"test_{name.partition('.')[0]}.py"
        path.write_text(f"import pytest, {name}\npytestmark = pytest.mark.sample\n")
    outcomes = gpu_tests.Outcomes(None)
    if has_pytest:
        monkeypatch.setattr(gpu_tests, "Outcomes", lambda path: outcomes)
        gpu_tests.main([str(tmp_path), "--marker", "sample"])
    else:
        monkeypatch.setitem(sys.modules, "pytest", pytest)  # put back afterwards
        gpu_tests.run_without_pytest(sorted(tmp_path.glob("*.py")), "sample", outcomes)
    found = {row["outcome"]: row["reason"] for row in outcomes.rows}
    assert set(found) == {"skipped", "failed"}
    assert "No module named 'not_installed_here'" in found["skipped"]
    assert "No module named 'laser_kernels.gone'" in found["failed"]
