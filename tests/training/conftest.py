"""Makes the helper modules of this folder importable by its tests, and a world of one rank."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="module")
def world():
    """This process as the only rank of a process group."""
    from laser_fast.training.distributed import open_world

    with open_world() as world:
        yield world
