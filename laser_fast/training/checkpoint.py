"""Save and load the whole state of a run with torch.distributed.checkpoint.

A checkpoint is a folder `checkpoints/step-000050` with one shard file per rank, `trainer.json`
(step, reference log-prob, gradient-cap state, digests of the data) and the resolved `config.toml`.
It is written under a temporary name and renamed when complete, so a folder of that name is always
whole; `SHA256SUMS`, which `sha256sum -c` reads, too, tells whether it still is. It can be loaded on
another number of ranks. Reading one runs no code: its pickles may hold plain values only.
"""

import copy
import errno
import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from laser_fast import needs_train
from laser_fast.config import Config, ConfigError, dump_config
from laser_fast.config_errors import RunError, first_line
from laser_fast.data.curriculum import Progress
from laser_fast.files import partial_name
from laser_fast.log.run_folder import AnyConfig, RunFolder, check_resume, open_run_folder, steps_in
from laser_fast.model.distributed import World, check_shared, check_world
from laser_fast.model.policy import Policy
from laser_fast.training.background import BackgroundWriter
from laser_fast.training.best import standing

with needs_train():
    from pydantic import TypeAdapter

# Everything that a `.metadata` of torch 2.11 to 2.13 is made of, dtypes apart.
_METADATA = {
    "torch.distributed.checkpoint.metadata": "Metadata MetadataIndex StorageMeta TensorProperties "
    "TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata _MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch": "Size",
    "torch.serialization": "_get_layout",
    "pathlib": "PosixPath",
    "pathlib._local": "PosixPath",
}
# What is loaded has the names of the policy's own state, frozen ones left out.
_OWN_KEYS = StateDictOptions(strict=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerState:
    """What trainer.json holds; older checkpoints, and those of a supervised phase, hold less."""

    step: int
    ref_logprob: float | None = None
    cap: dict[str, float | None] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    bad_steps: int = 0
    must_evaluate: bool = False
    curriculum: Progress | None = None


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return list(steps_in(run / "checkpoints").values())


def newest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint, if there is one."""
    return next(reversed(list_checkpoints(run)), None)


def latest_checkpoint(run: Path) -> Path:
    """The same; a ConfigError says that there is none."""
    if found := newest_checkpoint(run):
        return found
    raise ConfigError(f"{run / 'checkpoints'}: no complete checkpoint to resume from")


def check_run_folder(config: AnyConfig, world: World, *, resume: bool | Literal["auto"]) -> bool:
    """Refuse a run folder or a number of ranks that does not fit; leaves nothing behind.

    Returns whether a run that is there goes on, which "auto" finds out, also of one that had no
    time for a checkpoint and begins again. Collective.
    """
    folder = Path(config.output_dir)

    def look() -> bool:
        resumes = RunFolder(folder).config.is_file() if resume == "auto" else resume
        open_run_folder(config, resume=resumes)
        found = latest_checkpoint(folder) if resume is True else newest_checkpoint(folder)
        if resumes and found:
            check_resume(found / "config.toml", config)
        return resumes

    resumes = world.on_main(look)
    check_world(config, world.size)
    check_shared(folder, world)
    return resumes


def save_checkpoint(
    config: AnyConfig,
    step: int,
    *,
    policy: Policy,
    optimizer: Optimizer,
    state: dict,
    world: World,
    writer: BackgroundWriter | None = None,
) -> Path:
    """Write a checkpoint, then delete all but the newest `checkpoint.keep` and the best.

    With a `writer` it is there when that has settled. Collective.
    """
    if writer is not None:
        writer.settle(wait=True)
    final = Path(config.output_dir) / "checkpoints" / f"step-{step:06d}"
    if world.on_main(final.exists):  # the last step may already be saved by its own schedule
        return final
    partial = partial_name(final)

    def prepare() -> None:
        # By a run that was killed.
        for left in final.parent.glob(partial_name(Path("step-*")).name):
            shutil.rmtree(left)
        partial.mkdir(parents=True)

    def finish(metadata: Metadata, shards: list[str]) -> None:
        _check_shards(partial, metadata)
        (partial / "trainer.json").write_text(json.dumps({"step": step, **state}))
        (partial / "config.toml").write_text(dump_config(config))
        small = [partial / name for name in (".metadata", "trainer.json", "config.toml")]
        (partial / "SHA256SUMS").write_text("".join(_sums(small) + shards))
        partial.rename(final)
        best = standing(config).step if isinstance(config, Config) else None
        for old, path in list(steps_in(final.parent).items())[: -config.checkpoint.keep]:
            if old != best:
                shutil.rmtree(path.rename(partial_name(path)))  # its name says: it is whole

    def write(state: dict[str, Any], group: ProcessGroup | None) -> tuple[Metadata, list[str]]:
        metadata = dcp.save(state, checkpoint_id=partial, process_group=group)
        return metadata, _sums(partial.glob(f"__{world.rank}_*"))

    def complete(written: Callable[[], tuple[Metadata, list[str]]]) -> None:
        with writing(final):
            metadata, sums = written()
            shards = world.gather_on_main(sums)
            world.on_main(lambda: finish(metadata, shards))

    # A stop may leave gradients without their update, beside which torch makes no missing moments.
    optimizer.zero_grad(set_to_none=True)
    with writing(final):
        world.on_main(prepare)
    sharded = _state(policy, optimizer)
    if writer is not None:
        writer.start(sharded, write, complete)
    else:
        complete(lambda: write(sharded, None))
    return final


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """End a run whose disk is full in one sentence."""
    try:
        yield
    except (CheckpointException, OSError) as error:
        if getattr(error, "errno", errno.ENOSPC) not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise RunError(f"{path} cannot be written: {_reason(error)}; make room, resume") from error


def _sums(files: Iterable[Path]) -> list[str]:
    """Lines of SHA256SUMS (1.4 GB/s on two CPU cores); what they tell of is on the disk then."""
    found = []
    for path in files:
        with path.open("rb") as file:
            found.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
            os.fsync(file.fileno())
    return found


def _verify(path: Path, part: slice) -> None:
    """Refuse files that are not as they were written; older checkpoints do not say."""
    sums = path / "SHA256SUMS"
    for line in sums.read_text().splitlines(keepends=True)[part] if sums.is_file() else ():
        if _sums([path / line[66:-1]]) != [line]:  # behind 64 digits and two blanks
            raise ConfigError(f"{line[66:-1]} is not as it was written")


def _check_shards(folder: Path, metadata: Metadata) -> None:
    """Refuse a checkpoint of which this node does not see every part, whole."""
    ends: dict[str, int] = {}
    for part in metadata.storage_data.values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    sizes = {name: (folder / name).stat().st_size for name in ends if (folder / name).is_file()}
    if missing := sorted(name for name, end in ends.items() if sizes.get(name, 0) < end):
        raise RunError(
            f"{folder}: rank 0 does not see what other ranks wrote, {', '.join(missing[:4])}; put "
            "output_dir on a file system that all nodes share"
        )


def load_checkpoint(path: Path, *, policy: Policy, optimizer: Optimizer) -> TrainerState:
    """Restore model and optimizer in place and return the trainer's state. Collective."""
    state = _state(policy, optimizer)
    own = copy.deepcopy(state["optimizer"]["param_groups"])  # fused or not, as it was made
    _read_state(path, state)
    state["optimizer"]["param_groups"] = own
    parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
    set_state_dict(policy, optimizer, **parts, options=_OWN_KEYS)
    return trainer_state(path)


def load_trained(path: Path, policy: Policy) -> None:
    """Restore what `save_checkpoint` kept of the policy. Collective."""
    state = {"model": _trained(policy, get_model_state_dict(policy))}
    _read_state(path, state)
    set_model_state_dict(policy, state["model"], options=_OWN_KEYS)


def _trained(policy: Policy, state: dict[str, Any]) -> dict[str, Any]:
    """The part of a state that training changes: all of it, or with LoRA the adapters."""
    named = policy.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in named if not parameter.requires_grad}
    return {name: value for name, value in state.items() if name not in frozen}


def trainer_state(path: Path) -> TrainerState:
    """What `save_checkpoint` was given as such, and the step."""
    with _reading(path):
        _verify(path, slice(3))  # the small files, which come first
        return TypeAdapter(TrainerState).validate_json((path / "trainer.json").read_text())


def check_digests(checkpoint: Path, digests: dict[str, str]) -> None:
    """Refuse to go on with other rows or frozen weights than a checkpoint's run had.

    Older checkpoints do not say.
    """
    saved = trainer_state(checkpoint).digests
    if saved.get("model.path") != digests.get("model.path", saved.get("model.path")):
        raise ConfigError(
            f"{checkpoint} holds adapters alone, and the frozen weights in model.path have changed "
            "since; restore them, or start a new run in another output_dir"
        )
    if changed := [key for key in digests.keys() & saved if saved[key] != digests[key]]:
        raise ConfigError(
            "the run cannot be resumed with other prompts: the rows, tokenizer or chat template of "
            f"{' and '.join(sorted(changed))} have changed since its checkpoint; restore them, or "
            "start a new run in another output_dir"
        )


def _read_state(path: Path, state: dict[str, Any]) -> None:
    """Fill a sharded state in place from a checkpoint; a ConfigError says that it is broken."""
    with _reading(path):
        reader = _Reader(path)
        reader.read_metadata()  # dcp.load would log the traceback of what is wrong with it
        dcp.load(state, storage_reader=reader, planner=_Planner())


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (Exception, CheckpointException) as error:  # a flipped byte in a pickle raises anything
        raise ConfigError(
            f"{path} cannot be read: {_reason(error)}; if it is broken, remove the folder to "
            "continue from the checkpoint before it"
        ) from error


def _reason(error: BaseException) -> str:
    """What the first rank that failed says, without the tracebacks of all."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return first_line(error)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _METADATA.get(module, "").split():
            raise pickle.UnpicklingError(f".metadata names {module}.{name}, which is no part of it")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """Reads `.metadata` without running what its pickle may name; tensors are read so by torch."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Verify this rank's share of the files first; what one finds, torch tells all ranks."""
        share = slice(torch.distributed.get_rank(), None, torch.distributed.get_world_size())
        _verify(Path(self.path), share)
        return super().prepare_local_plan(plan)


class _Planner(dcp.DefaultLoadPlanner):
    """Refuses values other than plain ones, where torch would unpickle anything."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            torch.load(value, weights_only=True)
        except pickle.UnpicklingError:
            name = read_item.storage_index.fqn
            raise pickle.UnpicklingError(f"{name} is no plain value") from None
        value.seek(0)
        super().load_bytes(read_item, value)


def _state(policy: Policy, optimizer: Optimizer) -> dict[str, Any]:
    """Sharded state of model and optimizer; its tensors are theirs. Collective."""
    is_new = not optimizer.state
    model_state, optimizer_state = get_state_dict(policy, optimizer)
    if is_new:
        # torch makes the missing moments by an update of zero gradients, which AdamW counts.
        for state in optimizer.state.values():
            state["step"].zero_()
    return {"model": _trained(policy, model_state), "optimizer": optimizer_state}
