"""Stage times on a clock made of numbers, and peak memory of the process."""

import pytest
import torch

from laser_fast.log import timer as timer_module
from laser_fast.log.timer import StageTimer, peak_memory_gb


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(timer_module.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_stages_accumulate_until_popped(clock):
    timer = StageTimer(torch.device("cpu"))
    with timer("rollout"):
        clock.now += 2.0
    clock.now += 50.0
    with timer("loss"):
        clock.now += 0.5
    with timer("loss"):
        clock.now += 0.25
    assert timer.pop() == {"time/rollout": 2.0, "time/loss": 0.75}
    assert timer.pop() == {}


def test_inner_stage_is_not_counted_twice(clock):
    timer = StageTimer()
    with timer("rollout"):
        clock.now += 1.0
        with timer("score"):
            clock.now += 4.0
        clock.now += 2.0
    assert timer.pop() == {"time/rollout": 3.0, "time/score": 4.0}


def test_stage_that_fails_is_closed(clock):
    timer = StageTimer()
    with pytest.raises(RuntimeError), timer("loss"):
        clock.now += 1.0
        raise RuntimeError
    clock.now += 9.0
    with timer("step"):
        clock.now += 2.0
    assert timer.pop() == {"time/loss": 1.0, "time/step": 2.0}


def test_what_follows_a_stage_is_not_part_of_it(clock):
    def check():
        clock.now += 7.0
        if stages == ["loss"]:
            raise RuntimeError("stop")

    stages = []
    timer = StageTimer(after_stage=check)
    with timer("rollout"):
        clock.now += 2.0
    with timer.only("loss"):
        clock.now += 1.0
        stages.append("loss")
    # A stop comes after the stage, and never in place of its own failure.
    with pytest.raises(RuntimeError, match="stop"), timer("step"):
        clock.now += 4.0
    with pytest.raises(ValueError), timer("step"):
        raise ValueError
    assert timer.pop() == {"time/rollout": 2.0, "time/loss": 1.0, "time/step": 4.0}


def test_it_tells_where_it_is_and_that_a_stage_was_not_left():
    told = []
    timer = StageTimer(on_stage=told.append)
    with timer("rollout"), timer.only("sync"):
        pass
    with pytest.raises(ValueError), timer("reward"):
        raise ValueError
    assert told == ["rollout", "sync", "after sync", "after rollout", "reward"]


def test_peak_memory_of_the_process():
    """The interpreter with torch takes between 100 MB and 20 GB: the unit is right."""
    assert 0.1 < peak_memory_gb(torch.device("cpu")) < 20
    assert peak_memory_gb() >= peak_memory_gb(torch.device("cpu"))
