"""What to change where a run does not fit, and the words of `laser-fast plan`."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from laser_fast.plan.memory import RESERVE_GB, Plan, count_adapters, head_widths

# The mildest first. What leaves every number as it is comes before what rounds (state_bits) or
# trains something else (lora_rank, and then lora_4bit, which rounds the weights of what is trained
# and of what comes out), but for cpu_offload, which may cost more time than the step itself and 16
# bytes of host memory a parameter. Among equals, what costs less time: another gather, which the
# backward hides and which is the default, smaller chunks of logits and shorter microbatches, a
# third more computation, copies over the bus, gathers between nodes. None of these costs has been
# measured on a GPU yet.
SWITCHES: dict[str, Any] = {
    "model.reshard_after_forward": True,
    "LASER_KERNELS_WORKSPACE_MB": 256,
    "model.gradient_checkpointing": True,
    "model.activation_offload": True,
    "model.replicas": 1,
    "optim.state_bits": 8,
    "model.cpu_offload": True,
    "model.lora_rank": 32,
    "model.lora_4bit": True,
}


def advise(plan: Plan, switches: Iterable[str] = SWITCHES) -> tuple[list[str], Plan]:
    """Find changes that make a plan fit, worded as they are typed, and the plan after them.

    All switches are turned, but for 4 bits where it fits without, since these stay on the GPU when
    other weights leave it; then back again, the hardest first, where it fits without; each with the
    values that it needs. More GPUs come last. An empty list: nothing helps.
    """
    prompts, parts = plan.config.data.prompts_per_step, plan.config.rollout.tensor_parallel
    parts = math.lcm(plan.config.model.replicas, parts)
    for num_gpus in range(plan.num_gpus, prompts + 1):
        if prompts % num_gpus or num_gpus % parts:
            continue
        for left_out in ("model.lora_4bit", ""):
            chosen = {name: SWITCHES[name] for name in switches if name != left_out}
            new = _tune(_turn(replace(plan, num_gpus=num_gpus), chosen))
            if not new.misfits():
                break
        else:
            continue
        for name in reversed(chosen):
            fewer = {key: value for key, value in chosen.items() if key != name}
            without = _tune(_turn(replace(plan, num_gpus=num_gpus), fewer))
            if not without.misfits():
                chosen, new = fewer, without
        return _changes(plan, new), new
    return [], plan


def proposals(plan: Plan) -> Iterator[tuple[str, float, Plan]]:
    """Every change that helps alone, the mildest first: its words, GB it saves, the plan after it.

    Saved is what the phase that needs most needs less.
    """
    tokens = _tune_tokens(plan)
    if tokens.misfits() == plan.misfits():
        tokens = _turn(plan, {"optim.tokens_per_microbatch": _longest(plan)})
    worst = max(plan.peaks, key=plan.peaks.__getitem__)
    single = (_turn(plan, {name: value}) for name, value in SWITCHES.items())
    for new in (_tune_engine(plan), tokens, *single):
        saved = plan.peaks[worst] - new.peaks[worst]
        if saved > 0 or new.misfits() < plan.misfits():
            yield ", ".join(_changes(plan, new)), saved, new


def _turn(plan: Plan, values: dict[str, Any]) -> Plan:
    """The plan with other values, which are known to be valid; none goes back."""
    for name, value in values.items():
        section, _, key = name.rpartition(".")
        if not section:
            plan = replace(plan, workspace_mb=min(plan.workspace_mb, value))
        elif name != "model.lora_rank" or not plan.config.model.lora_rank:
            update = {key: value}
            if name == "model.lora_4bit":  # of adapters, whose rank may have been turned back
                update["lora_rank"] = plan.config.model.lora_rank or SWITCHES["model.lora_rank"]
            part = getattr(plan.config, section).model_copy(update=update)
            plan = replace(plan, config=plan.config.model_copy(update={section: part}))
    if plan.config.model.lora_rank and not plan.num_adapter_parameters:
        adapters, linear = count_adapters(plan.model, plan.config.model)
        plan = replace(plan, num_adapter_parameters=adapters, num_linear_parameters=linear)
    return plan


def _tune(plan: Plan) -> Plan:
    """Move values in turn, each as little as possible, until as many phases fit as can."""
    return _tune_tokens(_tune_engine(plan))


def _tune_engine(plan: Plan) -> Plan:
    rollout = plan.config.rollout
    numbers = [rollout.max_num_seqs >> n for n in range(rollout.max_num_seqs.bit_length())]
    engines = [
        {"rollout.tensor_parallel": parts, "rollout.gpu_memory_fraction": share}
        for parts in range(rollout.tensor_parallel, plan.num_gpus + 1)
        if plan.num_gpus % parts == 0 and plan.model.num_attention_heads % parts == 0
        for share in (rollout.gpu_memory_fraction, *(n / 20 for n in range(19, 0, -1)))
    ]
    # The first of equals wins, so that nothing moves in vain.
    plans = (_turn(plan, {"rollout.max_num_seqs": number}) for number in numbers)
    plan = min(plans, key=Plan.misfits)
    return min((_turn(plan, engine) for engine in engines), default=plan, key=Plan.misfits)


def _tune_tokens(plan: Plan) -> Plan:
    tokens, longest = plan.config.optim.tokens_per_microbatch, _longest(plan)
    budgets = (tokens, *range((tokens - 1) // 512 * 512, longest, -512), longest)
    plans = (_turn(plan, {"optim.tokens_per_microbatch": budget}) for budget in budgets)
    return min(plans, key=Plan.misfits)


def _longest(plan: Plan) -> int:
    """The least tokens_per_microbatch that a run takes."""
    return plan.config.data.max_prompt_tokens + plan.config.rollout.max_new_tokens


def _changes(old: Plan, new: Plan) -> list[str]:
    """What differs, as a user types it."""
    before, after = (_settings(plan).items() for plan in (old, new))
    return [f"{k}={json.dumps(value)}" for (k, value) in after if (k, value) not in before]


def _settings(plan: Plan) -> dict[str, object]:
    """What advice may change, by the name that a user types."""
    parts = {name: getattr(plan.config, name) for name in ("model", "rollout", "optim")}
    settings = {f"{name}.{key}": value for name, part in parts.items() for key, value in part}
    other = {"--gpus": plan.num_gpus, "LASER_KERNELS_WORKSPACE_MB": plan.workspace_mb}
    return other | settings


def print_plan(plan: Plan) -> None:
    """Print sizes, terms with formulas, phases, and what to change when they do not fit."""
    from rich.console import Console
    from rich.table import Column, Table

    console, model = Console(markup=False, highlight=False), plan.model
    B, L = plan.num_block_parameters, model.num_hidden_layers
    console.print(
        f"{plan.config.model.path}: P = {plan.num_parameters:,} parameters = {L} blocks x "
        f"B = {B:,} + R = {plan.num_root_parameters:,}\n"
        f"{plan.num_gpus} GPUs of M = {plan.memory_gb:g} GB, S = {plan.num_shards} shards, "
        f"c = {plan.compute_bytes} bytes, T = N = {plan.config.optim.tokens_per_microbatch:,} "
        f"tokens, L = {L}, D = {model.hidden_size}, F = {model.intermediate_size}, "
        f"V = {model.vocab_size}, Dkv = {head_widths(model)[1]}, q = {plan.num_quantized:,}",
        soft_wrap=True,
    )
    terms = Table("per GPU", Column("GB", justify="right"), "formula")
    for name, num_bytes, formula in plan.terms.values():
        terms.add_row(name, f"{num_bytes / 1e9:.3f}", formula)
    reserve = f"its terms, and {RESERVE_GB:g} GB for context, NCCL and gaps of the allocator"
    phases = Table("phase", Column("GB", justify="right"), reserve)
    for name, peak in plan.peaks.items():
        names = ", ".join(term.name for term in plan.phases[name] if term.bytes)
        phases.add_row(name, f"{peak:.3f}", names)
    console.print(terms, phases)
    if plan.host_gb:
        console.print(f"{plan.host_gb:.1f} GB per GPU are in host memory")
    if plan.num_cached < math.inf:
        longest = plan.config.max_sequence_tokens
        console.print(f"The cache holds {plan.num_cached:.0f} sequences of {longest} tokens")
    if plan.misfits():
        columns = [Column(name, justify="right") for name in ("saves GB", "needs GB", "fits")]
        changes = Table("one change alone, the mildest first", *columns)
        for words, saved, new in proposals(plan):
            fits = "no" if new.misfits() else "yes"
            changes.add_row(words, f"{saved:.3f}", f"{max(new.peaks.values()):.3f}", fits)
        console.print(changes)
    console.print(verdict(plan), soft_wrap=True)


def verdict(plan: Plan) -> str:
    """One or two sentences: whether it fits, and if not, what to change."""
    memory, worst = plan.memory_gb, max(plan.peaks, key=plan.peaks.__getitem__)
    problem = f"{worst} needs {plan.peaks[worst]:.1f} of {memory:g} GB"
    if not plan.misfits():
        return f"It fits: {problem}."
    if plan.peaks[worst] <= memory:
        problem = f"the cache holds only {plan.num_cached:.2f} of a longest sequence"
    changes, after = advise(plan)
    if not changes:
        return f"It does not fit: {problem}, and nothing here makes it fit; take a smaller model."
    then = f"{max(after.peaks.values()):.1f} GB"
    return f"It does not fit: {problem}. Change {', '.join(changes)}: then it needs {then}."
