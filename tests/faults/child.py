"""`laser-fast` as a rank of the drill starts it: with faults, each at one place of one step.

    LASER_FAULTS='[{"action": "kill", "place": "rollout", "step": 3, "ranks": [1]}]' \
        torchrun --nproc-per-node 2 -m tests.faults.child train CONFIG --resume=auto

The product knows nothing of it: what is there to be disturbed is wrapped from here.
"""

import json
import os
import resource
import signal
import sys
import time
from importlib import import_module
from pathlib import Path

# Where a fault strikes: a function, and whether before its call, after it or between two of its
# items.
PLACES = {
    "sync": ("laser_fast.training.sampler:Sampler.sync", "before"),
    "weights": ("laser_fast.model.policy:Policy.stream_weights", "within"),
    "rollout": ("laser_fast.rollout.hf:HfEngine._decode", "before"),
    "vllm": ("laser_fast.rollout.vllm:VllmEngine._run", "before"),
    "request": ("laser_fast.rollout.vllm_server:VllmServerEngine.generate", "before"),
    "reward": ("laser_fast.training.sampler:grade_groups", "before"),
    "loss": ("laser_fast.training.trainer:joint_loss", "after"),
    "backward": ("torch:Tensor.backward", "after"),
    "optimizer": ("torch.optim:AdamW.step", "after"),
    "log": ("laser_fast.log.run_log:RunLog.log_step", "before"),
    "checkpoint": ("laser_fast.training.run:save_checkpoint", "before"),
    "write": ("os:fsync", "before"),
    "state": ("laser_fast.training.checkpoint:_check_shards", "before"),
    "rename": ("pathlib:Path.rename", "before"),
    "evaluation": ("laser_fast.training.run:_evaluate", "before"),
}
STRUCK = "struck.txt"  # a line for each fault that has struck: place and step


def main():
    from laser_fast import cli
    from laser_fast.__main__ import main as run

    cli._draw_run = lambda folder: None  # seconds of every start, for what nothing here looks at
    if "RANK" in os.environ:
        install(json.loads(os.environ.get("LASER_FAULTS", "[]")))
    sys.argv[0] = "laser-fast"
    run()


def install(faults):
    """Wrap the places of the faults, and the step, which says when one is due."""
    from laser_fast.training.trainer import Trainer

    now = []
    step = Trainer.step

    def counted(self, number):
        now[:] = [number]
        return step(self, number)

    Trainer.step = counted
    for fault in faults:
        if int(os.environ["RANK"]) in fault.get("ranks", [0]):
            wrap(fault, now)


def wrap(fault, now):
    """Let one fault strike once, at its place of the step in `now`."""
    struck = []
    name, when = PLACES[fault["place"]]
    owner, attribute = find(name)
    function = getattr(owner, attribute)

    def strike(given, arguments):
        is_now = now and 0 <= now[0] - fault["step"] <= fault.get("later", 0)
        if struck or not is_now or not is_meant(fault["place"], arguments):
            return given
        struck.append(True)
        with (Path(os.environ["LASER_DRILL"]) / STRUCK).open("a") as notes:
            notes.write(f"{fault['place']} {fault['step']}\n")
        return ACTIONS[fault["action"]](given, fault)

    def before(*arguments, **keys):
        strike(arguments[0], arguments)
        return function(*arguments, **keys)

    def after(*arguments, **keys):
        return strike(function(*arguments, **keys), arguments)

    def within(*arguments, **keys):
        for number, item in enumerate(function(*arguments, **keys)):
            if number == 1:
                strike(item, arguments)
            yield item

    setattr(owner, attribute, {"before": before, "after": after, "within": within}[when])


def find(name):
    """The owner of what "module:path" names, and its attribute."""
    module, _, path = name.partition(":")
    *owners, attribute = path.split(".")
    owner = import_module(module)
    for each in owners:
        owner = getattr(owner, each)
    return owner, attribute


def is_meant(place, arguments):
    """Of all that a function is called for, whether this is the checkpoint."""
    if place == "write":
        path = Path(f"/proc/self/fd/{arguments[0]}").resolve()
        return path.suffix == ".distcp"
    if place == "rename":
        return arguments[0].name.endswith(".partial")
    return True


def kill(given, fault):
    """This rank is gone, as after a fault of its memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_all(given, fault):
    """Everything is gone, as with its machine."""
    agent = os.getppid()
    ranks = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    for pid in (agent, *sorted(map(int, ranks), key=lambda pid: pid == os.getpid())):
        os.kill(pid, signal.SIGKILL)


def tear(given, fault):
    """What was written is torn, and this rank is gone, or everything."""
    os.ftruncate(given, os.fstat(given).st_size // 2)
    ACTIONS[fault["then"]](given, fault)


def terminate(given, fault):
    """The scheduler wants the machine back, and tells torchrun."""
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(1.0)  # until torchrun has told its ranks
    return given


def stall(given, fault):
    """This rank stands still."""
    os.kill(os.getpid(), signal.SIGSTOP)


def fill_disk(given, fault):
    """No file of this process grows beyond 100 bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    return given


def tell(given, fault):
    """A grader or the server finds the note, and does as it says."""
    (Path(os.environ["LASER_DRILL"]) / fault["whom"]).write_text(fault["what"])
    return given


def spoil(head, fault):
    """The loss of this microbatch is no number."""

    def spoilt(*arguments):
        result = head(*arguments)
        return result._replace(loss=result.loss * float("nan"))

    return spoilt


ACTIONS = {
    "kill": kill,
    "kill all": kill_all,
    "tear": tear,
    "terminate": terminate,
    "stall": stall,
    "fill disk": fill_disk,
    "tell": tell,
    "spoil": spoil,
}

if __name__ == "__main__":
    main()
