"""The folder for Hugging Face's `kernels`: its files by themselves, and loaded by that package."""

import base64
import hashlib
import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from page_code import code_blocks

import laser_kernels

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"
PAGE = ROOT / "laser_fast" / "integrations" / "README.md"
REPO = "ORG/laser-kernels"


@pytest.fixture(scope="module")
def hub():
    spec = importlib.util.spec_from_file_location("laser_hub", KERNELS / "hub.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder that the page's first command writes."""
    out = tmp_path_factory.mktemp("written")
    command = shlex.split(code_blocks(PAGE, "Hugging Face kernels", "bash")[0].splitlines()[0])
    assert command == ["python", "kernels/hub.py", REPO, "OUT"]
    subprocess.run([sys.executable, *command[1:-1], out], cwd=ROOT, check=True)
    return out


@pytest.fixture(scope="module")
def newer(hub, tmp_path_factory):
    """The folder of a later version, whose log-probs are smaller by one."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("newer")
    shutil.copytree(KERNELS, source, symlinks=True, dirs_exist_ok=True)
    with (source / "laser_kernels" / "_chunked.py").open("a") as file:
        file.write(
            "_statistics = statistics\n"
            "def statistics(*args):\n"
            "    stats = _statistics(*args)\n"
            "    return stats._replace(logprobs=stats.logprobs - 1)\n"
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "HERE", source)
        hub.write(out, REPO)
    return out


def metadata(out, backend):
    return json.loads((out / "build" / f"torch-{backend}" / "metadata.json").read_text())


def test_a_folder_holds_the_package_and_names_what_it_holds(hub, written):
    modules = {path.name for path in Path(laser_kernels.__path__[0]).glob("*.py")}
    for backend in hub.BACKENDS:
        folder, facts = written / "build" / f"torch-{backend}", metadata(written, backend)
        assert {path.name for path in folder.iterdir()} == modules | {"metadata.json"}
        hashes = {
            name: base64.b64encode(hashlib.sha256((folder / name).read_bytes()).digest()).decode()
            for name in modules
        }
        assert facts["digest"] == {"algorithm": "sha256", "files": hashes}
        assert facts["backend"] == {"type": backend}
        assert facts["id"].isidentifier() and f'"{facts["id"]}"' in (folder / "_ops.py").read_text()
    assert metadata(written, "cpu")["id"] != metadata(written, "cuda")["id"]
    card = (written / "README.md").read_text()
    assert card == (written / "build" / "CARD.md").read_text()
    assert card.startswith("---\n") and f'get_kernel("{REPO}", version={hub.VERSION}' in card
    assert card.endswith((KERNELS / "README.md").read_text())


def test_the_name_of_a_build_is_that_of_its_content(hub, written, newer, tmp_path):
    hub.write(tmp_path, REPO)
    assert metadata(tmp_path, "cpu") == metadata(written, "cpu")
    assert metadata(newer, "cpu")["id"] != metadata(written, "cpu")["id"]
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        hub.write(tmp_path, REPO)


def op(module, head):
    compiled = torch.compile(module.linear_logprob, fullgraph=True, backend="aot_eager")
    eager, traced = (f(*head, impl="chunked") for f in (module.linear_logprob, compiled))
    assert torch.equal(eager, traced)
    return eager


def test_kernels_loads_versions_that_do_not_cross(hub, written, newer, make_head, monkeypatch):
    """Beside each other and beside the installed package, whichever was imported first."""
    pytest.importorskip("kernels.load", reason="needs Hugging Face's kernels")
    from kernels import get_loaded_kernels, get_local_kernel

    head = make_head(6, 16, 41, torch.float32)
    expected = laser_kernels.linear_logprob(*head, impl="chunked")
    local = get_local_kernel(written)
    _, override = code_blocks(PAGE, "Hugging Face kernels", "bash")
    assert shlex.split(override)[0] == f"LOCAL_KERNELS={REPO}=OUT"
    monkeypatch.setenv("LOCAL_KERNELS", f"{REPO}={newer}")
    [code] = code_blocks(PAGE, "Hugging Face kernels")
    assert f"version={hub.VERSION}," in code
    names = dict(zip(("hidden_states", "weight", "labels"), head, strict=True))
    exec(code, names)
    named = names["laser_kernels"]
    assert torch.equal(names["logprobs"], op(named, head))
    for module, difference in ((named, 1), (local, 0), (laser_kernels, 0), (named, 1)):
        assert torch.equal(op(module, head), expected - difference)
        (gradient,) = torch.autograd.grad(
            module.linear_logprob_loss(*head, lambda p, _: p.sum(), impl="chunked"), head[:1]
        )
        assert gradient.isfinite().all() and gradient.any()
    loaded = {entry.module: entry.metadata for entry in get_loaded_kernels()}
    for out, module in ((written, local), (newer, named)):
        folder, facts = Path(module.__file__).parent, loaded[module]
        assert folder.parent == out / "build" and module.__name__ == facts.id
        assert callable(getattr(torch.ops, facts.id).linear_logprob_fwd)
        facts.digest.validate(type(facts.digest).hash_variant(facts.digest.algorithm, folder))
