"""What messages and help texts tell a user to type exists."""

import ast
import re
import sys
from pathlib import Path

import pytest
import typer

from laser_fast import cli

PACKAGE = Path(cli.__file__).parent
# Of torchrun, and of vLLM's own server.
OTHERS = """--nproc-per-node --max-model-len --logits-processors --logprobs-mode --api-key
--weight-transfer-config"""


def test_options_that_texts_name_exist():
    known = {"--help", *OTHERS.split()}
    for command in typer.main.get_command(cli.app).commands.values():
        for parameter in command.params:
            known |= {*parameter.opts, *parameter.secondary_opts}
    assert {"--resume", "--no-score"} <= known
    unknown = {
        (path.name, node.lineno, option)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", node.value)
        if option not in known
    }
    assert not unknown


@pytest.mark.parametrize("verb", ["eval", "train"])
def test_a_refused_option_is_named_as_it_was_typed(verb, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["laser-fast", verb, "no-such-file", "--resume=auto"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "--resume-auto" not in said
    assert ("No such option: --resume" in said) == (verb == "eval")
