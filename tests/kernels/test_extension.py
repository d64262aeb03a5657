"""The loader of impl="cuda": what it finds, what it hands PyTorch, what it says; without a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from laser_kernels import _dispatch, _extension

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def toolkit(tmp_path):
    """A folder that looks like a CUDA toolkit."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    return str(tmp_path)


def test_loader_says_what_is_missing(monkeypatch, toolkit):
    def message() -> str:
        with pytest.raises(RuntimeError) as caught:
            _extension.load()
        text = str(caught.value)
        assert text.startswith("impl='cuda' builds a CUDA C++ extension, but ")
        assert text.endswith("; impl='triton' computes the same") and "\n" not in text
        return text

    monkeypatch.setattr(torch.version, "cuda", None)
    assert "was built without CUDA; install a CUDA build" in message()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    assert "nvcc was not found; install the CUDA 13.0 toolkit, or set CUDA_HOME" in message()
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", f"{toolkit}/bin")  # a folder without nvcc
    assert "nvcc was not found" in message()
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", toolkit)
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: False)
    assert "ninja is missing; pip install ninja" in message()
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: True)
    log = "Error building extension 'laser_kernels_cuda': [1/3] nvcc\nx.cu(3): error: no such type"

    def fail(*_, **__):
        raise RuntimeError(log)

    monkeypatch.setattr(cpp_extension, "load", fail)
    text = message()
    assert f"{toolkit}/bin/nvcc" in text and "(x.cu(3): error: no such type)" in text


def test_loader_hands_pytorch_the_sources_and_sm_90a(monkeypatch, toolkit):
    calls = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", toolkit)
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: True)
    monkeypatch.setattr(
        cpp_extension, "load", lambda *args, **options: calls.append((args, options))
    )
    _extension.load.cache_clear()
    assert _dispatch.load_backend("cuda") is _dispatch.load_backend("cuda")
    _extension.load.cache_clear()
    (((_, sources), options),) = calls
    assert [Path(source).name for source in sources] == list(_extension.SOURCES)
    assert all(Path(source).is_file() for source in sources)
    assert "-gencode=arch=compute_90a,code=sm_90a" in options["extra_cuda_cflags"]
    assert options["is_python_module"] is False


def test_sources_are_found_in_a_checkout_and_in_a_wheel(tmp_path):
    assert _extension.source_folder().resolve() == ROOT / "csrc"
    # What a wheel holds, unpacked; in a fresh process, away from the checkout.
    command = [sys.executable, "-c", "from setuptools import setup; setup()"]
    command += ["egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path / "lib"]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    code = "from laser_kernels import _extension as e; print(e.source_folder())"
    command = [sys.executable, "-c", code]
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "lib")},
        capture_output=True,
        text=True,
    )
    folder = tmp_path / "lib" / "laser_kernels" / "csrc"
    assert run.stdout.strip() == str(folder), run.stderr
    names = {path.name for path in (ROOT / "csrc").iterdir()}
    assert {path.name for path in folder.iterdir()} == names
