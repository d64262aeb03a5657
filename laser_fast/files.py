"""Files and folders that get their name when they are whole."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def partial_name(path: Path) -> Path:
    """Where something lies, beside its place, until it is whole."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name to write a file or a folder under, which then takes the place of `path`.

    What fails within leaves there what was there. A crash between the two renamings of a folder
    leaves both whole, as `.NAME.old` and `.NAME.partial`. A symbolic link stays one.
    """
    path = path.resolve()
    partial, old = partial_name(path), path.with_name(f".{path.name}.old")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    yield partial
    if path.is_dir():  # a file is replaced at once
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    partial.replace(path)
    shutil.rmtree(old, ignore_errors=True)
