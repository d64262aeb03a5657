"""Promises of the project as a whole: layout, layers, sizes, light imports, honest references."""

import ast
import functools
import importlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest

import laser_fast

ROOT = Path(__file__).parents[1]
FOLDERS = ("laser_fast", "kernels", "csrc", "bench", "tests", "configs")
MAX_LINES = 400
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONTRACTS = PROJECT["tool"]["importlinter"]["contracts"]
# Where parts of torch may be imported; import-linter sees packages as a whole.
HOMES = {
    "torch.distributed.fsdp": ("model/policy.py", "rollout/hf.py", "integrations/trl_head.py"),
    "torch.distributed.checkpoint": ("model/policy.py", "training/"),
}
# Files in comments that are no part of the project: of a run folder, a placeholder, and one of
# the released LaSeR code.
FOREIGN = {"config.toml", "CONFIG.toml", "reward_score/__init__.py"}


def files(*suffixes, folders=FOLDERS):
    """Files of the project with one of the suffixes, without results and build products."""
    found = []
    for folder in folders:
        for path in (ROOT / folder).rglob("*"):
            parts = path.relative_to(ROOT).parts
            if path.suffix in suffixes and path.is_file() and parts[:2] != ("bench", "results"):
                found.append(path)
    assert found
    return found


def name(path):
    return path.relative_to(ROOT).as_posix()


def environment():
    """The environment with both packages importable, installed or not."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def imports(path):
    """(module, imported names) of every import of a file that runs, with its line."""
    tree = ast.parse(path.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, []
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module, [alias.name for alias in node.names]


# Layout and size.


def test_kernels_is_a_folder_and_no_package():
    # With an __init__.py it would shadow the package `kernels` of Hugging Face.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "laser_kernels" / "__init__.py").is_file()


def test_no_file_is_long():
    sources = files(".py", ".cu", ".cuh", ".cpp", ".h", ".sh", ".toml")
    lengths = {name(path): len(path.read_text().splitlines()) for path in sources}
    assert not {path: lines for path, lines in lengths.items() if lines > MAX_LINES}


def test_sources_are_ascii():
    top = [path for path in ROOT.glob("*") if path.suffix in (".md", ".toml")]
    sources = files(".py", ".cu", ".cuh", ".cpp", ".h", ".sh", ".toml", ".md")
    others = (ROOT / ".ci/run", ROOT / ".github/workflows/ci.yml", ROOT / "CITATION.cff")
    for path in [*sources, *top, *others]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            assert line.isascii(), f"{name(path)}:{number}: {ascii(line)}"


def test_nothing_is_a_stub():
    unfinished = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    for path in files(".py", ".cu", ".cpp", folders=("laser_fast", "kernels", "csrc", "bench")):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            assert not unfinished.search(line), f"{name(path)}:{number}: {line.strip()}"


def test_every_module_says_what_it_is():
    for path in files(".py", folders=("laser_fast", "kernels", "bench")):
        assert ast.get_docstring(ast.parse(path.read_text())), name(path)


# Layers and dependencies.


def lint_imports(folder):
    """Whether import-linter accepts the packages in a folder, and what it says."""
    command = shutil.which("lint-imports", path=Path(sys.executable).parent) or shutil.which(
        "lint-imports"
    )
    if command is None:
        pytest.skip("needs import-linter")
    paths = os.pathsep.join([str(folder), str(folder / "kernels")])
    done = subprocess.run(
        [command, "--no-cache", ROOT / "pyproject.toml"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    return done.returncode == 0, done.stdout + done.stderr


def test_import_contracts_hold():
    holds, text = lint_imports(ROOT)
    assert holds, text


def test_every_import_contract_can_break(tmp_path):
    without = shutil.ignore_patterns("__pycache__", "configs", "csrc")
    shutil.copytree(ROOT / "laser_fast", tmp_path / "laser_fast", ignore=without)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=without)
    wrong = {
        "laser_fast/stray.py": "",
        "laser_fast/records.py": "import laser_fast.cli",
        "kernels/laser_kernels/reference.py": "import laser_fast",
        "laser_fast/rewards/boxed.py": "import laser_kernels._dispatch",
        "laser_fast/algorithm/loss.py": "import numpy",
        "laser_fast/training/trainer.py": "def f():\n    import vllm.config",
        "laser_fast/data/rows.py": "from transformers import AutoTokenizer",
        "laser_fast/evaluation/benchmarks.py": "import math_verify",
        "laser_fast/log/jsonl.py": "import datasets",
        "laser_fast/training/run.py": "import matplotlib.pyplot",
        "laser_fast/training/update.py": "import huggingface_hub",
        "laser_fast/model/policy.py": "import trl",
    }
    for path, line in wrong.items():
        with (tmp_path / path).open("a") as file:
            file.write(f"\n{line}\n")
    _, text = lint_imports(tmp_path)
    for contract in CONTRACTS:
        assert f"{contract['name']} BROKEN" in text, text
    for found in ("- laser_fast.stray", "laser_fast.records -> laser_fast.cli"):
        assert found in text


def test_parts_of_torch_stay_at_home():
    strays = []
    for path in files(".py", folders=("laser_fast",)):
        inside = path.relative_to(ROOT / "laser_fast").as_posix()
        for line, module, _ in imports(path):
            for part, homes in HOMES.items():
                if f"{module}.".startswith(f"{part}.") and not inside.startswith(homes):
                    strays.append(f"{name(path)}:{line} imports {module}")
    assert not strays


def modules_above(source, layer):
    """Modules of higher layers that a text of the code names; docstrings may name any."""
    heights = {
        part.strip(" ()"): height
        for height, row in enumerate(reversed(CONTRACTS[0]["layers"]))
        for part in re.split(r"[|:]", row)
    }
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            continue
        for target in re.findall(r"\blaser_fast\.(\w+)", node.value):
            if id(node) not in prose and heights.get(target, 0) > heights[layer]:
                yield f"laser_fast.{target}"


def test_no_text_names_a_module_above():
    wrong = []
    for path in files(".py", folders=("laser_fast",)):
        layer = path.relative_to(ROOT / "laser_fast").with_suffix("").parts[0]
        if layer != "__init__":
            wrong += [
                f"{name(path)}: {module}" for module in modules_above(path.read_text(), layer)
            ]
    assert not wrong
    above = 'x = f"{1} laser_fast.sandbox.task:reward"'
    assert list(modules_above(above, "data")) == ["laser_fast.sandbox"]
    assert list(modules_above(above, "cli")) == []
    assert list(modules_above('"""See laser_fast.cli."""', "data")) == []


def test_importing_the_packages_is_light():
    # One process: what each import adds to the modules loaded so far.
    program = """
import json, sys
heavy = ("torch", "vllm", "transformers", "datasets", "math_verify", "trl", "verl", "pebble",
         "tensorboard", "matplotlib", "wandb", "trackio")
loaded = {}
for package in ("laser_fast", "laser_kernels", "laser_fast.config", "laser_fast.records",
                "laser_fast.algorithm.loss", "laser_fast.cli"):
    __import__(package)
    loaded[package] = [module for module in heavy if module in sys.modules]
print(json.dumps(loaded))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert loaded.pop("laser_fast") == []
    assert all(modules == ["torch"] for modules in loaded.values()), loaded


@pytest.mark.parametrize("module", ["no_such_package", "numpy.no_such_module"])
def test_only_a_package_of_the_trainer_is_said_to_be_in_its_extra(module):
    with pytest.raises(ModuleNotFoundError) as caught, laser_fast.needs_train():
        importlib.import_module(module)
    assert type(caught.value) is ModuleNotFoundError and caught.value.name == module


def test_the_trainer_uses_the_public_kernels_only():
    source = (ROOT / "kernels" / "laser_kernels" / "__init__.py").read_text()
    (public,) = [
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    used = set()
    for path in files(".py", folders=("laser_fast",)):
        for line, module, names in imports(path):
            if module.split(".")[0] == "laser_kernels":
                assert module == "laser_kernels", f"{name(path)}:{line} imports {module}"
                used.update(names)
    assert used and used <= set(public)


# References to files and names.


def remarks(path):
    """(line, text) of the comments and docstrings of a Python file."""
    source = path.read_text()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        # Docstrings, and the texts below the fields of a class.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                yield node.lineno, node.value.value


@functools.cache
def known_names():
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return {path.name for path in [*ROOT.glob("*"), *paths]}


def missing_files(text, *, beside):
    """Files that a text names and the project does not have."""
    for match in re.finditer(r"(?<![\w./<*-])[\w./-]*[\w-]\.(py|toml|md|cu|cuh|sh)\b", text):
        path = match[0]
        if path in FOREIGN:
            continue
        if "/" not in path:
            found = path in known_names()
        elif path.split("/")[0] in FOLDERS or path.startswith("."):
            found = (ROOT / path).is_file() or (beside / path).is_file()
        else:
            found = (beside / path).is_file() or (ROOT / "laser_fast" / path).is_file()
        if not found:
            yield path


def test_files_that_comments_name_exist():
    wrong = []
    for path in files(".py"):
        if path == Path(__file__):
            continue
        for line, text in remarks(path):
            missing = missing_files(text, beside=path.parent)
            wrong += [f"{name(path)}:{line}: {file}" for file in missing]
    for path in files(".toml"):
        for line, text in enumerate(path.read_text().splitlines(), start=1):
            comment = text.partition("#")[2]
            missing = missing_files(comment, beside=path.parent)
            wrong += [f"{name(path)}:{line}: {file}" for file in missing]
    assert not wrong


def test_a_missing_file_is_noticed():
    def noticed(text):
        return list(missing_files(text, beside=ROOT / "laser_fast" / "training"))

    assert noticed("see laser_fast/config.py, policy.py, README.md and `config.toml`.") == []
    assert noticed("see laser_fast/konfig.py") == ["laser_fast/konfig.py"]
    assert noticed("(tests/test_absent.py)") == ["tests/test_absent.py"]
    assert noticed("as in nowhere_at_all.py.") == ["nowhere_at_all.py"]


def readmes():
    return [ROOT / "README.md", *files(".md")]


def test_links_of_the_readmes_lead_somewhere():
    for path in {*readmes(), *ROOT.glob("*.md")}:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
            if not target.startswith(("http://", "https://", "mailto:")):
                assert (path.parent / target).exists(), f"{name(path)}: {target}"


def test_python_of_the_readmes_compiles_and_imports_what_exists():
    for path in readmes():
        for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
            tree = ast.parse(block, filename=name(path))
            for node in ast.walk(tree):
                module = node.module if isinstance(node, ast.ImportFrom) else None
                if module and module.split(".")[0] in ("laser_fast", "laser_kernels"):
                    absent = {alias.name for alias in node.names} - exported(module)
                    assert not absent, f"{name(path)}: from {module} import {absent}"


def exported(module):
    """Names that a module of ours binds, and its submodules."""
    root = ROOT / "kernels" if module.startswith("laser_kernels") else ROOT
    folder = root.joinpath(*module.split("."))
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    assert path.is_file(), f"no module {module}"
    names = {inner.stem for inner in folder.glob("*.py")}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            names.update(ast.unparse(target) for target in node.targets)
    return names


# The distribution.


def test_distribution():
    project = PROJECT["project"]
    assert project["license"] == "Apache-2.0" and "Apache License" in (ROOT / "LICENSE").read_text()
    extras = project["optional-dependencies"]
    assert project["dependencies"] == ["torch>=2.11", "triton>=3.6; platform_system == 'Linux'"]
    packages = [re.split(r"[<>=]", entry)[0].replace("-", "_") for entry in extras["train"]]
    assert sorted(packages) == sorted([*laser_fast.TRAIN_PACKAGES, "torch"])
    for name, entries in extras.items():
        assert name == "train" or entries[0] == "laser-fast[train]", name
    assert project["scripts"]["laser-fast"] == "laser_fast.__main__:main"


def test_one_version():
    version = laser_fast.__version__
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased" and headings[1].startswith(f"{version} - ")
    try:
        installed = importlib.metadata.version("laser-fast")
    except importlib.metadata.PackageNotFoundError:
        return
    assert installed == version
