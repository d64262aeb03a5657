"""Makes tests/helpers importable, and what its policy_ranks.py finds on 1, 2 and 4 ranks."""

import subprocess
import sys
from pathlib import Path

import pytest

HELPERS = Path(__file__).parents[1] / "helpers"
sys.path.append(str(HELPERS))


@pytest.fixture(scope="module")
def world():
    """This process as the only rank of a process group."""
    from laser_fast.training.distributed import open_world

    with open_world() as world:
        yield world


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory):
    """A folder with the tiny models of policy_ranks.py."""
    import policy_ranks

    folder = tmp_path_factory.mktemp("models")
    policy_ranks.save_models(folder)
    return folder


@pytest.fixture(scope="session")
def ranks_folder(model_folders, tmp_path_factory):
    """What policy_ranks.py wrote."""
    out = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, HELPERS / "policy_ranks.py", model_folders, out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def one_rank(ranks_folder):
    return load_ranks(ranks_folder, 1)


@pytest.fixture(scope="session")
def two_ranks(ranks_folder):
    return load_ranks(ranks_folder, 2)


@pytest.fixture(scope="session")
def four_ranks(ranks_folder):
    return load_ranks(ranks_folder, 4)


def load_ranks(folder, size):
    import torch

    return torch.load(folder / f"world-{size}.pt", weights_only=False)
