"""Memory of one GPU, term by term, and which terms meet in which phase of a step.

P parameters, B of one block, R outside the blocks; S ranks that shard them; c bytes of the compute
dtype; T tokens of a microbatch; N <= T rows of the head; V vocabulary, D hidden size, F MLP size,
L blocks; M memory of the GPU. A bound is given where the exact number depends on the data: every
token of a microbatch may be a head row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from laser_fast.config_errors import ConfigError
from laser_fast.planning.sizes import ModelSize

if TYPE_CHECKING:
    from laser_fast.config import Config

# Allowances, not measurements: CUDA context, NCCL buffers, CUDA graphs of a sleeping engine and
# gaps of the allocator; and what vLLM's own forward takes out of its share.
RESERVE_GB = 4.0
VLLM_FORWARD_GB = 2.0
# laser_kernels' default on a GPU (LASER_KERNELS_WORKSPACE_MB).
WORKSPACE_MB = 1300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What is planned: a configuration on so many GPUs."""

    config: Config
    size: ModelSize
    num_gpus: int
    memory_gb: float  # of one GPU, in units of 1e9 bytes
    workspace_mb: float = WORKSPACE_MB

    def __post_init__(self) -> None:
        if self.num_gpus < 1 or self.memory_gb <= 0:
            raise ConfigError(
                f"expected at least one GPU and some memory, got {self.num_gpus} GPUs of "
                f"{self.memory_gb:g} GB"
            )
        for key, parts in (
            ("model.replicas", self.config.model.replicas),
            ("rollout.tensor_parallel", self.config.rollout.tensor_parallel),
        ):
            if self.num_gpus % parts:
                raise ConfigError(
                    f"{key} = {parts} does not divide {self.num_gpus} GPUs; choose a divisor"
                )
        prompts = self.config.data.prompts_per_step
        if prompts % self.num_gpus:
            raise ConfigError(
                f"data.prompts_per_step = {prompts} does not divide over {self.num_gpus} GPUs; "
                "choose another number of either"
            )

    @property
    def num_shards(self) -> int:
        """S."""
        return self.num_gpus // self.config.model.replicas

    @property
    def compute_bytes(self) -> int:
        """c; the automatic dtype is bfloat16 on a GPU."""
        return 4 if self.config.model.compute_dtype == "float32" else 2

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, the score's position included."""
        return self.config.data.max_prompt_tokens + self.config.rollout.max_new_tokens + 1

    @property
    def kv_bytes_per_token(self) -> float:
        """Keys and values of one token in one engine rank's cache."""
        split = min(self.config.rollout.tensor_parallel, self.size.num_key_value_heads)
        return 2 * self.size.num_layers * self.size.key * self.compute_bytes / split


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """Bytes on one GPU and how they come about."""

    name: str
    bytes: float
    formula: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """Terms that are in memory together."""

    name: str
    terms: tuple[Term, ...]

    @property
    def bytes(self) -> float:
        """Sum of the terms."""
        return sum(term.bytes for term in self.terms)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All phases of a step; the largest decides."""

    setup: Setup
    phases: tuple[Phase, ...]
    host_bytes: float  # per GPU, with cpu_offload
    cached_sequences: float | None  # of the longest length that vLLM's cache holds

    @property
    def worst(self) -> Phase:
        """The phase with the most memory."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def peak_gb(self) -> float:
        """The worst phase and the reserve."""
        return self.worst.bytes / 1e9 + RESERVE_GB

    @property
    def fits(self) -> bool:
        """Whether the worst phase fits, and a sequence into the engine's cache."""
        has_cache = self.cached_sequences is None or self.cached_sequences >= 1
        return self.peak_gb <= self.setup.memory_gb and has_cache

    @property
    def terms(self) -> dict[str, Term]:
        """Every term by name."""
        return {term.name: term for phase in self.phases for term in phase.terms}


def plan_memory(setup: Setup) -> Plan:
    """Plan every phase of a training step on one GPU."""
    size, c, shards = setup.size, setup.compute_bytes, setup.num_shards
    kept = _sharded(setup)
    at_home = 0 if setup.config.model.cpu_offload else 1
    gradients = Term(
        name="gradients", bytes=at_home * 4 * size.total / shards, formula="4 P / S, float32"
    )
    unsharded = Term(
        name="gathered weights",
        bytes=c * (size.root + 2 * size.block),
        formula="c (R + 2 B): root, this block and the next",
    )
    reducing = Term(
        name="unsharded gradients",
        bytes=c * size.root + (c + 4) * size.block,
        formula="c R + (c + 4) B: root, and a block on its way to its shards",
    )
    root = Term(
        name="reduction of the root",
        bytes=(2 * c + 4) * size.root,
        formula="(2 c + 4) R: weights, gradients and their float32 copy",
    )
    update = Term(
        name="temporary of AdamW", bytes=at_home * 4 * size.total / shards, formula="4 P / S"
    )
    engine, sync, cached = _engine(setup)
    activations, block = _activations(setup)
    running = (*kept, gradients, unsharded, activations)
    phases = [
        Phase(name="head and loss", terms=(*running, _head(setup))),
        Phase(name="backward of the blocks", terms=(*running, reducing, block)),
        Phase(name="end of backward", terms=(*kept, gradients, root)),
        Phase(name="optimizer step", terms=(*kept, gradients, update)),
        Phase(name="rollout", terms=(*kept, *engine)),
    ]
    if sync:
        phases.append(Phase(name="weight sync", terms=(*kept, *sync)))
    factor = 20 if setup.config.loss.kl_coef > 0 else 16
    return Plan(
        setup=setup,
        phases=tuple(phases),
        host_bytes=(1 - at_home) * factor * size.total / shards,
        cached_sequences=cached,
    )


def activation_bytes_per_token(size: ModelSize, compute_bytes: int, *, repeats_keys: bool) -> int:
    """What one block keeps of a token for its backward, in plain transformers layers.

    Norms keep a float32 copy, their normalized and their scaled output; attention keeps query,
    key, value, output and a float32 logsumexp per head; the MLP keeps four tensors of width F.
    With `repeats_keys` key and value are repeated to the query heads.
    """
    c = compute_bytes
    norms = 2 * (4 + 2 * c) * size.hidden
    if size.has_head_norms:
        norms += (4 + c) * (size.query + size.key)
    keys = size.query if repeats_keys else size.key
    attention = c * (2 * size.query + 2 * keys) + 4 * size.num_heads
    return norms + attention + 4 * c * size.mlp


def _sharded(setup: Setup) -> tuple[Term, ...]:
    """What stays from step to step."""
    at_home = 0 if setup.config.model.cpu_offload else 1
    share = at_home * setup.size.total / setup.num_shards
    terms = [
        Term(name="parameters", bytes=4 * share, formula="4 P / S, float32 masters"),
        Term(name="optimizer", bytes=8 * share, formula="8 P / S, AdamW's two moments in float32"),
    ]
    if setup.config.loss.kl_coef > 0:
        terms.append(
            Term(name="reference policy", bytes=4 * share, formula="4 P / S, for loss.kl_coef > 0")
        )
    return tuple(terms)


def _activations(setup: Setup) -> tuple[Term, Term]:
    """What the forward keeps, and what the backward of one block adds."""
    size, c = setup.size, setup.compute_bytes
    tokens = setup.config.optim.tokens_per_microbatch
    block = activation_bytes_per_token(
        size, c, repeats_keys=setup.config.model.attention == "varlen"
    )
    # Gradients of two MLP-wide and two hidden-wide tensors exist while a block runs backward.
    moving = c * (2 * size.mlp + 2 * size.hidden)
    if setup.config.model.gradient_checkpointing:
        kept = Term(
            name="activations",
            bytes=tokens * size.num_layers * c * size.hidden,
            formula="T L c D, the inputs of the blocks (model.gradient_checkpointing)",
        )
        return kept, Term(
            name="block at work",
            bytes=tokens * (block + moving),
            formula=f"T (A + G): A = {block} bytes kept of a token, G = {moving} for gradients",
        )
    kept = Term(
        name="activations",
        bytes=tokens * size.num_layers * block,
        formula=f"T L A, A = {block} bytes kept of a token by a block",
    )
    return kept, Term(
        name="block at work", bytes=tokens * moving, formula=f"T G, G = {moving} for gradients"
    )


def _head(setup: Setup) -> Term:
    """Float32 gradients beside the chunk's logits, then beside the same gradients rounded."""
    size, c = setup.size, setup.compute_bytes
    rows = setup.config.optim.tokens_per_microbatch
    table, states = size.vocab * size.hidden, rows * size.hidden
    # A chunk of logits cannot exceed all of them.
    workspace = min(setup.workspace_mb * 1e6, 4 * rows * size.vocab)
    return Term(
        name="head",
        bytes=4 * (table + states) + max(workspace, c * (table + states)) + c * states,
        formula="4 (V D + N D) for dW and dH + max(LASER_KERNELS_WORKSPACE_MB, c (V D + N D)) "
        "+ c N D for the rows",
    )


def _engine(setup: Setup) -> tuple[tuple[Term, ...], tuple[Term, ...], float | None]:
    """Terms of the rollout, of the weight sync, and the sequences that vLLM's cache holds."""
    size, c, rollout = setup.size, setup.compute_bytes, setup.config.rollout
    longest_tensor = c * size.vocab * size.hidden
    if rollout.engine == "vllm_server":
        buffer = Term(
            name="sync buffer",
            bytes=rollout.sync_buffer_mb * 2**20 + longest_tensor,
            formula="rollout.sync_buffer_mb + c V D, the largest tensor",
        )
        return (), (buffer,), None
    if rollout.engine == "hf":
        batch = setup.config.data.prompts_per_step * rollout.group_size // setup.num_gpus
        sequences = min(rollout.max_num_seqs, batch)
        weights = Term(name="gathered policy", bytes=c * size.total, formula="c P, all of it")
        cache = Term(
            name="key-value cache",
            bytes=sequences * setup.longest * setup.kv_bytes_per_token,
            formula=f"{sequences} sequences x {setup.longest} tokens x 2 L Dkv c",
        )
        return (weights, cache), (), None
    weights = Term(
        name="engine weights",
        bytes=c * size.total / rollout.tensor_parallel,
        formula="c P / rollout.tensor_parallel; asleep (level 2) in training: 0",
    )
    share = rollout.gpu_memory_fraction * setup.memory_gb * 1e9
    room = max(share - weights.bytes - VLLM_FORWARD_GB * 1e9, 0.0)
    cached = room / (setup.longest * setup.kv_bytes_per_token)
    cache = Term(
        name="key-value cache",
        bytes=max(share - weights.bytes, 0.0),
        formula=f"rollout.gpu_memory_fraction M - engine weights; less {VLLM_FORWARD_GB:g} GB for "
        f"vLLM's forward it holds {cached:.0f} sequences of {setup.longest} tokens",
    )
    buffer = Term(
        name="sync buffer",
        bytes=longest_tensor * (1 + 1 / setup.num_shards),
        formula="c V D (1 + 1 / S): the largest tensor, gathered, and this rank's part",
    )
    return (weights, cache), (weights, buffer), cached
