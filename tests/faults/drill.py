"""Faults in a real run, one after the other: it is hit, the command is repeated, it is hit again.

`Drill.run` takes rows of the table (tests/faults/rows.py). All rows of a kind share one run, which
is `torchrun` with the small model of tests/helpers/small_runs.py. Row k owns the steps 2k and
2k + 1: its fault strikes in the second one or in the checkpoint after it, and both, with that
checkpoint, are compared in the end with those of a run that nothing disturbed.
"""

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from laser_fast.training.checkpoint import list_checkpoints
from tests.helpers import small_runs

from .child import STRUCK

ROOT = Path(__file__).parents[2]
EVERY = 2  # steps from one checkpoint to the next, and from one row to the next
DEADLINE_S = 540.0  # of one command, on a machine that is busy besides
GRACE_S = 15.0  # for what a killed run leaves behind, such as graders that wait for its pipe
MARK = "LASER_DRILL"  # in the environment of every process of a run: its folder


@dataclass(frozen=True)
class Row:
    """A fault, where it strikes, and what has to come of it."""

    fault: str
    place: str
    says: str = ""  # the regular expression of what the disturbed run prints
    inject: Mapping[str, Any] = field(default_factory=dict)  # see tests/faults/child.py
    damage: Callable[[Path], None] | None = None  # of the newest checkpoint, between two commands
    repair: Callable[[Path], None] | None = None  # what the run has said is to be done with it
    goes_on: bool = False  # nothing has to be repeated
    steps_lost: int = 0  # by design, such as one whose loss is no number: only as the last row
    overrides: tuple[str, ...] = ()  # of the disturbed command only
    grace_s: int = 20  # of torchrun for its ranks
    kind: str = "hf"  # the sampler: hf, vllm in process, or server

    @property
    def name(self) -> str:
        return f"{self.fault}: {self.place}"


@dataclass
class Outcome:
    """What came of a fault; `faults` says what should not have."""

    row: Row
    said: str = ""
    steps_repeated: int = 0
    steps_lost: int = 0
    bytes_lost: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Command:
    """A command that has ended."""

    code: int
    output: str
    left: list[str]  # processes that it left behind


class Drill:
    """Runs of the drill, in a folder; one that was killed goes on there with the same rows."""

    def __init__(self, folder: Path, say: Callable[[str], None] = print) -> None:
        self.folder, self.say = folder, say
        self.model = folder / "model"
        if not self.model.exists():
            small_runs.make_model(self.model)

    def run(self, rows: Sequence[Row]) -> list[Outcome]:
        """Let every fault strike; what the product does is never raised."""
        kinds = list(dict.fromkeys(row.kind for row in rows))
        return [o for kind in kinds for o in self._run([r for r in rows if r.kind == kind], kind)]

    def _run(self, rows: list[Row], kind: str) -> list[Outcome]:
        base = self.folder / f"{kind}-{num_steps(rows)}"  # other rows do not go on there
        quiet, run = base / "quiet" / "run", base / "hit" / "run"
        outcomes = [Outcome(row) for row in rows]
        with ExitStack() as stack:
            server = Server(self.model, run.parent) if kind == "server" else None
            if server is not None:
                stack.callback(server.stop)

            def launch(folder: Path, **options: Any) -> Command:
                url = server.running() if server is not None else ""
                config = self._config(folder, kind, num_steps(rows), url)
                return launch_ranks(config, ranks=1 if kind == "vllm" else 2, **options)

            if not (quiet / "summary.json").exists():
                undisturbed = launch(quiet.parent)
                assert undisturbed.code == 0, undisturbed.output
                self.say(f"{kind}: undisturbed")
            notes = base / "outcomes.json"
            struck = json.loads(notes.read_text()) if notes.exists() else {}
            pending: list[tuple[int, Outcome]] = []  # one command takes several that it survives
            for number, outcome in enumerate(outcomes):
                if outcome.row.name in struck:
                    vars(outcome).update(struck[outcome.row.name])
                    continue
                pending.append((EVERY * number + 1, outcome))
                if outcome.row.goes_on and number + 1 < len(outcomes):
                    continue
                self._strike(pending, run, launch)
                for _, each in pending:
                    struck[each.row.name] = {k: v for k, v in vars(each).items() if k != "row"}
                notes.write_text(json.dumps(struck))
                pending = []
            if not outcomes[-1].row.goes_on:
                last = launch(run.parent)
                if last.code:
                    outcomes[-1].faults.append(f"the repeated command ends with {last.code}")
                    self.say(last.output[-4000:])
        for number, outcome in enumerate(outcomes):
            is_last = number + 1 == len(outcomes)
            steps = range(EVERY * number, EVERY * (number + 1))
            if is_last and not outcome.row.steps_lost:
                steps = range(steps.start, num_steps(rows))
            compare(outcome, run, quiet, steps, is_last=is_last)
            self.say(f"{outcome.row.name}: {'; '.join(outcome.faults) or 'as it has to be'}")
        return outcomes

    def _strike(
        self, pending: list[tuple[int, Outcome]], run: Path, launch: Callable[..., Command]
    ) -> None:
        """One command that several faults strike, of which the last may end it."""
        started = time.monotonic()
        outcome = pending[-1][1]
        row = outcome.row
        if row.damage is not None:
            if not run.exists():  # the first row: the checkpoints after steps 2 and 4 are there
                shutil.copytree(run.parents[1] / "quiet" / "run", run)
                (run / "summary.json").unlink()
                for checkpoint in list_checkpoints(run)[2:]:
                    shutil.rmtree(checkpoint)
            whole = run.parent / "whole"  # each such row takes one away
            if len(list_checkpoints(run)) < 2 and whole.exists():
                shutil.copytree(whole, run / "checkpoints", dirs_exist_ok=True)
            newest = list_checkpoints(run)[-1]
            shutil.copytree(newest, whole / newest.name, dirs_exist_ok=True)
            row.damage(newest)
        ended = launch(
            run.parent,
            inject=[{**each.row.inject, "step": step} for step, each in pending if each.row.inject],
            overrides=[option for _, each in pending for option in each.row.overrides],
            grace_s=row.grace_s,
        )
        if (ended.code == 0) != row.goes_on:
            outcome.faults.append(f"exit code {ended.code}")
        notes = run.with_name(STRUCK)
        struck = notes.read_text().splitlines() if notes.exists() else []
        for (
            step,
            each,
        ) in pending:  # a run that ends before, for any reason, looks like a killed one
            if each.row.inject and f"{each.row.inject['place']} {step}" not in struck:
                each.faults.append("the fault did not strike")
            if not (said := re.search(each.row.says, ended.output)):
                each.faults.append(f"it does not say {each.row.says!r}")
            each.said = said[0] if said else ""
        outcome.faults += [f"left behind: {each}" for each in ended.left]
        if row.repair is not None:
            row.repair(list_checkpoints(run)[-1])
        if not row.goes_on:
            steps = [step for step, _ in map(by_step, list_checkpoints(run))]
            logged = read_lines(run / "metrics.jsonl")
            outcome.steps_repeated = max(0, len(logged) - max(steps, default=0))
        for _, each in pending:
            each.seconds = (time.monotonic() - started) / len(pending)
        self.say(f"{row.name}: {outcome.seconds:.0f} s, {outcome.said or 'nothing said'}")
        if outcome.faults:
            self.say(ended.output[-6000:])

    def _config(self, folder: Path, kind: str, steps: int, url: str) -> Path:
        """Write the configuration of a run."""
        sections: dict[str, Any] = {
            "reward": {"kind": "tests.faults.graders:reward"},
            "optim": {"steps": steps},
            "checkpoint": {"every": EVERY, "keep": 1000},
        }
        if kind == "server":
            sections["rollout"] = {"engine": "vllm_server", "server_url": url}
        if kind == "vllm":
            sections["rollout"] = {"engine": "vllm"}
        return small_runs.write_config(self.model, folder, **sections)


def num_steps(rows: Sequence[Row]) -> int:
    """Those of the rows, and some after them, since even a finished run is no answer to SIGTERM."""
    return EVERY * (len(rows) + 1)


def by_step(checkpoint: Path) -> tuple[int, Path]:
    return int(checkpoint.name.removeprefix("step-")), checkpoint


def launch_ranks(
    config: Path,
    *,
    ranks: int,
    inject: Sequence[Mapping[str, Any]] = (),
    overrides: Sequence[str] = (),
    grace_s: int = 20,
) -> Command:
    """Start torchrun and wait for its end, and for that of all that it has started."""
    folder = config.parent
    variables = {
        "HF_DATASETS_CACHE": str(folder.parent / "datasets"),
        "LASER_FAULTS": json.dumps(list(inject)),
        MARK: str(folder),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "--shutdown-timeout", str(grace_s)]
    command += ["-m", "tests.faults.child", "train", str(config), *overrides, "--resume=auto"]
    with (folder / "screen.txt").open("w+") as screen:
        # Through a pipe: the screen of a run whose files may not grow is none of them.
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=screen) as pipe:
            process = start(command, pipe.stdin, variables)
            try:
                process.wait(DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            left = end_what_is_left(folder)
        screen.seek(0)
        return Command(process.returncode, screen.read(), left)


def start(command: list[str], screen: Any, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | variables,
        stdout=screen,
        stderr=screen,
        start_new_session=True,
    )


def end_what_is_left(folder: Path) -> list[str]:
    """End the processes of a run that are left behind for longer than the grace; their commands."""
    deadline = time.monotonic() + GRACE_S
    while (alive := processes_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    return list(alive.values())


def processes_of(folder: Path) -> dict[int, str]:
    """The processes of a run, by the mark in their environment: their commands."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={folder}\0".encode() in (process / "environ").read_bytes():
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue  # it has ended
    return found


class Server:
    """A server of tests/faults/server.py, which is started again when it has died."""

    def __init__(self, model: Path, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.screen = folder / "server.txt"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.command = [sys.executable, "-m", "tests.faults.server"]
        self.command += [str(model), str(self.port), str(folder)]
        self.process: subprocess.Popen[bytes] | None = None

    def running(self) -> str:
        """Its URL, once it answers."""
        if self.process is None or self.process.poll() is not None:
            with self.screen.open("a") as screen:
                self.process = start(self.command, screen, {})
        deadline = time.monotonic() + DEADLINE_S
        while not is_listening(self.port):
            assert self.process.poll() is None and time.monotonic() < deadline, "no server"
            time.sleep(0.1)
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def compare(outcome: Outcome, run: Path, quiet: Path, steps: range, *, is_last: bool) -> None:
    """Count what the undisturbed run has of a row's steps and this one lacks, or has otherwise."""
    evaluated = range(steps.start, steps.stop + is_last)  # the last one comes after all steps
    sizes = [
        lost(read(run), read(quiet), of)
        for read, of in (
            (small_runs.read_metrics, steps),
            (lambda folder: read_lines(folder / "samples.jsonl"), steps),
            (lambda folder: read_lines(folder / "evaluations.jsonl"), evaluated),
        )
    ]
    outcome.steps_lost = len(sizes[0])
    outcome.bytes_lost = sum(map(sum, sizes))
    for step, checkpoint in map(by_step, list_checkpoints(quiet)):
        for shard in checkpoint.glob("*.distcp") if step - 1 in steps else ():
            mine, theirs = run / shard.relative_to(quiet), shard.read_bytes()
            outcome.bytes_lost += different(mine.read_bytes() if mine.exists() else b"", theirs)
    if is_last and not (run / "summary.json").exists():
        outcome.faults.append("there is no summary")
    if is_last and (left := list((run / "checkpoints").glob(".*"))):
        outcome.faults.append(f"{left[0].name} is left")
    if outcome.steps_lost != outcome.row.steps_lost:
        outcome.faults.append(f"{outcome.steps_lost} steps lost")
    if outcome.bytes_lost and not outcome.row.steps_lost:
        outcome.faults.append(f"{outcome.bytes_lost} bytes lost")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return small_runs.read_lines(path) if path.exists() else []


def lost(
    found: list[dict[str, Any]], wanted: list[dict[str, Any]], steps: Sequence[int]
) -> list[int]:
    """Bytes of each wanted record of these steps that is not found in its place."""
    mine, theirs = ([line for line in lines if line["step"] in steps] for lines in (found, wanted))
    return [
        len(json.dumps(max(pair, key=len)))
        for pair in itertools.zip_longest(mine, theirs, fillvalue={})
        if pair[0] != pair[1]
    ]


def different(found: bytes, wanted: bytes) -> int:
    """Bytes in which two files differ."""
    pairs = itertools.zip_longest(found, wanted)
    return 0 if found == wanted else sum(one != other for one, other in pairs)
