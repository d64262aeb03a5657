"""impl="cuda": csrc/ built on first use, and the launches of its kernels for Hopper.

Nothing is compiled at import, nor by impl="auto". PyTorch's build tool compiles the sources once
(about half a minute) and keeps the library in its cache, ~/.cache/torch_extensions; it uses the
stable ABI of PyTorch 2.11, so that later versions load it as well. Needs nvcc 12.5 or newer.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ._fused import Fused
from ._maths import Head
from ._ops import NAMESPACE

NAME = f"{NAMESPACE}_cuda"
SOURCES = ("linear_logprob.cu", "last_token.cu")
# Only sm_90a has wgmma and setmaxnreg. USE_CUDA declares the current stream.
FLAGS = (
    "-O3",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    f"-DLIBRARY={NAME}",
)
# The largest N of the wgmma in last_token.cu.
MAX_FEW_ROWS = 128
# Columns of a partial; csrc/ checks them.
BLOCK_V = {"many": 192, "few": 256}


class Cuda(Fused):
    """The backend of impl="cuda"; `ops` is the namespace of the loaded library."""

    def __init__(self, ops: ModuleType) -> None:
        self.ops = ops

    def block_v(self, head: Head, few: bool) -> int:
        """Return how many columns a partial covers."""
        return BLOCK_V["few" if _fits_few(head, few) else "many"]

    def is_few(self, head: Head, few: bool) -> bool:
        """Return whether rows that the caller calls few fit the kernel for them."""
        return _fits_few(head, few)

    def launch_statistics(
        self,
        head: Head,
        kept: Tensor | None,
        flags: Tensor | None,
        anchor: Tensor,
        partials: Tensor,
        few: bool,
        with_entropy: bool = True,
        with_maximum: bool = True,
    ) -> None:
        """Write all partials, and the kept logits if wanted, of the rows that are flagged.

        Sums and maxima that nobody asks for are formed all the same: the epilogue runs while the
        tensor cores work for the other group, so that leaving them out would gain nothing.
        """
        launch = self.ops.statistics_few if _fits_few(head, few) else self.ops.statistics
        launch(*head[:2], kept, flags, anchor, head.inv_temperature, head.softcap, partials)

    def launch_dlogits(self, head: Head, out: Tensor, *rows: Tensor | None) -> None:
        """Write dlogits [n, V] from anchor, log_total, constant, slope (or None) and target [n]."""
        self.ops.dlogits(*head[:2], out, *head[2:], *rows)


def _fits_few(head: Head, few: bool) -> bool:
    return few and len(head.hidden_states) <= MAX_FEW_ROWS


def source_folder() -> Path:
    """Return the folder of the sources: in the package, or at the root of a checkout."""
    here = Path(__file__).resolve().parent
    folders = (here / "csrc", here.parents[1] / "csrc")
    for folder in folders:
        if all((folder / name).is_file() for name in SOURCES):
            return folder
    raise _failure(
        f"its sources are in neither {folders[0]} nor {folders[1]}; pip install laser-fast has them"
    )


def missing() -> str:
    """Return what the build lacks here and how to get it; empty if nothing."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} was built without CUDA; install a CUDA build"
    try:
        from torch.utils import cpp_extension
    except ImportError:
        return "setuptools is missing; pip install setuptools"
    # PyTorch takes /usr/local/cuda as it is, which may hold only a runtime.
    home = cpp_extension.CUDA_HOME
    if home is None or not Path(home, "bin", "nvcc").is_file():
        version = torch.version.cuda
        return f"nvcc was not found; install the CUDA {version} toolkit, or set CUDA_HOME"
    if not cpp_extension.is_ninja_available():
        return "ninja is missing; pip install ninja"
    return ""


@cache
def load() -> Cuda:
    """Build the extension unless the cache has it, load it, and return what impl="cuda" offers.

    Raises:
        RuntimeError: one sentence that says what is missing and what to do.
    """
    if what := missing():
        raise _failure(what)
    from torch.utils import cpp_extension  # wants setuptools

    folder = source_folder()
    try:
        cpp_extension.load(
            NAME,
            [str(folder / name) for name in SOURCES],
            extra_cuda_cflags=list(FLAGS),
            is_python_module=False,
        )
    except (RuntimeError, OSError) as error:
        text = str(error.__cause__ or error) if isinstance(error, OSError) else str(error)
        lines = [line for line in text.splitlines() if "error" in line.lower()]
        # The first is PyTorch's "Error building extension"; the compiler's own says more.
        reason = (lines[:2] or text.splitlines() or ["no reason given"])[-1]
        raise _failure(
            f"{folder} cannot be built and loaded with {cpp_extension.CUDA_HOME}/bin/nvcc and "
            f"PyTorch {torch.__version__} ({reason.strip()[:300]}); install nvcc 12.5 or newer, "
            f"the headers of its toolkit, and a C++ compiler that it supports"
        ) from error
    return Cuda(getattr(torch.ops, NAME))


def _failure(what: str) -> RuntimeError:
    return RuntimeError(
        f"impl='cuda' builds a CUDA C++ extension, but {what}; impl='triton' computes the same"
    )
