"""The keys of the configuration: how many, documented, and each read by some module.

Reads are found by following types through the sources: annotations of arguments and attributes,
assignments, properties and returned types. Only an attribute of an expression whose type is a
section counts as a read of its key.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from laser_fast.config import Config, all_keys

PACKAGE = Path(__file__).parents[1] / "laser_fast"
# Class name -> dotted prefix of its keys.
SECTIONS = {"Config": ""} | {
    field.annotation.__name__: f"{name}."
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}


class Types:
    """Types of attributes and results of all classes and functions, as far as they are told."""

    def __init__(self, modules: list[ast.Module]) -> None:
        self.attributes: dict[str, dict[str, str]] = {
            name: {} for module in modules for name in _classes(module)
        }
        self.attributes["Config"] = {
            prefix[:-1]: name for name, prefix in SECTIONS.items() if prefix
        }
        self.results: dict[str, str] = {}
        # An attribute may take its type from one that is found later.
        for _ in range(3):
            for module in modules:
                self._learn(module.body, {}, owner=None)

    def named(self, annotation: ast.expr | None) -> str | None:
        """The one class of ours that an annotation names."""
        words = re.findall(r"\w+", ast.unparse(annotation)) if annotation else []
        known = [word for word in words if word in self.attributes or word in SECTIONS]
        return known[0] if len(known) == 1 else None

    def of(self, node: ast.expr, names: dict[str, str]) -> str | None:
        """Type of an expression, where `names` holds those of the variables."""
        if isinstance(node, ast.Name):
            return names.get(node.id)
        if isinstance(node, ast.Attribute):
            return self.attributes.get(self.of(node.value, names) or "", {}).get(node.attr)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name = node.func.id
            return name if name in self.attributes else self.results.get(name)
        if isinstance(node, ast.Call):
            return self.of(node.func, names)
        return None

    def scope(
        self, function: ast.FunctionDef, outer: dict[str, str], owner: str | None
    ) -> dict[str, str]:
        """Types of the variables inside a function."""
        names = dict(outer)
        arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        for argument in arguments:
            names.pop(argument.arg, None)
            if found := self.named(argument.annotation):
                names[argument.arg] = found
        if owner and arguments and arguments[0].arg == "self":
            names["self"] = owner
        for node in _own_nodes(function):
            for target, value in _assignments(node):
                if isinstance(target, ast.Name) and (found := self.of(value, names)):
                    names[target.id] = found
        return names

    def _learn(self, body: list[ast.stmt], names: dict[str, str], owner: str | None) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                self._learn(node.body, names, owner=node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and owner:
                self._note(owner, node.target.id, self.named(node.annotation))
            elif isinstance(node, ast.FunctionDef):
                if owner:
                    self._note(owner, node.name, self.named(node.returns))
                elif found := self.named(node.returns):
                    self.results[node.name] = found
                inner = self.scope(node, names, owner)
                for statement in _own_nodes(node):
                    for target, value in _assignments(statement):
                        if isinstance(target, ast.Attribute) and owner:
                            if self.of(target.value, inner) == owner:
                                self._note(owner, target.attr, self.of(value, inner))

    def _note(self, owner: str, attribute: str, found: str | None) -> None:
        if found and owner not in SECTIONS:
            self.attributes[owner][attribute] = found


def keys_read(sources: list[str]) -> set[str]:
    """Every key that the sources read."""
    modules = [ast.parse(source) for source in sources]
    types = Types(modules)
    found: set[str] = set()

    def visit(node: ast.AST, names: dict[str, str], owner: str | None) -> None:
        if isinstance(node, ast.ClassDef):
            owner = node.name
        elif isinstance(node, ast.FunctionDef):
            names, owner = types.scope(node, names, owner), None
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            section = SECTIONS.get(types.of(node.value, names) or "")
            if section is not None:
                found.add(f"{section}{node.attr}")
        for child in ast.iter_child_nodes(node):
            visit(child, names, owner)

    for module in modules:
        visit(module, {}, None)
    return found & set(all_keys())


def _classes(module: ast.Module) -> list[str]:
    return [node.name for node in ast.walk(module) if isinstance(node, ast.ClassDef)]


def _own_nodes(function: ast.FunctionDef) -> list[ast.AST]:
    """Nodes of a function in reading order, without those of functions inside it."""
    found: list[ast.AST] = []
    waiting: list[ast.AST] = list(reversed(function.body))
    while waiting:
        node = waiting.pop()
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.append(node)
            waiting.extend(reversed(list(ast.iter_child_nodes(node))))
    return found


def _assignments(node: ast.AST) -> list[tuple[ast.expr, ast.expr]]:
    """Pairs of target and value, also of `a, b = x, y`."""
    if isinstance(node, ast.AnnAssign) and node.value:
        return [(node.target, node.value)]
    if not isinstance(node, ast.Assign):
        return []
    pairs = []
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs.extend(zip(target.elts, node.value.elts, strict=False))
        else:
            pairs.append((target, node.value))
    return pairs


def test_sections_and_number_of_keys():
    sections = list(dict.fromkeys(key.split(".")[0] for key in all_keys() if "." in key))
    assert sections == (
        ["model", "data", "rollout", "reward", "score", "advantage", "loss", "optim"]
        + ["checkpoint", "log"]
    )
    assert [key for key in all_keys() if "." not in key] == ["seed", "output_dir"]
    assert len(all_keys()) <= 80


def test_keys_that_users_rely_on():
    promised = """
        seed output_dir optim.steps optim.lr data.train data.eval data.prompts_per_step
        rollout.engine rollout.group_size rollout.temperature rollout.max_new_tokens
        rollout.max_disagreement rollout.score reward.kind reward.timeout_s score.token score.beta
        score.ref_logprob score.loss_coef score.warmup_steps score.max_class_weight
        score.max_grad_ratio advantage.scale advantage.score_coef advantage.score_min_std
        advantage.score_warmup_steps loss.kind loss.clip_low loss.clip_high loss.aggregation
        loss.tis_cap loss.kl_coef loss.entropy_coef checkpoint.every checkpoint.keep
        log.tensorboard log.wandb log.trackio
    """
    assert set(promised.split()) <= set(all_keys())


@pytest.mark.parametrize("key", all_keys())
def test_every_key_is_documented(key):
    text = all_keys()[key]
    assert text.endswith(".") and text.isascii() and "\n" not in text and len(text) > 20


def test_every_key_is_read_somewhere():
    # config.py itself does not count: a key that is only checked changes nothing.
    modules = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "config.py"]
    read = keys_read([path.read_text() for path in modules])
    assert not sorted(set(all_keys()) - read)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        # Arguments of a section's or the whole configuration's type.
        ("def f(c: LossConfig): return c.kind", {"loss.kind"}),
        ("def f(c: Config | None): return c.optim.lr, c.seed", {"optim.lr", "seed"}),
        # Variables, in order, and closures.
        ("def f(c: Config):\n s, r = c.score, c.rollout\n return s.beta", {"score.beta"}),
        ("def f(c: LossConfig):\n def g(): return c.clip_low\n return g", {"loss.clip_low"}),
        # Attributes of our classes, told or assigned.
        (
            "class A:\n def __init__(self, c: Config): self._loss = c.loss\n"
            " def f(self): return self._loss.tis_cap",
            {"loss.tis_cap"},
        ),
        ("class A:\n c: DataConfig\ndef f(a: A): return a.c.train", {"data.train"}),
        (
            "class B:\n @property\n def c(self) -> Config: ...\n"
            "class A:\n def __init__(self): self.b = B()\n def f(self): self.b.c.log.wandb",
            {"log.wandb"},
        ),
        # Results of functions.
        ("def load() -> Config: ...\ndef f():\n c = load()\n c.data.eval", {"data.eval"}),
        # No reads: another type, an unknown one, a name only, a write, a text, a shadow.
        ("class A:\n kind: str\ndef f(a: A): return a.kind", set()),
        ("def f(config): return config.kind, config.loss.kind", set()),
        ("def f(kind, c: LossConfig): return kind", set()),
        ("def f(c: LossConfig): c.kind = 1", set()),
        ("def f(c: LossConfig): return 'loss.kind', getattr(c, 'kind')", set()),
        ("def f(c: LossConfig):\n def g(c): return c.kind\n return g", set()),
    ],
)
def test_a_read_is_found_by_its_type(source, expected):
    assert keys_read([source]) == expected
