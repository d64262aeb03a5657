"""Start ranks by forking, since importing torch and transformers takes longer than the tests."""

import os
import sys
import traceback

from torch.distributed import TCPStore


def run_ranks(size, function, *arguments):
    """Call `function(*arguments)` on `size` ranks, in the environment that torchrun gives them.

    For a process that has imported what the ranks need and computed nothing yet: neither the
    threads of a parent nor their locks survive a fork.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # the agent's
    # A rank waits until all are forked: when the first one connects, the store's thread takes locks
    # that a later fork would copy as they are.
    start, all_forked = os.pipe()
    ranks = set()
    for rank in range(size):
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os.close(all_forked)
            os.read(start, 1)  # the end of the pipe
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            os._exit(_status(function, arguments))
        ranks.add(pid)
    os.close(all_forked)
    failed = 0
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if status and not failed:
            failed = status
            for other in ranks:  # they wait for it in a collective
                os.kill(other, 9)
    if failed:
        sys.exit(f"a rank failed with {os.waitstatus_to_exitcode(failed)}")


def _status(function, arguments):
    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
