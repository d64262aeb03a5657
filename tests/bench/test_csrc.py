"""nvcc compiles every file of csrc/ for sm_90a without a warning, a spill or a stalled wgmma."""

import pytest

from bench import csrc
from bench.harness import Unavailable
from bench.provenance import ROOT
from laser_kernels import _extension

# HGMMA instructions of a kernel: four steps of 16 along D, two of 64 along the rows.
PRODUCTS = 8


def compiled(name, tmp_path):
    try:
        csrc.nvcc()
    except Unavailable as error:
        pytest.skip(str(error))
    target = tmp_path / "kernels.o"
    csrc.compile_source(ROOT / "csrc" / name, target)
    kernels = csrc.kernels(target)
    for kernel in kernels:
        print(kernel)
        assert kernel["spilled bytes"] == 0 and kernel["registers"] <= 224, kernel
        assert kernel["wgmma"] == PRODUCTS and kernel["TMA loads"] == 2, kernel
    return {kernel["kernel"]: kernel for kernel in kernels}


def test_every_source_is_compiled_here():
    found = {path.name for path in (ROOT / "csrc").glob("*.cu")}
    assert found == set(_extension.SOURCES) == {"linear_logprob.cu", "last_token.cu"}


@pytest.mark.slow
def test_linear_logprob(tmp_path):
    kernels = compiled("linear_logprob.cu", tmp_path)
    names = {f"head_kernel {t} {output}" for t in csrc.TYPES for output in csrc.OUTPUTS}
    assert kernels.keys() == names
    for name, kernel in kernels.items():
        # 168 at launch is what lets the consumers take 240.
        assert kernel["registers"] == 168, kernel
        assert (kernel["TMA stores"] > 0) == (not name.endswith("none")), kernel
        # Of the two cluster barriers. One in the loop over D would stall every stage.
        assert kernel["device fences"] == 2, kernel


@pytest.mark.slow
def test_last_token(tmp_path):
    kernels = compiled("last_token.cu", tmp_path)
    sizes = [f"B {rows}{keep}" for rows in (16, 64, 128) for keep in ("", " keep")]
    assert kernels.keys() == {f"last_token_kernel {t} {s}" for t in csrc.TYPES for s in sizes}
    assert not any(kernel["device fences"] for kernel in kernels.values())


@pytest.mark.slow
def test_a_warning_is_an_error(tmp_path):
    try:
        csrc.nvcc()
    except Unavailable as error:
        pytest.skip(str(error))
    source = tmp_path / "unused.cu"
    source.write_text("__global__ void kernel(float* x) { int unused; *x = 1; }\n")
    with pytest.raises(RuntimeError, match="unused"):
        csrc.compile_source(source, tmp_path / "unused.o")


def test_smoke_prints_the_table_or_why_there_is_none(tmp_path, monkeypatch):
    def no_compiler():
        raise Unavailable("nvcc is not here")

    monkeypatch.setattr(csrc, "nvcc", no_compiler)
    assert csrc.main(["--smoke", "--json", str(tmp_path / "csrc.json")]) == []
    text = (tmp_path / "csrc.md").read_text()
    assert "failure: nvcc is not here" in text and "| kernel | registers |" in text
