"""LaSeR as real software: a lean GRPO trainer whose model learns to grade its own answers.

Importing this package imports neither torch, transformers nor vLLM.
"""

from collections.abc import Iterator
from contextlib import contextmanager

__version__ = "0.1.0"

TRAIN_PACKAGES = tuple(
    "datasets huggingface_hub jinja2 math_verify matplotlib numpy pydantic rich safetensors "
    "tensorboard tokenizers tomli_w transformers typer".split()
)
"""What the extra [train] adds to torch and triton, as they are imported."""


class MissingExtraError(ModuleNotFoundError):
    """A package of an extra that is not installed; the message is one sentence for the user."""


@contextmanager
def needs_train() -> Iterator[None]:
    """Say which extra brings a package of the trainer, where the import of one fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in TRAIN_PACKAGES:
            raise
        raise MissingExtraError(
            f"laser-fast needs {error.name} for this, which comes with the trainer's packages; "
            "pip install 'laser-fast[train]'",
            name=error.name,
        ) from None


@contextmanager
def needs_host(package: str, install: str) -> Iterator[None]:
    """Say how to install the trainer of an integration, where its import fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        message = f"laser-fast needs {package} for this; {install}"
        raise MissingExtraError(message, name=package) from None
