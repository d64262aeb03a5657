"""What every test relies on: kernels interpreted without a GPU, a fixed seed, honest skips."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Ranks share few cores, and threads that spin while they wait for each other cost minutes. Before
# torch is imported, and for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
# Unbuffered, ranks that share a pipe write a line and its end apart, and mix them.
os.environ.pop("PYTHONUNBUFFERED", None)
import torch  # noqa: E402

torch.set_num_threads(1)

# Triton decides when @triton.jit runs, so this must come before any kernel is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

HELPERS = Path(__file__).parent / "helpers"  # on the path, see pyproject.toml
NEEDS = {
    "gpu": (torch.cuda.is_available(), "needs an NVIDIA GPU"),
    "vllm": (importlib.util.find_spec("vllm") is not None, "needs vLLM"),
    "trl": (importlib.util.find_spec("trl") is not None, "needs TRL"),
}


def pytest_collection_modifyitems(config, items):
    if "faults" not in config.option.markexpr:  # minutes, which have a command of their own
        config.hook.pytest_deselected(items=[i for i in items if i.get_closest_marker("faults")])
        items[:] = [item for item in items if not item.get_closest_marker("faults")]
    # The longest test first: of several workers, none is left alone with it.
    items.sort(key=lambda item: item.path.name != "test_minimal.py")
    for item in items:
        for marker, (is_present, reason) in NEEDS.items():
            if item.get_closest_marker(marker) and not is_present:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def world():
    """This process as the only rank of a process group."""
    from laser_fast.model.distributed import open_world

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
    return torch.load(folder / f"world-{size}.pt", weights_only=False)
