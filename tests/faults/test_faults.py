"""The part of the drill that CI runs: `pytest -m faults`, and with vLLM `-m "vllm and faults"`.

All of it is `python -m tests.faults`.
"""

import pytest

from .drill import Drill
from .rows import ROWS

IN_CI = [
    row
    for row in ROWS
    if row.fault == "SIGKILL of all ranks"
    or (row.fault == "SIGKILL of one rank" and row.place in ("sync", "rollout", "write"))
]
WITH_VLLM = [row for row in ROWS if row.kind == "vllm"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What came of the rows of a kind, by name; they share a run."""
    drill = Drill(tmp_path_factory.mktemp("drill"))
    found = {}

    def run(rows):
        if rows[0].name not in found:
            found.update({outcome.row.name: outcome for outcome in drill.run(rows)})
        return found

    return run


@pytest.mark.faults
@pytest.mark.timeout(720)
@pytest.mark.parametrize("row", IN_CI, ids=lambda row: row.name)
def test_the_run_ends_as_if_nothing_had_been(row, outcomes):
    assert not outcomes(IN_CI)[row.name].faults


@pytest.mark.faults
@pytest.mark.vllm
@pytest.mark.timeout(720)
@pytest.mark.parametrize("row", WITH_VLLM, ids=lambda row: row.name)
def test_with_vllm_too(row, outcomes):
    assert not outcomes(WITH_VLLM)[row.name].faults
