"""What people install: the wheel and the sdist, and the base without the trainer's packages."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import laser_fast

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "laser_fast", "kernels", "csrc", "configs")
# What the packages read besides modules.
DATA = {
    "laser_fast/py.typed",
    "laser_fast/report/page.html.jinja",
    *(f"laser_fast/configs/{path.name}" for path in (ROOT / "configs").glob("*.toml")),
    "laser_kernels/py.typed",
    *(f"laser_kernels/csrc/{path.name}" for path in (ROOT / "csrc").glob("*.cu*")),
}
# All that the base install offers; vLLM itself is what a server of scoring models adds.
# What says it through the command line only, and what only the command line imports.
COMMAND_LINE = ("cli", "plan", "report", "sandbox")
BASE = (
    "laser_kernels.",
    "laser_fast.__main__.",
    "laser_fast.algorithm.",
    "laser_fast.integrations.sglang.",
    "laser_fast.records.",
    "laser_fast.rollout.score_processor.",
    "laser_fast.rollout.score_request.",
    "laser_fast.rollout.self_reward.",
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist, and with the wheel that is built from the sdist."""
    folder = tmp_path_factory.mktemp("built")
    checkout = folder / "checkout"
    checkout.mkdir()
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=left_out)
        else:
            shutil.copy(ROOT / name, checkout)
    [sdist] = build("sdist", checkout, folder)
    shutil.unpack_archive(sdist, folder / "unpacked")
    [unpacked] = (folder / "unpacked").iterdir()
    build("wheel", unpacked, folder)
    return folder


def build(kind, source, out):
    program = "import sys; from setuptools import build_meta; "
    program += f"build_meta.build_{kind}(sys.argv[1])"
    run(sys.executable, "-c", program, out, cwd=source)
    return list(out.glob("*.tar.gz" if kind == "sdist" else "*.whl"))


@pytest.fixture(scope="module")
def installed(built):
    """A folder with the installed wheel and nothing else."""
    target = built / "installed"
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index")
    run(*pip, "--target", target, *built.glob("*.whl"), cwd=built)
    return target


@pytest.fixture(scope="module")
def base(installed):
    """Python with the installed wheel and what it requires, without any extra."""
    packages = installed.parent / "required"
    packages.mkdir()
    pending, seen = ["torch", "triton"], set()
    while pending:
        if (name := pending.pop()) in seen:
            continue
        seen.add(name)
        distribution = importlib.metadata.distribution(name)
        for required in map(Requirement, distribution.requires or ()):
            if required.marker is None or required.marker.evaluate({"extra": ""}):
                pending.append(required.name)
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))

    def python(*arguments, check=True):
        # Without `site` there is no other folder of packages.
        path = os.pathsep.join(map(str, (installed, packages)))
        command = (sys.executable, "-S", "-W", "ignore", *arguments)
        return run(*command, cwd=packages.parent, path=path, check=check)

    return python


def run(*command, cwd, path="", check=True):
    # Triton's interpreter, which the tests of the kernels use, needs numpy.
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    command = list(map(str, command))
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


def test_wheel_and_sdist_hold_what_the_packages_read(built):
    [wheel], [sdist] = built.glob("*.whl"), built.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        path.relative_to(root).as_posix()
        for root in (ROOT, ROOT / "kernels")
        for path in root.glob("laser_*/**/*.py")
    }
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == modules | DATA
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {name.replace("laser_kernels/", "kernels/laser_kernels/") for name in DATA} <= packed
    assert {"pyproject.toml", "README.md", "LICENSE"} <= packed


def test_metadata_of_the_wheel(installed):
    [distribution] = importlib.metadata.distributions(path=[str(installed)])
    assert distribution.version == laser_fast.__version__
    required = map(Requirement, distribution.requires)
    assert [str(entry) for entry in required if "extra" not in str(entry.marker)] == [
        "torch>=2.11",
        'triton>=3.6; platform_system == "Linux"',
    ]


def test_installed_quickstart_is_found_by_its_name(installed, tmp_path):
    shown = run(
        *(sys.executable, "-m", "laser_fast", "train", "quickstart", "--print-config"),
        cwd=tmp_path,
        path=str(installed),
    )
    assert 'output_dir = "runs/quickstart"' in shown.stdout
    script = run(
        *(sys.executable, installed / "bin/laser-fast", "train", "quickstrat"),
        cwd=tmp_path,
        path=str(installed),
        check=False,
    )
    assert script.returncode == 2 and script.stderr.endswith(", quickstart, sandbox_hard\n")


def test_installed_sources_of_the_extension_are_found(installed, base):
    program = "from laser_kernels import _extension; print(_extension.source_folder())"
    assert base("-c", program).stdout.strip() == str(installed / "laser_kernels" / "csrc")


def test_the_base_imports_laser_kernels_fast(base):
    program = """
import json, sys, time
import laser_kernels
print(json.dumps([time.process_time(), sorted(sys.modules)]))
"""
    base("-c", program)  # compiles what has no bytecode yet
    seconds, modules = json.loads(base("-c", program).stdout)
    assert not {"transformers", "vllm", "numpy", "pydantic", "laser_fast"} & set(modules)
    assert seconds < 3


def test_what_imports_on_the_base(base):
    program = """
import importlib, json, pkgutil, sys, types
for name, *members in (("vllm.v1.sample.logits_processor", "LogitsProcessor"),
                       ("vllm.v1.sample.logits_processor.builtin", "process_dict_updates")):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update({member: type(member, (), {}) for member in members})
sys.modules["vllm"] = types.ModuleType("vllm")
sys.modules["vllm"].__version_tuple__ = (0, 32, 0)
import laser_fast, laser_kernels
missing = {}
for package in (laser_fast, laser_kernels):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            missing[module.name] = [error.name, str(error)]
print(json.dumps(missing))
"""
    missing = json.loads(base("-c", program).stdout)
    assert not [module for module in missing if f"{module}.".startswith(BASE)]
    assert missing["laser_fast.config"] == ["tomli_w", sentence("tomli_w")]
    for module, (name, message) in missing.items():
        # The command line says it for itself and for what only it imports.
        if not module.startswith(tuple(f"laser_fast.{name}" for name in COMMAND_LINE)):
            is_host = module.startswith("laser_fast.integrations.")
            expected = (
                f"laser-fast needs {name} for this; {HOSTS[name]}" if is_host else sentence(name)
            )
            assert message == expected, module
    assert {name for name, _ in missing.values()} >= set(HOSTS)


HOSTS = {
    "trl": "pip install 'laser-fast[trl]'",
    "verl": "pip install 'verl>=0.9,<0.10'",
    "prime_rl": "install prime-rl 0.8 from its repository",
    "torchtitan": "pip install 'torchtitan>=0.3,<0.4'",
}


def sentence(package):
    return (
        f"laser-fast needs {package} for this, which comes with the trainer's packages; "
        "pip install 'laser-fast[train]'"
    )


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("transformers", ["plan", "quickstart", "--gpus", "1", "--memory", "80"]),
        ("matplotlib", ["report", "nowhere"]),
    ],
)
def test_the_command_names_the_extra_for_a_package_that_comes_late(package, arguments, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{package!r}] = None\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-m", "laser_fast", *arguments]
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"error: {sentence(package)}\n")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "quickstart"]])
def test_the_command_says_what_the_base_lacks(base, arguments):
    done = base("-m", "laser_fast", *arguments, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {sentence('typer')}\n"
