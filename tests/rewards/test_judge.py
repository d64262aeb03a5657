"""Judges that are asked once for each answer, a few at a time."""

import asyncio
import inspect
import re
import sqlite3
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from laser_fast.config import RewardConfig
from laser_fast.rewards import Grader, RewardError
from laser_fast.rewards.judge import cached_judge

README = Path(__file__).parents[2] / "README.md"

MODULE = """
import asyncio
from pathlib import Path

from laser_fast.rewards.judge import cached_judge

FOLDER = Path(__file__).parent

@cached_judge(FOLDER / "judge.sqlite", concurrency=2)
async def style(completion, prompt, level, scale=2.0):
    with open(FOLDER / "asked", "a") as file:
        file.write(f"{prompt}{completion}{level}\\n")
    return scale * len(completion) + level

@cached_judge(FOLDER / "judge.sqlite", concurrency=1)
async def hangs(completion):
    with open(FOLDER / "asked", "a") as file:
        file.write(f"{completion}\\n")
    await asyncio.sleep(1000.0 * (completion == "hang"))
    return 1.0

CLIENT = asyncio.Semaphore(1)  # as clients do, it stays with the event loop of its first use

@cached_judge(FOLDER / "judge.sqlite")
async def by_a_client(completion):
    async with CLIENT:
        await asyncio.sleep(0.001)
        return 1.0
"""


@pytest.fixture
def calls():
    return []


def judge_of(path, calls, **options):
    at_once = [0]

    @cached_judge(path, **options)
    async def judge(completion, answer):
        calls.append(completion)
        at_once[0] += 1
        calls_at_once.append(at_once[0])
        await asyncio.sleep(0.001)
        at_once[0] -= 1
        if completion == "down":
            raise ConnectionError("no route to the judge")
        return None if completion == "unsure" else {"nan": float("nan")}.get(completion, 0.5)

    calls_at_once = judge.at_once = []
    return judge


def ask(judge, *completions, answer="a"):
    answers = [answer] * len(completions)
    return asyncio.run(judge(completions=list(completions), answer=answers))


def test_an_answer_is_judged_once(tmp_path, calls):
    judge = judge_of(tmp_path / "judge.sqlite", calls)
    assert ask(judge, "x", "y", "x") == [0.5] * 3
    assert sorted(calls) == ["x", "y"]
    assert ask(judge, "y", "z") == [0.5] * 2
    assert sorted(calls) == ["x", "y", "z"]
    assert ask(judge_of(tmp_path / "judge.sqlite", calls), "x", "y", "z") == [0.5] * 3
    assert len(calls) == 3  # also by another process, which has the same name for it
    ask(judge, "x", answer="b")
    assert len(calls) == 4  # everything that it is given counts
    ask(judge_of(tmp_path / "judge.sqlite", calls, version="2"), "x")
    assert len(calls) == 5


def test_a_failure_is_no_number_and_asked_for_again(tmp_path, calls, caplog):
    judge = judge_of(tmp_path / "judge.sqlite", calls)
    assert ask(judge, "x", "down", "unsure") == [0.5, None, None]
    assert "1 calls failed: ConnectionError('no route to the judge')" in caplog.text
    assert ask(judge, "x", "down", "unsure") == [0.5, None, None]
    assert sorted(calls) == ["down", "down", "unsure", "unsure", "x"]
    with pytest.raises(RewardError, match="expected a finite number, got nan"):
        ask(judge, "nan")


def test_only_so_many_are_asked_at_once(tmp_path, calls):
    judge = judge_of(tmp_path / "judge.sqlite", calls, concurrency=3)
    assert ask(judge, *map(str, range(20))) == [0.5] * 20
    assert max(judge.at_once) == 3
    with pytest.raises(ValueError, match="a concurrency of at least 1, got 0"):
        cached_judge("judge.sqlite", concurrency=0)


def test_a_judge_that_cannot_be_awaited_is_refused():
    with pytest.raises(ValueError, match="expected an async function, got builtins:len"):
        cached_judge("judge.sqlite")(len)


def test_what_a_judge_takes_by_any_name_is_not_asked_for(tmp_path):
    @cached_judge(tmp_path / "judge.sqlite")
    async def any_field(completion, **fields):
        return float(len(fields))

    assert [*inspect.signature(any_field).parameters] == ["completions"]
    assert asyncio.run(any_field(completions=["a", "b"])) == [0.0, 0.0]


def test_a_judge_is_a_reward_function_for_several_processes(tmp_path, monkeypatch):
    (tmp_path / "my_judge.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    config = RewardConfig(kind="my_judge:style")
    given = {"prompts": ["p", "p", "q"], "fields": ['{"level": 1}'] * 3}
    with Grader(config) as grader:
        assert grader.fields == ("level",)
        assert grader.grade(["a", "bb", "a"], ["", "", ""], **given) == [3.0, 5.0, 3.0]
    code = (
        "import asyncio, my_judge; print(asyncio.run(my_judge.style("
        "completions=[str(i % 50) for i in range(100)], prompts=['p'] * 100, level=[0] * 100))[:3])"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    assert [process.communicate()[0] for process in processes] == [b"[2.0, 2.0, 2.0]\n"] * 2
    asked = (tmp_path / "asked").read_text().split()
    assert sorted(asked)[-3:] == ["pa1", "pbb1", "qa1"]
    assert len(set(asked)) == 53 and len(asked) <= 103


def test_a_client_of_the_module_serves_call_after_call(tmp_path, monkeypatch):
    (tmp_path / "judge_with_client.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    config = RewardConfig(kind="judge_with_client:by_a_client", workers=1)
    with Grader(config) as grader:
        for texts in (["a", "b"], ["c", "d"]):
            assert grader.grade(texts, ["", ""]) == [1.0, 1.0]


def test_no_number_waits_for_the_disk(tmp_path, calls, monkeypatch):
    modes = []

    class Watched(sqlite3.Connection):
        def close(self):
            modes.extend(self.execute("PRAGMA synchronous"))
            super().close()

    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Watched))
    assert ask(judge_of(tmp_path / "judge.sqlite", calls), "x") == [0.5]
    assert modes == [(0,)]


def test_what_was_judged_before_a_deadline_is_kept(tmp_path, monkeypatch):
    (tmp_path / "late_judge.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    config = RewardConfig(kind="late_judge:hangs", timeout_s=2.0, batch_timeout_s=2.0, workers=1)
    with Grader(config) as grader:
        assert grader.grade(["a", "b", "hang"], [""] * 3) == [1.0, 1.0, None]
    assert (tmp_path / "asked").read_text().split() == ["a", "b", "hang", "hang"]


def test_the_readmes_judge_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n([^`]*cached_judge.*?)```", README.read_text(), re.S)
    namespace = {"__name__": "my_rewards", "cached_judge": cached_judge}
    exec(code, namespace)

    async def answer(*texts):
        return 0.75

    namespace["ask_my_model"] = answer
    found = namespace["style"](completions=["x", "y"], prompts=["p", "p"])
    assert asyncio.run(found) == [0.75, 0.75]
    assert Path("judge.sqlite").exists()
