"""Survive a provider that takes the process with it.

A segmentation fault cannot be caught, nor can a GPU that fails after an illegal access.
Therefore the benchmark runs in a child process, which leaves the name of each provider before it
first runs its code; when the child dies, a new one goes on without that provider. Its row says so.
A benchmark guards itself; `python -m bench.guard bench.last_token ...` does it without importing
torch twice.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


def guarded(main: Callable[[], object]) -> None:
    """Run the `__main__` module's `main` in a child process, again after each fatal provider."""
    if "BENCH_MARK" in os.environ or "--smoke" in sys.argv or "-h" in sys.argv[1:2]:
        main()
    else:
        raise SystemExit(guard(sys.modules["__main__"].__spec__.name, sys.argv[1:]))


def guard(module: str, arguments: list[str]) -> int:
    """The same for a module by its name; returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder, "provider")
        if "--json" not in arguments:
            arguments = [*arguments, "--json", str(Path(folder, "results.json"))]
        return supervise([sys.executable, "-m", module, *arguments], mark)


def supervise(command: list[str], mark: Path) -> int:
    """Repeat `command` until it succeeds or no provider is to blame; returns its exit code."""
    blamed: set[str] = set()
    while True:
        mark.write_text("")
        environment = os.environ | {"BENCH_MARK": str(mark)}
        code = subprocess.run(command, env=environment).returncode
        name = mark.read_text()
        if code == 0 or not name or name in blamed:
            return code
        blamed.add(name)
        print(f"{name} ended the process (exit code {code}); going on without it", flush=True)
        command = [*command, "--resume", "--skip", f"{name}=ended the process (exit code {code})"]


if __name__ == "__main__":
    raise SystemExit(guard(sys.argv[1], sys.argv[2:]))
