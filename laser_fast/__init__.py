"""LaSeR as real software: a lean GRPO trainer whose model learns to grade its own answers.

Importing this package imports neither torch, transformers nor vLLM.
"""

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager

__version__ = "0.1.0"

TRAIN_PACKAGES = tuple(
    "datasets huggingface_hub jinja2 math_verify matplotlib numpy pydantic rich safetensors "
    "tensorboard tokenizers tomli_w transformers typer".split()
)
"""What the extra [train] adds to torch and triton, as they are imported."""


class MissingExtraError(ModuleNotFoundError):
    """A package of an extra that is not installed; the message is one sentence for the user."""


def needs_train() -> AbstractContextManager[None]:
    """Say which extra brings a package of the trainer, where the import of one fails."""
    advice = ", which comes with the trainer's packages; pip install 'laser-fast[train]'"
    return _needs(TRAIN_PACKAGES, advice)


def needs_host(package: str, install: str) -> AbstractContextManager[None]:
    """Say how to install the trainer of an integration, where its import fails."""
    return _needs((package,), f"; {install}")


@contextmanager
def _needs(packages: Collection[str], advice: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in packages:
            raise
        message = f"laser-fast needs {error.name} for this{advice}"
        raise MissingExtraError(message, name=error.name) from None
