"""The process group of a run: one rank per device under torchrun, or a single process."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from laser_fast.config_errors import REPORTED, ConfigError, RunError, first_line, reading
from laser_fast.stopping import POLL_S, StopRun, listening

if TYPE_CHECKING:  # ranks are made where pydantic is not installed
    from laser_fast.config import MeasureConfig
    from laser_fast.config_sft import SftConfig

Item = TypeVar("Item")

# A thread that is busy for longer is stuck, and may not keep a failed process alive.
_GLOO_DEADLINE_S = 5.0
# Nor may a collective of others that a failed rank will never join.
_TEARDOWN_S = 10.0
_STOP, _ERROR, _STAGE = "laser/stop", "laser/error", "laser/stage/"  # keys of the store


@dataclass(frozen=True, slots=True)
class World:
    """This process among the ranks of the run."""

    rank: int
    size: int
    device: torch.device
    store: dist.Store = field(default_factory=dist.HashStore, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks."""
        tensor = tensor.to(self.device)
        dist.all_reduce(tensor)
        return tensor

    def max(self, value: int) -> int:
        """Maximum over all ranks."""
        tensor = torch.tensor(value)  # over gloo: rollouts may keep a rank waiting for long
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def gather(self, items: list[Item]) -> list[Item]:
        """The lists of all ranks joined in rank order; items are pickled."""
        gathered: list[list[Item]] = [[] for _ in range(self.size)]
        dist.all_gather_object(gathered, items)
        return [item for part in gathered for item in part]

    def gather_on_main(self, items: list[Item]) -> list[Item]:
        """The lists of all ranks joined in rank order on rank 0, and nothing elsewhere."""
        gathered: list[list[Item]] | None = [[] for _ in range(self.size)] if self.is_main else None
        dist.gather_object(items, gathered)
        return [item for part in gathered or () for item in part]

    def on_main(self, function: Callable[[], Item]) -> Item:
        """What a function returns, or raises, on rank 0, on every rank: one decision for all."""
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = function()
            except Exception as error:
                box[1] = error
        dist.broadcast_object_list(box)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        self.max(0)

    def tell(self, stage: str) -> None:
        """Leave word of how far this rank has come, should others wait for it in vain."""
        self.store.set(f"{_STAGE}{self.rank}", stage)

    @contextmanager
    def agreement(self) -> Iterator[None]:
        """Refuse on every rank what any of them refuses within, where nothing may be collective.

        A rank that went on would wait for the others in its next collective.
        """
        problems: list[str] = []
        try:
            yield
        except ConfigError as error:
            problems = [str(error)]
        if found := self.gather(problems):
            raise ConfigError(found[0])


@contextmanager
def open_world(timeout_s: float = 1800.0) -> Iterator[World]:
    """Join torchrun's process group, or make one of a single rank.

    A wait for another rank ends with an error after `timeout_s`. Of several ranks, the one that
    fails says so before the others can fail for want of it.
    """
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # gloo for pickled objects and CPU-offloaded tensors
    timeout = timedelta(seconds=timeout_s)
    store, rank, size = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    group = dist.PrefixStore("group", store)
    dist.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=timeout)
    world, is_failed = World(rank, size, device, store), True
    try:
        # A rank that refuses its input at once would cut off another that is still connecting.
        world.barrier()
        yield world
        # And a rank that is done would close the connections of another that still computes.
        world.barrier()
        is_failed = False
    except Exception as error:
        if size > 1:
            _report(error, world)
        raise
    finally:
        if is_failed:
            closing = threading.Thread(target=dist.destroy_process_group, daemon=True)
            closing.start()
            closing.join(_TEARDOWN_S)
        else:
            dist.destroy_process_group()
        _await_gloo()


def _report(error: Exception, world: World) -> None:
    """Print the error of a rank, whole if it is the first, and not if another has said the same."""
    is_sentence = isinstance(error, ConfigError | RunError)
    said = str(error) if is_sentence else "".join(traceback.format_exception(error))
    is_first = is_new = True
    with suppress(Exception):  # the store may be gone with its rank
        is_first = world.store.compare_set(_ERROR, "", said).decode() == said
        is_new = world.store.add(_ERROR + said, 1) == 1
        keys = {rank: f"{_STAGE}{rank}" for rank in range(world.size)}
        told = {r: world.store.get(k).decode() for r, k in keys.items() if world.store.check([k])}
        said += "" if is_sentence else f"stages of the ranks: {told}\n"
    if not is_first:
        said = f"{type(error).__name__}: {first_line(error)}"
    error.add_note(REPORTED)
    if is_new:
        print(f"error: rank {world.rank}: {said}", file=sys.stderr, flush=True)


def _await_gloo() -> None:
    """Wait until gloo's threads rest, where the system shows them (Linux).

    A group that something holds, as the mesh of a sharded model does, keeps its threads. One that
    frees tensors on a busy machine may come for the interpreter's lock when the interpreter is
    gone, and then aborts the process: "terminate called without an active exception".
    """
    deadline = time.monotonic() + _GLOO_DEADLINE_S
    while any(map(_is_busy_in_gloo, Path("/proc/self/task").glob("*/stat"))):
        if time.monotonic() > deadline:
            return
        time.sleep(0.001)


def _is_busy_in_gloo(thread: Path) -> bool:
    try:
        # Reading gives up the interpreter's lock: a thread that waits for it is awake meanwhile.
        _, name, state = thread.read_text().replace("(", ")").split(")", 2)
    except OSError:
        return False  # the thread has ended
    return name == "pt_gloo_runloop" and state.split()[0] != "S"


def check_world(config: MeasureConfig | SftConfig, size: int) -> None:
    """Refuse a number of ranks over which engines, replicas or a step's prompts do not divide."""
    rollout = getattr(config, "rollout", None)  # a supervised phase has none
    for key, parts in (
        ("rollout.tensor_parallel", rollout.tensor_parallel if rollout else 1),
        ("model.replicas", config.model.replicas),
    ):
        if size % parts:
            raise ConfigError(
                f"{key} = {parts} does not divide the {size} ranks of the run; set it to 1 or "
                "start another number of ranks"
            )
    prompts = getattr(config.data, "prompts_per_step", 0)  # a measurement has no steps
    if prompts % size:
        raise ConfigError(
            f"data.prompts_per_step = {prompts} does not divide over {size} ranks; choose a "
            f"multiple of {size}"
        )


@contextmanager
def stop_at_sigterm(world: World) -> Iterator[Callable[[], None]]:
    """A check that raises `StopRun` on every rank once any has received a SIGTERM. Collective.

    Within, `stopping.poll` does so on a rank by itself, at most POLL_S after the signal of another.
    """
    received: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    looked = time.monotonic()

    def is_asked() -> bool:
        nonlocal looked
        if received:
            world.store.set(_STOP, "")
        elif time.monotonic() > looked + POLL_S:
            looked = time.monotonic()
            received.extend([signal.SIGTERM] * world.store.check([_STOP]))
        return bool(received)

    def check() -> None:
        if world.max(int(is_asked())):
            raise StopRun

    try:
        with listening(is_asked):
            yield check
    finally:
        signal.signal(signal.SIGTERM, previous)


def check_shared(folder: Path, world: World) -> None:
    """Refuse a folder that rank 0 cannot write or others do not see. Collective; leaves nothing."""
    name = f".shared-{uuid.uuid4().hex}" if world.is_main else ""

    def write() -> Path:
        with reading(f"output_dir {str(folder)!r:.200} cannot be written"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        return folder / name

    probe = world.on_main(write)
    this = f"rank {world.rank} on {socket.gethostname()}"
    blind = world.gather([] if probe.exists() else [this])
    if world.is_main:
        probe.unlink()
        with suppress(OSError):  # it holds a run
            folder.rmdir()
    if blind:
        raise ConfigError(
            f"output_dir {folder} is not shared: {blind[0]} does not see what rank 0 writes there; "
            "put it on a file system that all nodes share"
        )
