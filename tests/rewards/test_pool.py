import os
import time
from types import SimpleNamespace

import pytest

from laser_fast.rewards.pool import Failure, WorkerPool, WorkerStartError, _Worker


@pytest.fixture(scope="module")
def pool():
    pool = WorkerPool("operator:add", num_workers=2, memory_limit=1 << 30)
    yield pool
    pool.close()


def test_results_keep_their_order(pool):
    calls = [(i, 10 * i) for i in range(50)]
    assert pool.run("operator:add", calls, deadline_s=60.0) == [11 * i for i in range(50)]


def test_what_goes_wrong_is_told_apart(pool):
    late, wrong, missing, exited = [
        pool.run(name, [arguments], deadline_s=deadline_s)[0]
        for name, arguments, deadline_s in [
            ("time:sleep", (60.0,), 0.3),
            ("operator:truediv", (1, 0), 60.0),
            ("operator:no_such_function", (), 60.0),
            ("os:_exit", (3,), 60.0),
        ]
    ]
    assert late == Failure("deadline", "the deadline passed")
    assert (wrong.reason, wrong.summary) == ("error", "ZeroDivisionError: division by zero")
    assert "Traceback" in wrong.traceback
    assert (missing.reason, missing.summary[:15]) == ("error", "AttributeError:")
    assert exited == Failure("crash", "the worker ended with exit code 3")


def test_calls_fail_alone():
    pool = WorkerPool("builtins:eval", num_workers=1)
    calls = [(f"{i}",) for i in range(40)]
    calls[2] = calls[3] = ("__import__('time').sleep(60)",)
    calls[5], calls[6] = ("__import__('os')._exit(3)",), ("1 / 0",)
    results = pool.run("builtins:eval", calls, deadline_s=2.0)
    failures = {i: results[i].reason for i in (2, 3, 5, 6)}
    assert failures == {2: "deadline", 3: "deadline", 5: "crash", 6: "error"}
    assert [result for i, result in enumerate(results) if i not in failures] == [
        i for i in range(40) if i not in failures
    ]
    pool.close()


def test_each_call_has_the_whole_deadline():
    pool = WorkerPool("time:sleep", num_workers=1)
    assert pool.run("time:sleep", [(0.3,)] * 8, deadline_s=2.0) == [None] * 8
    pool.close()


def test_a_worker_is_busy_before_it_knows_of_its_call():
    worker, said = _Worker.__new__(_Worker), []
    worker.connection = SimpleNamespace(send=lambda message: said.append(worker.call))
    worker.send("operator:add", 7, (1, 2), 60.0)
    assert said == [7]


def test_memory_is_limited(pool):
    [outcome] = pool.run("builtins:bytearray", [(2 << 30,)], deadline_s=60.0)
    assert (outcome.reason, outcome.summary) == ("error", "MemoryError: ")


def test_a_kill_reaches_the_children_of_a_worker(pool, tmp_path):
    command = f"sleep 60 & echo $! > {tmp_path}/pid; wait"
    [outcome] = pool.run("os:system", [(command,)], deadline_s=3.0)
    assert outcome.reason == "deadline"
    child = int((tmp_path / "pid").read_text())
    end = time.monotonic() + 60.0
    while time.monotonic() < end:
        try:
            with open(f"/proc/{child}/stat") as file:
                if file.read().split()[2] == "Z":  # dead, not yet collected by init
                    return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    pytest.fail("the child of a killed worker lives on")


def test_a_pool_that_cannot_start_says_why():
    with pytest.raises(WorkerStartError, match="ModuleNotFoundError: .*no_such_module"):
        WorkerPool("no_such_module:f", num_workers=1)


def test_a_fork_of_the_parent_does_not_end_the_workers():
    pool = WorkerPool("os:getpid", num_workers=1)
    before = pool.run("os:getpid", [()], deadline_s=60.0)
    child = os.fork()
    if child == 0:
        pool.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert pool.run("os:getpid", [()], deadline_s=60.0) == before
    pool.close()


def test_a_worker_that_no_longer_starts_stops_the_run_but_not_the_next(tmp_path, monkeypatch):
    flag = tmp_path / "broken"
    (tmp_path / "sometimes.py").write_text(
        f"import os\nassert not os.path.exists({str(flag)!r}), 'broken now'\n"
        "from os import _exit, getpid\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = WorkerPool("sometimes:getpid", num_workers=1)
    flag.touch()
    with pytest.raises(WorkerStartError, match="AssertionError: broken now"):
        pool.run("sometimes:_exit", [(1,), (1,)], deadline_s=60.0)
    flag.unlink()
    assert isinstance(pool.run("sometimes:getpid", [()], deadline_s=60.0)[0], int)
    pool.close()
