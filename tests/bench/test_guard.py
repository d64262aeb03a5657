"""A provider that kills its process costs only itself."""

import os
import sys

from bench.guard import supervise

# Stands in for a benchmark: announces each provider, dies in "bad" and in "worse", unless skipped.
PROGRAM = """
import os, sys
from pathlib import Path
mark, log = Path(os.environ["BENCH_MARK"]), Path(sys.argv[1])
skipped = {a.partition("=")[0] for a in sys.argv}
for name in ("good", "bad", "fine", "worse", "last"):
    if name in skipped:
        continue
    mark.write_text(name)
    if name in ("bad", "worse"):
        os.abort()
    log.open("a").write(name + " ")
mark.write_text("")
sys.exit(int(sys.argv[2]))
"""


def start(tmp_path, code):
    program, log = tmp_path / "program.py", tmp_path / "log"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(log), str(code)]
    return supervise(command, tmp_path / "mark"), log.read_text()


def test_goes_on_without_each_provider_that_kills_the_process(tmp_path, capfd):
    code, log = start(tmp_path, 0)
    assert code == 0 and log.endswith("good fine last ")
    assert "bad ended the process (exit code -6)" in capfd.readouterr().out
    assert "BENCH_MARK" not in os.environ


def test_a_failure_that_nobody_caused_ends_the_run(tmp_path):
    assert start(tmp_path, 3)[0] == 3
