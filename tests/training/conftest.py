"""Makes the helper modules of this folder importable by its tests, and worlds of 1, 2, 4 ranks."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
sys.path.append(str(FOLDER))


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
def ranks_folder(tmp_path_factory):
    """Where policy_ranks.py writes."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="session")
def one_rank(model_folders, ranks_folder):
    """What policy_ranks.py finds on one rank."""
    return run_ranks(1, model_folders, ranks_folder)


@pytest.fixture(scope="session")
def two_ranks(model_folders, ranks_folder):
    """What policy_ranks.py finds on two ranks."""
    return run_ranks(2, model_folders, ranks_folder)


@pytest.fixture(scope="session")
def four_ranks(model_folders, ranks_folder):
    """What policy_ranks.py finds on four ranks."""
    return run_ranks(4, model_folders, ranks_folder)


def run_ranks(size, models, out):
    """Run policy_ranks.py on so many gloo ranks and load its result."""
    import torch

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = str(FOLDER / "policy_ranks.py")
    done = subprocess.run(
        [*torchrun, f"--nproc-per-node={size}", script, str(models), str(out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(out / f"world-{size}.pt", weights_only=False)
