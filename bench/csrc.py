"""Show what nvcc makes of csrc/: registers, spills and instructions of every kernel.

It needs no GPU.

    python -m bench.csrc [--json FILE]

Where impl="cuda" can run, the extension is built as its first use would build it, which later
steps then find in the cache, and the kernels are those of the built library; elsewhere nvcc
compiles the sources here. With --smoke it only compiles them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import runner, sass
from bench.harness import Unavailable
from bench.provenance import ROOT, header
from laser_kernels import _extension

INSTRUCTIONS = {
    "wgmma": "HGMMA",
    "TMA loads": "UTMALDG",
    "TMA stores": "UTMASTG",
    "device fences": "MEMBAR.ALL.GPU",
}
TYPES = ("bfloat16", "float16")
OUTPUTS = ("none", "kept", "dlogits")
COLUMNS = ["kernel", "registers", "spilled bytes", *INSTRUCTIONS]


def nvcc() -> str:
    """Path of the compiler; raise Unavailable if there is none."""
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        raise Unavailable("nvcc is neither in PATH nor in /usr/local/cuda/bin")
    return found


def version() -> str:
    """The compiler's release."""
    text = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", text)[1]


def compile_source(source: Path, target: Path) -> None:
    """Compile one file as the extension does, with every warning an error."""
    include = Path(torch.__file__).parent / "include"
    command = [nvcc(), "-c", source, "-o", target, "-std=c++20", *_extension.FLAGS]
    command += ["-isystem", include, "--expt-relaxed-constexpr", "-Werror", "all-warnings"]
    command += ["-Xcompiler", "-fPIC,-Wall,-Wextra", "-Xptxas", "-v"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    output = run.stdout + run.stderr
    # ptxas only mentions that it had to wait after every wgmma, which -Werror does not catch.
    if run.returncode or re.search(r"warning|serialized", output):
        raise RuntimeError(f"{source.name}: exit code {run.returncode}\n{output}")


def kernels(binary: Path) -> list[dict]:
    """Resources of each kernel in an object file or library."""
    rows = [
        {
            "kernel": readable(name),
            "registers": code.registers,
            "spilled bytes": code.spilled_bytes,
            **{column: code.text.count(word) for column, word in INSTRUCTIONS.items()},
        }
        for name, code in sass.read(binary).items()
    ]
    return sorted(rows, key=lambda row: row["kernel"])


def readable(mangled: str) -> str:
    """For example "head_kernel bfloat16 kept" or "last_token_kernel float16 B 64 keep"."""
    kernel, dtype, rest = re.search(r"\d([a-z_]+_kernel)IL5DType(\d)E(\w+?)EEv", mangled).groups()
    if output := re.search(r"OutputE(\d)", rest):
        return f"{kernel} {TYPES[int(dtype)]} {OUTPUTS[int(output[1])]}"
    rows, keep = re.search(r"Li(\d+)ELb(\d)", rest).groups()
    return f"{kernel} {TYPES[int(dtype)]} B {rows}{' keep' * int(keep)}"


def compiled_here() -> list[dict]:
    """Resources of what nvcc makes of every source."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in _extension.SOURCES:
            target = Path(folder, name).with_suffix(".o")
            compile_source(ROOT / "csrc" / name, target)
            rows += kernels(target)
    return rows


def built() -> list[dict]:
    """Build and load the extension; resources of its kernels."""
    _extension.load()
    paths = map(Path, torch.ops.loaded_libraries)
    (library,) = (path for path in paths if path.stem.startswith(_extension.NAME))
    return kernels(library)


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Compile, print and write; returns the rows."""
    args = runner.base_parser(__doc__, smoke="compile, but build no extension").parse_args(argv)
    is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    builds = is_hopper and not args.smoke
    facts = {"op": "csrc"} | header(torch.device("cuda" if builds else "cpu"))
    start = time.perf_counter()
    try:
        rows = built() if builds else compiled_here()
    except (Unavailable, RuntimeError, OSError, subprocess.CalledProcessError) as error:
        rows, facts["failure"] = [], str(error)
    facts["built" if builds else "compiled"] = f"in {time.perf_counter() - start:.0f} s"
    cells = [[row[column] for column in COLUMNS] for row in rows]
    return runner.publish(args, facts, COLUMNS, cells, rows)


if __name__ == "__main__":
    raise SystemExit(not main())
