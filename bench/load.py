"""What a run holds on to: memory, open files and threads of 500 steps, and a start with 2M rows.

    python -m bench.load steps --json OUT    500 sandbox steps, with checkpoints and evaluations
    python -m bench.load rows --json OUT     the first and the second start with 2,000,000 prompts
    python -m bench.load check --json OUT    exit code 1 if OUT misses a target or a part

`steps` and `rows` add their part to OUT. The run is `laser-fast train` in a process of its own, on
one rank; what it holds is read from /proc each time that it has logged a step. A slope is that of
the least squares line through the resident memory after the warm-up; of files and threads, every
number that was seen counts. Where other work shares the cores, the CPU seconds of a start say more
than its seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tomli_w
import torch

from bench import provenance
from bench.markdown import page

STEPS, WARM_UP, ROWS = 500, 100, 2_000_000
MAX_SLOPE, MAX_START_S, MAX_EXTRA_MB = 1.0, 60.0, 1000.0
MB = 1e6
RUN = {
    "data": {"template": "{prompt}", "max_prompt_tokens": 24, "prompts_per_step": 4},
    "rollout": {"max_new_tokens": 32, "group_size": 4},
    "reward": {"kind": "sandbox", "workers": 1},
    "score": {"token": "<|reserved_0|>", "beta": 0.2, "ref_logprob": -11.0, "loss_coef": 1.0},
    "optim": {"lr": 1e-4},
    "checkpoint": {"every": 50},
}
COLUMNS = ("what", "measured", "target")


@contextmanager
def training(
    folder: Path, name: str, cache: Path, **sections: dict
) -> Iterator[tuple[subprocess.Popen, Path]]:
    """`laser-fast train` of the sandbox model in `folder`, and the folder of the run."""
    run = folder / name
    config: dict = {"output_dir": str(run), "model": {"path": str(folder / "model")}}
    for section in {*RUN, *sections}:
        config[section] = RUN.get(section, {}) | sections.get(section, {})
    file = folder / f"{name}.toml"
    file.write_text(tomli_w.dumps(config))
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "laser_fast", "train", str(file)]
    with open(folder / f"{name}.log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield process, run
    finally:
        process.kill()
        process.wait()


def wait_for(process: subprocess.Popen, path: Path, log: Path) -> None:
    """Wait until a file exists."""
    while not path.exists():
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with {process.returncode}:\n{log.read_text()}")
        time.sleep(0.05)


def holdings(pid: int) -> dict[str, float]:
    """Resident memory (MB), open files and threads of a process; memory of its workers."""
    proc = Path("/proc") / str(pid)
    children = (proc / "task" / str(pid) / "children").read_text().split()
    return {
        "rss": _status(proc)["VmRSS"] / MB,
        "files": float(len(list((proc / "fd").iterdir()))),
        "threads": _status(proc)["Threads"],
        "workers": sum(_status(Path("/proc") / child)["VmRSS"] for child in children) / MB,
    }


def _status(proc: Path) -> dict[str, float]:
    """The numbers of /proc/PID/status, those in kB as bytes."""
    pairs = (line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    numbers = {name: text.split() for name, text in pairs}
    return {
        name: float(words[0]) * (1024 if words[1:] == ["kB"] else 1)
        for name, words in numbers.items()
        if words and words[0].isdigit()
    }


def measure_steps(folder: Path, steps: int, warm_up: int) -> dict:
    """What a run of the sandbox holds after each step, and the slopes after the warm-up."""
    from laser_fast.log.jsonl import write_lines
    from laser_fast.sandbox.model import make_sandbox_model
    from laser_fast.sandbox.task import rows

    make_sandbox_model(folder / "model", seed=0, steps=60)
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "eval")}
    for split, file in files.items():
        write_lines(Path(file), rows(split, seed=0))
    held: list[dict[str, float]] = []
    data = files | {"eval_limit": 8, "eval_samples": 2, "eval_every": 50}
    sections = {"data": RUN["data"] | data, "optim": RUN["optim"] | {"steps": steps}}
    with training(folder, "steps", folder / "cache", **sections) as (process, run):
        wait_for(process, run / "metrics.jsonl", folder / "steps.log")
        with open(run / "metrics.jsonl") as metrics:
            while len(held) < steps:
                if metrics.readline().endswith("\n"):
                    held.append(holdings(process.pid))
                elif process.poll() is None:
                    time.sleep(0.02)
                else:
                    raise RuntimeError((folder / "steps.log").read_text())
        process.wait()
    warm = held[warm_up:]
    slopes = {key: 100 * _slope([one[key] for one in warm]) for key in ("rss", "workers")}
    counts = {key: sorted({int(one[key]) for one in warm}) for key in ("files", "threads")}
    every = {key: [round(one[key], 2) for one in held[:: max(steps // 50, 1)]] for key in held[0]}
    return {"steps": steps, "warm_up": warm_up, "slopes": slopes, "counts": counts, "held": every}


def _slope(values: Sequence[float]) -> float:
    return statistics.linear_regression(range(len(values)), values).slope


def measure_rows(folder: Path, num_rows: int) -> dict:
    """Seconds until the run begins its first step, and peak memory, with few rows and with many."""
    from laser_fast.sandbox.model import make_sandbox_model

    make_sandbox_model(folder / "model", seed=0, steps=1)
    starts = {}
    for name, count in (("few", 100), ("first", num_rows), ("second", num_rows)):
        file = folder / f"{count}.jsonl"
        if not file.exists():
            write_rows(file, count)
        begun = time.monotonic()
        sections = {"data": RUN["data"] | {"train": str(file)}, "optim": {"steps": 1}}
        with training(folder, name, folder / "cache", **sections) as (process, run):
            wait_for(process, run / "config.toml", folder / f"{name}.log")
            seconds = time.monotonic() - begun
            proc = Path("/proc") / str(process.pid)
            ticks = sum(map(int, (proc / "stat").read_text().rpartition(")")[2].split()[11:13]))
            peak = _status(proc)["VmHWM"] / MB
        cpu = ticks / os.sysconf("SC_CLK_TCK")
        starts[name] = {"seconds": seconds, "cpu_seconds": cpu, "peak_mb": peak}
    size = (folder / f"{num_rows}.jsonl").stat().st_size / MB
    return {"rows": num_rows, "file_mb": size, "starts": starts}


def write_rows(path: Path, count: int) -> None:
    """Write problems like the sandbox's, each with its answer, as JSON lines."""
    rng = random.Random(0)
    with open(path, "w") as file:
        for _ in range(count):
            digits = [str(rng.randrange(1, 10)) for _ in range(4)]
            problem = "{}a*{}b+{}c*{}=".format(*digits)
            file.write(json.dumps({"problem": problem, "answer": digits[0]}) + "\n")


def targets(result: dict) -> list[tuple[str, str, str, bool]]:
    """What was measured: its name, value and target, and whether it is met."""
    rows = []
    if part := result.get("steps"):
        after = f"steps {part['warm_up']} to {part['steps']}"
        for key, what in (("rss", "resident memory of the run"), ("workers", "of its graders")):
            slope = part["slopes"][key]
            shown = f"{slope:+.3f} MB per 100 steps"
            rows.append((f"{what}, {after}", shown, f"< {MAX_SLOPE:g}", slope < MAX_SLOPE))
        for key, name in (("files", "open files"), ("threads", "threads")):
            counts = part["counts"][key]
            shown = " or ".join(map(str, counts))
            # One more while a file is being written.
            rows.append((f"{name}, {after}", shown, "within 1", counts[-1] - counts[0] <= 1))
    if part := result.get("rows"):
        few, first, second = (part["starts"][name] for name in ("few", "first", "second"))
        for name, start in (("first", first), ("second", second)):
            label = f"{name} start with {part['rows']:,} rows ({part['file_mb']:.0f} MB)"
            seconds, extra = start["seconds"], start["peak_mb"] - few["peak_mb"]
            shown = f"{seconds:.1f} s, {start['cpu_seconds']:.1f} s of CPU time"
            rows.append((label, shown, f"< {MAX_START_S:g} s", seconds < MAX_START_S))
            shown = f"{start['peak_mb']:.0f} MB, {extra:+.0f} MB"
            target = f"< +{MAX_EXTRA_MB:g} MB"
            rows.append((f"{label}: peak, against 100 rows", shown, target, extra < MAX_EXTRA_MB))
        rows.append(("start with 100 rows", f"{few['seconds']:.1f} s", "-", True))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=("steps", "rows", "check"))
    parser.add_argument("--json", type=Path, required=True, help="the result, which parts add to")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rows", type=int, default=ROWS)
    arguments = parser.parse_args()
    result, path = {}, arguments.json
    if path.exists():
        [result] = json.loads(path.read_text())["rows"]
    if arguments.part == "check":
        missed = [row for row in targets(result) if not row[3]]
        for what, measured, target, _ in missed:
            print(f"missed: {what}: {measured}, target {target}")
        sys.exit(bool(missed) or result.keys() < {"steps", "rows"})
    with tempfile.TemporaryDirectory() as name:
        if arguments.part == "steps":
            warm_up = min(WARM_UP, arguments.steps // 2)
            result["steps"] = measure_steps(Path(name), arguments.steps, warm_up)
        else:
            result["rows"] = measure_rows(Path(name), arguments.rows)
    header = provenance.header(torch.device("cpu"))
    text = page(header, COLUMNS, [row[:3] for row in targets(result)])
    print(text)
    provenance.save(path, header, [result], f"# Load\n\n{text}")


if __name__ == "__main__":
    main()
