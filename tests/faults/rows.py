"""The table of faults: what is done, where, and what has to come of it."""

import hashlib
import shutil

from .drill import Row

# Of a step, in their order; "write" is a checkpoint's, "rename" is between its two names.
STAGES = ("sync", "rollout", "reward", "backward", "optimizer", "write", "rename")
STOPPED = "stopped by SIGTERM; continue with --resume"
SUMS = "SHA256SUMS"


def at(place, action, **more):
    """An injection; what is written when a kill strikes is torn."""
    if place == "write" and action.startswith("kill"):
        more["then"], action = action, "tear"
    return {"place": place, "action": action, **more}


def note(whom, what, *, place):
    return at(place, "tell", whom=whom, what=what)


# Damage to a checkpoint, and what is done about it.


def flip_a_byte(checkpoint):
    """In the middle of the largest shard, where the numbers of tensors are."""
    shard = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0x40
    shard.write_bytes(content)


def change_the_state(checkpoint):
    state = checkpoint / "trainer.json"
    state.write_text(state.read_text().replace('"bad_steps": 0', '"bad_steps": 1'))


def lose_a_shard(checkpoint):
    next(checkpoint.glob("__1_*.distcp")).unlink()


def cut_a_shard(checkpoint):
    shard = next(checkpoint.glob("__1_*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])


def lose_the_state(checkpoint):
    (checkpoint / "trainer.json").unlink()


def be_of_another_run(checkpoint):
    """Whole, but of a run with another learning rate."""
    config, sums = checkpoint / "config.toml", checkpoint / SUMS
    before = hashlib.sha256(config.read_bytes()).hexdigest()
    config.write_text(config.read_text().replace("lr = 0.0005", "lr = 0.005"))
    after = hashlib.sha256(config.read_bytes()).hexdigest()
    sums.write_text(sums.read_text().replace(before, after))


ROWS = [
    *(Row("SIGKILL of all ranks", place, inject=at(place, "kill all")) for place in STAGES),
    Row(
        "SIGKILL of all ranks",
        "rename after a later step",
        inject=at("rename", "kill all", later=2),  # in the background it is a step, or a save, on
        overrides=("checkpoint.asynchronous=true",),
    ),
    *(
        Row(
            "SIGKILL of one rank",
            place,
            says="SIGKILL",
            inject=at(place, "kill", ranks=[0 if place == "rename" else 1]),
        )
        for place in STAGES
    ),
    *(Row("SIGTERM", place, says=STOPPED, inject=at(place, "terminate")) for place in STAGES),
    *(
        Row(
            "disk full",
            place,
            says=f"error: .*{says}.*",
            inject=at(place, "fill disk", ranks=[0, 1]),
        )
        for place, says in (
            ("checkpoint", "cannot be written: .*; make room, resume"),
            ("state", "cannot be written: .*File too large; make room, resume"),
            ("log", "cannot be written: .*File too large; make room, resume"),
        )
    ),
    *(
        Row(fault, "checkpoint", says=f"error: .*{says}.*", damage=damage, repair=shutil.rmtree)
        for fault, says, damage in (
            ("flipped byte", r"cannot be read: __._0.distcp is not as it was written", flip_a_byte),
            ("changed state", "cannot be read: trainer.json is not as it was", change_the_state),
            ("missing shard", "cannot be read: .*__1_0.distcp", lose_a_shard),
            ("short shard", "cannot be read: __1_0.distcp is not as it was", cut_a_shard),
            ("missing state", "cannot be read: .*trainer.json", lose_the_state),
            ("foreign configuration", "optim.lr was 0.005 and is now 0.0005", be_of_another_run),
        )
    ),
    *(
        Row(
            f"grader {fault}",
            "reward",
            says=says,
            inject=note("grader", what, place="reward"),
            goes_on=goes_on,
            overrides=("reward.batch_timeout_s=10",) if what == "hang" else (),
        )
        for fault, what, says, goes_on in (
            ("hangs", "hang", "the deadline passed; calling it with one at a time", True),
            ("exits", "leave", "ended with exit code 3; calling it with one at a time", True),
            ("is killed", "be killed", "ended with signal SIGKILL; calling it with one", True),
            ("takes 10 GB of 4 GB", "allocate", "error: .*raised MemoryError", False),
            ("returns NaN", "no number", "error: .*expected a finite number, got nan", False),
        )
    ),
    *(
        Row(
            "stalled rank",
            place,
            says=f"stages of the ranks: .*1: '{stage}'",
            inject=at(place, "stall", ranks=[1]),
            overrides=("rollout.timeout_s=45",),
            grace_s=1,
        )
        for place, stage in (("rollout", "rollout"), ("reward", "reward"), ("backward", "loss"))
    ),
    Row(
        "loss is NaN",
        "loss",
        says="the gradient norm is not finite; .*the update was skipped",
        inject=at("loss", "spoil"),
        goes_on=True,
        steps_lost=1,
    ),
    *(
        Row("SIGKILL of a rank with vLLM", place, inject=at(where, "kill all"), kind="vllm")
        for place, where in (("sync", "weights"), ("rollout", "vllm"), ("write", "write"))
    ),
    *(
        Row(
            f"server {fault}",
            place,
            says=says,
            inject=note("reload" if place == "sync" else "server", what, place=place),
            goes_on=goes_on,
            overrides=("rollout.timeout_s=45",) if what == "say nothing" else (),
            kind="server",
        )
        for fault, what, place, says, goes_on in (
            ("answers late", "be late", "request", "", True),
            ("returns over-long completions", "go on", "request", "", True),
            ("dies", "die", "request", "error: .*did not answer in 3 attempts", False),
            ("never answers", "say nothing", "request", "error: .*did not answer in 1 att", False),
            ("restarts with old weights", "forget", "request", "holds weights 'default'", False),
            ("keeps old weights", "ignore", "sync", "weights are stale or incomplete", False),
            (
                "returns too few completions",
                "leave one out",
                "request",
                "error: .*expected 4 completions, got 3",
                False,
            ),
            (
                "returns short completions",
                "cut off",
                "request",
                "error: .*expected an EOS or 30 tokens, got 1 tokens",
                False,
            ),
        )
    ),
]
