"""`laser-fast plan`: the memory that a run needs on one GPU, and what to change if it is too much.

No weights are read: the model is built from its config on torch's meta device and counted there.
Where a number depends on the data it is a bound: every token of a microbatch may be a head row.

    P  parameters: L blocks of B, and R outside them     D, F, V  hidden, MLP and vocabulary size
    t  parameters of a block's adapters, with LoRA       W  parameters that are trained: P or L t
    S  ranks that share the parameters                   Dkv  key-value heads times head dimension
    T  tokens of a microbatch, N = T rows of the head    c  bytes of the compute dtype
    A  bytes that a block keeps of a token, G  bytes of its gradients     M  memory of the GPU
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from laser_fast.config_errors import ConfigError
from laser_fast.model.distributed import check_world
from laser_fast.model.lora import check_targets, linear_layers
from laser_fast.model.policy import compute_dtype, load_model_config

if TYPE_CHECKING:
    from laser_fast.config import Config, ModelConfig

# Allowances, not measurements: CUDA context, NCCL buffers, CUDA graphs of a sleeping engine and
# gaps of the allocator; and what vLLM's own forward takes out of its share.
RESERVE_GB = 4.0
VLLM_FORWARD_GB = 2.0
WORKSPACE_MB = 2600.0  # laser_kernels' default on a GPU
FOUR_NORMS = ("gemma2", "gemma3_text", "glm4")  # around attention and MLP
NORMS_OF_HEADS = ("gemma3_text", "olmo2", "olmo3", "qwen3", "qwen3_moe")


class Term(NamedTuple):
    """Bytes on one GPU and how they come about."""

    name: str
    bytes: float
    formula: str


@dataclass(frozen=True)
class Plan:
    """A configuration on GPUs, and the memory of each phase of its steps."""

    config: Config
    model: PretrainedConfig
    num_parameters: int  # P
    num_block_parameters: int  # B
    num_gpus: int
    memory_gb: float  # M, in units of 1e9 bytes
    workspace_mb: float = WORKSPACE_MB
    num_adapter_parameters: int = 0  # t

    def __post_init__(self) -> None:
        check_world(self.config, self.num_gpus)  # one rank on each GPU

    @property
    def num_shards(self) -> int:
        """S."""
        return self.num_gpus // self.config.model.replicas

    @property
    def num_trained(self) -> int:
        """W."""
        return self.model.num_hidden_layers * self.num_adapter_parameters or self.num_parameters

    @property
    def compute_bytes(self) -> int:
        """The c of a GPU."""
        return compute_dtype(self.config.model, torch.device("cuda")).itemsize

    @property
    def sequence_bytes(self) -> int:
        """Keys and values of a longest sequence."""
        per_layer = 2 * self.compute_bytes * _head_widths(self.model)[1]
        return self.config.max_sequence_tokens * self.model.num_hidden_layers * per_layer

    @cached_property
    def phases(self) -> dict[str, tuple[Term, ...]]:
        """The phases of a step, each with the terms that are in memory together."""
        model, config, c = self.model, self.config, self.compute_bytes
        L, D, V = model.num_hidden_layers, model.hidden_size, model.vocab_size
        B, R = self.num_block_parameters, self.num_parameters - L * self.num_block_parameters
        has_adapters = self.num_adapter_parameters > 0
        share = 0 if config.model.cpu_offload else self.num_trained / self.num_shards
        kept = [
            Term("parameters", 4 * share, "4 W / S, float32 masters"),
            Term("optimizer", 8 * share, "8 W / S, AdamW's two moments in float32"),
        ]
        if has_adapters:
            frozen = 0 if config.model.cpu_offload else c * self.num_parameters / self.num_shards
            kept.append(Term("frozen weights", frozen, "c P / S"))
        elif config.loss.kl_coef > 0:
            kept.append(Term("reference policy", 4 * share, "4 P / S, for loss.kl_coef > 0"))
        gradients = Term("gradients", 4 * share, "4 W / S, float32")
        update = Term("temporary of AdamW", 4 * share, "4 W / S")
        gathered = Term("gathered weights", c * (R + 2 * B), "c (R + 2 B): root and two blocks")
        formula = "c R + (c + 4) B: root, and a block on its way to its shards"
        reducing = Term("unsharded gradients", c * R + (c + 4) * B, formula)
        root = Term("reduction of the root", (2 * c + 4) * R, "(2 c + 4) R, with a float32 copy")
        if has_adapters:
            trained = (c + 4) * self.num_adapter_parameters
            reducing = Term("unsharded gradients", trained, "(c + 4) t: adapters of a block")
            root = Term("reduction of the root", 0, "frozen")

        T = config.optim.tokens_per_microbatch
        A = activation_bytes_per_token(
            model,
            c,
            repeats_keys=config.model.attention == "varlen",
            keys_per_token=config.rollout.group_size,  # each completion repeats its prompt's
        )
        # Gradients of two MLP-wide and two hidden-wide tensors exist while a block runs backward.
        G = 2 * c * (_mlp_width(model) + D)
        activations = Term("activations", T * L * A, f"T L A, A = {A}")
        block = Term("block at work", T * G, f"T G, G = {G}")
        if config.model.gradient_checkpointing:
            activations = Term("activations", T * L * c * D, "T L c D, the inputs of the blocks")
            block = Term("block at work", T * (A + G), f"T (A + G), A = {A}, G = {G}")
        # A chunk of logits beside a rounded dW; or half of it, then a rounded copy, beside float32.
        both, chunk = V * D + T * D, min(self.workspace_mb * 1e6, 4 * T * V)
        peak = max(c * V * D + 4 * T * D + chunk, 4 * both + max(chunk / 2, c * both))
        formula = "max(c V D + 4 N D + C, 4 (V D + N D) + max(C / 2, c (V D + N D))) + c N D"
        if has_adapters:  # a frozen head has no gradient
            peak, formula = 4 * T * D + chunk, "4 N D + C + c N D"
        head = Term("head", peak + c * T * D, formula + ", C = LASER_KERNELS_WORKSPACE_MB")
        running = (*kept, gradients, gathered, activations)
        return {
            "head and loss": (*running, head),
            "backward of the blocks": (*running, reducing, block),
            "end of backward": (*kept, gradients, root),
            "optimizer step": (*kept, gradients, update),
            **{name: (*kept, *terms) for name, terms in self._engine_phases().items()},
        }

    def _engine_phases(self) -> dict[str, tuple[Term, ...]]:
        """What sampling and the weight sync add to what the trainer keeps."""
        rollout, policy = self.config.rollout, self.compute_bytes * self.num_parameters
        table = self.compute_bytes * self.model.vocab_size * self.model.hidden_size
        if rollout.engine == "vllm_server":
            formula = "rollout.sync_buffer_mb + c V D, the largest tensor"
            buffer = Term("sync buffer", rollout.sync_buffer_mb * 2**20 + table, formula)
            return {"rollout": (), "weight sync": (buffer,)}
        if rollout.engine == "hf":
            batch = self.config.data.prompts_per_step * rollout.group_size // self.num_gpus
            count = min(rollout.max_num_seqs, batch)
            formula = f"{count} sequences x {self.config.max_sequence_tokens} tokens x 2 L Dkv c"
            cache = Term("key-value cache", count * self.sequence_bytes, formula)
            return {"rollout": (Term("gathered policy", policy, "c P, all of it"), cache)}
        formula = "c P / rollout.tensor_parallel; asleep (level 2) in training: 0"
        weights = Term("engine weights", policy / rollout.tensor_parallel, formula)
        room = max(rollout.gpu_memory_fraction * self.memory_gb * 1e9 - weights.bytes, 0.0)
        cache = Term("key-value cache", room, "rollout.gpu_memory_fraction M - engine weights")
        formula = "c V D (1 + 1 / S): the largest tensor, gathered, and this rank's part"
        buffer = Term("sync buffer", table * (1 + 1 / self.num_shards), formula)
        return {"rollout": (weights, cache), "weight sync": (weights, buffer)}

    @property
    def terms(self) -> dict[str, Term]:
        """Every term by name."""
        return {term.name: term for terms in self.phases.values() for term in terms}

    @property
    def peaks(self) -> dict[str, float]:
        """GB that each phase needs, the reserve included."""
        phases = self.phases.items()
        return {name: sum(t.bytes for t in terms) / 1e9 + RESERVE_GB for name, terms in phases}

    @property
    def num_cached(self) -> float:
        """Number of longest sequences that vLLM's cache holds; infinity for other engines."""
        if self.config.rollout.engine != "vllm":
            return math.inf
        split = min(self.config.rollout.tensor_parallel, self.model.num_key_value_heads)
        room = self.terms["key-value cache"].bytes - VLLM_FORWARD_GB * 1e9
        return max(room, 0.0) * split / self.sequence_bytes

    def misfits(self) -> int:
        """Count the phases that do not fit, and a cache that does not hold one sequence."""
        return sum(peak > self.memory_gb for peak in self.peaks.values()) + (self.num_cached < 1)

    @property
    def host_gb(self) -> float:
        """Parameters, gradients and optimizer in host memory per GPU, with model.cpu_offload."""
        num_bytes = 16 * self.num_trained
        if self.num_adapter_parameters:
            num_bytes += self.compute_bytes * self.num_parameters
        elif self.config.loss.kl_coef > 0:
            num_bytes += 4 * self.num_parameters
        return self.config.model.cpu_offload * 1e-9 * num_bytes / self.num_shards


def plan_run(config: Config, *, num_gpus: int, memory_gb: float) -> Plan:
    """Plan a run on `num_gpus` GPUs of `memory_gb` (1e9 bytes) each; reads no weights."""
    try:
        model = load_model_config(config.model)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; a plan needs only its config.json: without network, put that file into a "
            "folder and add model.path=FOLDER"
        ) from None
    workspace = float(os.environ.get("LASER_KERNELS_WORKSPACE_MB") or WORKSPACE_MB)
    counts, adapters = count_parameters(model), count_adapters(model, config.model)
    return Plan(config, model, *counts, num_gpus, memory_gb, workspace, adapters)


def count_parameters(model: PretrainedConfig) -> tuple[int, int]:
    """Count P and B of the model that a config describes, without allocating any."""
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(model)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (whole, whole.model.layers[0])]
    return sizes[0], sizes[1]


def count_adapters(model: PretrainedConfig, config: ModelConfig) -> int:
    """Count t likewise; 0 without LoRA."""
    if not config.lora_rank:
        return 0
    with torch.device("meta"):
        layers = linear_layers(AutoModelForCausalLM.from_config(model))
    check_targets(config, layers)
    return config.lora_rank * sum(sum(layers[name]) for name in config.lora_targets or layers)


def activation_bytes_per_token(
    model: PretrainedConfig, c: int, *, repeats_keys: bool, keys_per_token: int = 1
) -> int:
    """A: what one block keeps of a token for its backward, in plain transformers layers.

    Norms keep a float32 copy, their normalized and their scaled output; attention keeps query,
    key, value, output and a float32 logsumexp per head; the MLP keeps four tensors of width F.
    With `repeats_keys` key and value are repeated to the query heads; there are at
    most `keys_per_token` of them, the size of a group whose completions are short.
    """
    query, key = _head_widths(model)
    norms = (4 if model.model_type in FOUR_NORMS else 2) * (4 + 2 * c) * model.hidden_size
    if model.model_type in NORMS_OF_HEADS:  # of query and key
        norms += (4 + c) * (query + key)
    kept_keys = keys_per_token * (query if repeats_keys else key)
    attention = 2 * c * (query + kept_keys) + 4 * model.num_attention_heads
    return norms + attention + 4 * c * _mlp_width(model)


def _mlp_width(model: PretrainedConfig) -> int:
    """F; of a mixture of experts that of those that a token meets."""
    chosen = getattr(model, "num_experts_per_tok", None)
    width = getattr(model, "moe_intermediate_size", None) or model.intermediate_size
    return chosen * width if chosen else width


def _head_widths(model: PretrainedConfig) -> tuple[int, int]:
    """Widths of a token's queries, and of its keys (Dkv)."""
    heads = model.num_attention_heads
    dim = getattr(model, "head_dim", None) or model.hidden_size // heads
    return heads * dim, model.num_key_value_heads * dim


def advise(plan: Plan) -> tuple[list[str], Plan]:
    """Find changes that make a plan fit, worded as they are typed, and the plan after them.

    Sets of switches are tried in turn, those that cost less time first and the empty set before
    all, each with the values that it needs; more GPUs come last. An empty list: nothing helps.
    """
    prompts, model, full = plan.config.data.prompts_per_step, plan.config.model, plan.workspace_mb
    parts = math.lcm(model.replicas, plan.config.rollout.tensor_parallel)
    # The costliest switch first: `product` varies the last the fastest.
    switches = {"cpu_offload": True, "replicas": 1, "gradient_checkpointing": True}
    for num_gpus, *values, workspace_mb in product(
        [n for n in range(plan.num_gpus, prompts + 1) if prompts % n == 0 and n % parts == 0],
        *(dict.fromkeys((getattr(model, key), value)) for key, value in switches.items()),
        dict.fromkeys((full, min(full, 256))),
    ):
        new = replace(plan, num_gpus=num_gpus, workspace_mb=workspace_mb)
        new = _tune(_set(new, "model", **dict(zip(switches, values, strict=True))))
        if not new.misfits():
            old, settings = _settings(plan), _settings(new).items()
            return [f"{k}={json.dumps(value)}" for k, value in settings if value != old[k]], new
    return [], plan


def _tune(plan: Plan) -> Plan:
    """Move values in turn, each as little as possible, until as many phases fit as can."""
    rollout = plan.config.rollout
    longest = plan.config.data.max_prompt_tokens + rollout.max_new_tokens
    numbers = [rollout.max_num_seqs >> n for n in range(rollout.max_num_seqs.bit_length())]
    engines = [
        {"tensor_parallel": parts, "gpu_memory_fraction": share}
        for parts in range(rollout.tensor_parallel, plan.num_gpus + 1)
        if plan.num_gpus % parts == 0 and plan.model.num_attention_heads % parts == 0
        for share in (rollout.gpu_memory_fraction, *(n / 20 for n in range(19, 0, -1)))
    ]
    tokens = plan.config.optim.tokens_per_microbatch
    budgets = (tokens, *range((tokens - 1) // 512 * 512, longest, -512), longest)
    # The first of equals wins, so that nothing moves in vain.
    plan = min((_set(plan, "rollout", max_num_seqs=n) for n in numbers), key=Plan.misfits)
    plan = min((_set(plan, "rollout", **e) for e in engines), default=plan, key=Plan.misfits)
    return min((_set(plan, "optim", tokens_per_microbatch=n) for n in budgets), key=Plan.misfits)


def _set(plan: Plan, section: str, **values: float | bool) -> Plan:
    """The plan with other values; these are known to be valid, so nothing validates them again."""
    part = getattr(plan.config, section).model_copy(update=values)
    return replace(plan, config=plan.config.model_copy(update={section: part}))


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
        f"B = {B:,} + R = {plan.num_parameters - L * B:,}\n"
        f"{plan.num_gpus} GPUs of M = {plan.memory_gb:g} GB, S = {plan.num_shards} shards, "
        f"c = {plan.compute_bytes} bytes, T = N = {plan.config.optim.tokens_per_microbatch:,} "
        f"tokens, L = {L}, D = {model.hidden_size}, F = {model.intermediate_size}, "
        f"V = {model.vocab_size}, Dkv = {_head_widths(model)[1]}",
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
        console.print(f"model.cpu_offload keeps {plan.host_gb:.1f} GB per GPU in host memory")
    if plan.num_cached < math.inf:
        longest = plan.config.max_sequence_tokens
        console.print(f"The cache holds {plan.num_cached:.0f} sequences of {longest} tokens")
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
