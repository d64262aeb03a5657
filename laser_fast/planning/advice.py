"""What to change when a plan does not fit: keys with values, tried by planning again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from laser_fast.config import Config
from laser_fast.planning.memory import RESERVE_GB, Plan, Setup, plan_memory

# Beyond this a plan is no plan.
_MAX_GPUS = 1024


@dataclass(frozen=True, slots=True)
class Change:
    """One thing to change, worded as it is typed, and the setup after it."""

    text: str
    setup: Setup


Lever = Callable[[Plan], Change | None]


def advise(plan: Plan) -> tuple[list[str], Plan]:
    """Changes that make a plan fit, and the plan after them; as few as possible.

    The cheapest lever that is enough by itself wins; otherwise all that are needed. More GPUs come
    only when the present ones cannot do. An empty list: nothing helps.
    """
    for count in _gpu_counts(plan.setup):
        changes, after = _pull_levers(plan_memory(replace(plan.setup, num_gpus=count)))
        if after.fits:
            more = [f"{count} GPUs"] if count != plan.setup.num_gpus else []
            return [*more, *changes], after
    return [], plan


def _pull_levers(plan: Plan) -> tuple[list[str], Plan]:
    """The changes that make it fit on these GPUs, and the plan after them, fitting or not."""
    if plan.fits:
        return [], plan
    for pull in _LEVERS:
        changes, after = _apply(plan, [pull])
        if after.fits:
            return changes, after
    if not _apply(plan, _LEVERS)[1].fits:
        return [], plan
    # Everything together is enough: leave out what is not needed, the most expensive first.
    pulled = list(_LEVERS)
    for pull in reversed(_LEVERS):
        others = [other for other in pulled if other is not pull]
        if _apply(plan, others)[1].fits:
            pulled = others
    return _apply(plan, pulled)


def _apply(plan: Plan, levers: Sequence[Lever]) -> tuple[list[str], Plan]:
    """Pull levers; those that choose a value come last, when it may be the mildest."""
    changes = []
    for pull in sorted(levers, key=_ORDER.index):
        change = pull(plan)
        if change is not None:
            changes.append(change.text)
            plan = plan_memory(change.setup)
    return changes, plan


def _gpu_counts(setup: Setup) -> list[int]:
    """The present number and larger ones that the configuration divides over."""
    prompts = setup.config.data.prompts_per_step
    parts = math.lcm(setup.config.model.replicas, setup.config.rollout.tensor_parallel)
    return [
        count
        for count in range(setup.num_gpus, min(prompts, _MAX_GPUS) + 1)
        if prompts % count == 0 and count % parts == 0
    ]


def _checkpointing(plan: Plan) -> Change | None:
    if plan.setup.config.model.gradient_checkpointing:
        return None
    return _set(plan.setup, "model", "gradient_checkpointing", True)


def _smaller_microbatch(plan: Plan) -> Change | None:
    """The largest budget that fits, or else the smallest that holds a sequence."""
    now = plan.setup.config.optim.tokens_per_microbatch
    least = plan.setup.longest - 1
    if now <= least:
        return None
    fitting = least
    for tokens in range(-(-least // 512) * 512, now, 512):
        change = _set(plan.setup, "optim", "tokens_per_microbatch", tokens)
        trained = max(phase.bytes for phase in plan_memory(change.setup).phases[:2])
        if trained / 1e9 + RESERVE_GB <= plan.setup.memory_gb:
            fitting = tokens
    return _set(plan.setup, "optim", "tokens_per_microbatch", fitting)


def _smaller_workspace(plan: Plan) -> Change | None:
    if plan.setup.workspace_mb <= 256:
        return None
    return Change("LASER_KERNELS_WORKSPACE_MB=256", replace(plan.setup, workspace_mb=256.0))


def _memory_fraction(plan: Plan) -> Change | None:
    """What the rollout leaves free, in steps of a twentieth."""
    rollout = plan.setup.config.rollout
    if rollout.engine != "vllm":
        return None
    terms = {phase.name: phase for phase in plan.phases}["rollout"].terms
    others = sum(t.bytes for t in terms if t.name not in ("engine weights", "key-value cache"))
    free = 1 - (others / 1e9 + RESERVE_GB) / plan.setup.memory_gb
    fraction = math.floor(free * 20) / 20
    if fraction <= 0 or fraction == rollout.gpu_memory_fraction:
        return None
    return _set(plan.setup, "rollout", "gpu_memory_fraction", fraction)


def _tensor_parallel(plan: Plan) -> Change | None:
    """The smallest larger division of the engine whose cache holds a sequence, or the largest."""
    setup, now = plan.setup, plan.setup.config.rollout.tensor_parallel
    change = None
    if setup.config.rollout.engine != "vllm":
        return None
    for parts in range(now + 1, setup.num_gpus + 1):
        if setup.num_gpus % parts == 0 and setup.size.num_heads % parts == 0:
            change = _set(setup, "rollout", "tensor_parallel", parts)
            if plan_memory(change.setup).cached_sequences >= 1:
                break
    return change


def _fewer_sequences(plan: Plan) -> Change | None:
    """For the engine in process: half as many at once until they fit."""
    rollout = plan.setup.config.rollout
    if rollout.engine != "hf":
        return None
    change, count = None, rollout.max_num_seqs // 2
    while count >= 1:
        change = _set(plan.setup, "rollout", "max_num_seqs", count)
        if plan_memory(change.setup).fits:
            break
        count //= 2
    return change


def _one_replica(plan: Plan) -> Change | None:
    if plan.setup.config.model.replicas == 1:
        return None
    return _set(plan.setup, "model", "replicas", 1)


def _offload(plan: Plan) -> Change | None:
    if plan.setup.config.model.cpu_offload:
        return None
    return _set(plan.setup, "model", "cpu_offload", True)


# In the order of what they cost in time: memory for nothing first, host memory last.
_LEVERS: tuple[Lever, ...] = (
    _memory_fraction,
    _smaller_workspace,
    _smaller_microbatch,
    _fewer_sequences,
    _checkpointing,
    _tensor_parallel,
    _one_replica,
    _offload,
)
_ORDER: tuple[Lever, ...] = (
    _smaller_workspace,
    _checkpointing,
    _one_replica,
    _offload,
    _memory_fraction,
    _tensor_parallel,
    _smaller_microbatch,
    _fewer_sequences,
)


def _set(setup: Setup, section: str, key: str, value: float | bool) -> Change:
    """The setup with one key changed; the values here are valid, so nothing is validated anew."""
    part = getattr(setup.config, section).model_copy(update={key: value})
    config: Config = setup.config.model_copy(update={section: part})
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    return Change(f"{section}.{key}={shown}", replace(setup, config=config))
