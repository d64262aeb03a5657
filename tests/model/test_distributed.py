"""How a run leaves its process group; as a script, the two ranks that leave one."""

import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from laser_fast.model.distributed import open_world


def leave_while_gloo_is_busy():
    """A thread of gloo is still freeing the tensor of a collective that is done."""
    global mesh
    is_freeing, is_free = threading.Event(), threading.Event()

    def free_slowly():
        is_freeing.set()
        end = time.monotonic() + 2
        while time.monotonic() < end:
            pass
        is_free.set()

    with suppress(EOFError), open_world() as world:
        mesh = init_device_mesh("cpu", (world.size,))  # holds the group, as a sharded model does
        tensor = torch.ones(1)
        if world.is_main:
            weakref.finalize(tensor, free_slowly).atexit = False
        else:
            time.sleep(1)  # rank 0 cannot finish until then, and has let go of its tensor
        dist.all_reduce(tensor, async_op=True)
        del tensor
        if world.is_main:
            is_freeing.wait()
        raise EOFError  # any error: on the clean path a barrier waits for the thread, too
    if world.is_main:
        os.write(1, b"free\n" if is_free.is_set() else b"left early\n")


def finish_one_after_the_other():
    with open_world() as world:
        time.sleep(world.rank)
        finished = time.time()
    os.write(1, f"{finished} {time.time()}\n".encode())


def fail_on_one_rank():
    with open_world() as world:
        if world.rank == 0:
            raise ValueError("only here")
        world.barrier()


RANKS = (leave_while_gloo_is_busy, finish_one_after_the_other, fail_on_one_rank)


def run(function):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, function.__name__]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux")
def test_a_late_thread_of_gloo_does_not_abort_the_process():
    done = run(leave_while_gloo_is_busy)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "free\n"


def test_ranks_leave_together():
    done = run(finish_one_after_the_other)
    assert done.returncode == 0, done.stderr
    (a, left_a), (b, left_b) = (map(float, line.split()) for line in done.stdout.splitlines())
    assert min(left_a, left_b) >= max(a, b)


def test_a_failing_rank_does_not_wait_for_the_others():
    done = run(fail_on_one_rank)
    assert done.returncode == 1 and "ValueError: only here" in done.stderr


def fork_ranks(function):
    """Two ranks that end as processes of torchrun do, which those of fork_ranks.py do not."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for rank in range(2):
        if os.fork() == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            function()
            sys.exit()
    codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(2)]
    sys.exit(f"the ranks ended with {codes}" if any(codes) else 0)


if __name__ == "__main__":
    fork_ranks(next(function for function in RANKS if function.__name__ == sys.argv[1]))
