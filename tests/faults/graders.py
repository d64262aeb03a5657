"""A user's reward function, which does as the drill's note says, once."""

import os
import resource
import signal
import time
from pathlib import Path

from tests.helpers.train_ranks import reward as well

NOTE = "grader"  # in the folder of the run


def reward(completions, answers):
    fault = take_note(Path(os.environ["LASER_DRILL"]) / NOTE)
    return FAULTS[fault](completions, answers)


def take_note(path):
    """What is to be done, for the first of all processes that asks."""
    taken = path.with_name(f"{path.name}-{os.getpid()}")
    try:
        path.rename(taken)
    except FileNotFoundError:
        return None
    return taken.read_text()


def hang(completions, answers):
    time.sleep(3600)


def leave(completions, answers):
    os._exit(3)


def allocate(completions, answers):
    """10 GB, of a limit of 4 GB."""
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.RLIM_INFINITY))
    return [float(bytearray(10 << 30)[0]) for _ in completions]


def be_killed(completions, answers):
    """What the system does to whoever takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def no_number(completions, answers):
    return [float("nan")] * len(completions)


FAULTS = {
    None: well,
    "hang": hang,
    "leave": leave,
    "allocate": allocate,
    "be killed": be_killed,
    "no number": no_number,
}
