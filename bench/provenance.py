"""Where a result comes from (hardware, driver, versions, commit, command), and its two files."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("kernels", "csrc", "laser_fast", "bench", ":(exclude)bench/results")
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "liger-kernel",
    "cut-cross-entropy",
    "trl",
    "verl",
    "torchtitan",
    "quack-kernels",
)


def header(device: torch.device) -> dict[str, str]:
    """What a reader needs to repeat the measurement."""
    facts = {
        "device": _device_name(device),
        "threads": str(torch.get_num_threads()),
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {v}" for name in PACKAGES if (v := _version(name))),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command(),
    }
    if device.type == "cuda":
        facts["driver"] = _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    return facts


def commit() -> str:
    """The checkout's commit, with a + if tracked files differ from it.

    A copy without its .git names the commit in LASER_FAST_COMMIT.
    """
    if stated := os.environ.get("LASER_FAST_COMMIT"):
        return stated
    sha = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if sha == "unknown":
        return sha
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "-uno", "--", *SOURCES)
    return sha if not changed else sha + "+"


def command() -> str:
    """The command line, with this interpreter as `python` and paths as given."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name] if spec else [Path(sys.argv[0]).name]
    return shlex.join(["python", *program, *sys.argv[1:]])


def save(path: Path, header: dict[str, str], rows: Sequence[dict], text: str) -> None:
    """Write a result as JSON, whole or not at all, and its tables, `text`, as .md beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"header": header, "rows": list(rows)}, indent=1) + "\n")
    partial.replace(path)
    path.with_suffix(".md").write_text(text)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [l for l in cpuinfo.read_text().splitlines() if l.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*arguments: str) -> str:
    try:
        result = subprocess.run(arguments, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() if result.returncode == 0 else "unknown"
