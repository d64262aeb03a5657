"""What a step needs on one GPU, phase by phase and term by term.

No weights are read: the model is built from its config on torch's meta device and counted there.
Where a number depends on the data it is a bound: every token of a microbatch may be a head row.

    P  parameters: L blocks of B, the largest, and R     D, F, V  hidden, MLP and vocabulary size
    t  parameters of a block's adapters, with LoRA       W  parameters that are trained: P or L t
    q  weights of a block's linear layers if they are in 4 bits, else 0
    S  ranks that share the parameters                   Dkv  key-value heads times head dimension
    T  tokens of a microbatch, N = T rows of the head    c  bytes of the compute dtype
    A  bytes that a block keeps of a token, G  bytes of its gradients     M  memory of the GPU
    H n  entries of a block's attention scores where they are formed, of the longest sequences
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from laser_fast.model.distributed import check_world
from laser_fast.model.lora import check_targets, linear_layers
from laser_fast.model.nf4 import NF4_BYTES
from laser_fast.model.policy import compute_dtype
from laser_fast.training.update import IS_FUSED

if TYPE_CHECKING:
    from laser_fast.config import Config, ModelConfig

# Allowances, not measurements: CUDA context, NCCL buffers, CUDA graphs of a sleeping engine and
# gaps of the allocator; and what vLLM's own forward takes out of its share.
RESERVE_GB = 4.0
VLLM_FORWARD_GB = 2.0
WORKSPACE_MB = 2600.0  # laser_kernels' default on a GPU
FOUR_NORMS = ("gemma2", "gemma3_text", "glm4")  # around attention and MLP
NORMS_OF_HEADS = ("gemma3_text", "olmo2", "olmo3", "olmoe", "qwen3", "qwen3_moe")


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
    num_root_parameters: int  # R
    num_gpus: int
    memory_gb: float  # M, in units of 1e9 bytes
    workspace_mb: float = WORKSPACE_MB
    num_adapter_parameters: int = 0  # t
    num_linear_parameters: int = 0  # of a block's linear layers, q if they are in 4 bits

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
    def num_quantized(self) -> int:
        """Weights of a block in 4 bits (q)."""
        return self.num_linear_parameters * self.config.model.lora_4bit

    @property
    def num_whole(self) -> int:
        """P - L q: what is not in 4 bits."""
        return self.num_parameters - self.model.num_hidden_layers * self.num_quantized

    @property
    def compute_bytes(self) -> int:
        """The c of a GPU."""
        return compute_dtype(self.config.model, torch.device("cuda")).itemsize

    @property
    def sequence_bytes(self) -> int:
        """Keys and values of a longest sequence."""
        per_layer = 2 * self.compute_bytes * head_widths(self.model)[1]
        return self.config.max_sequence_tokens * self.model.num_hidden_layers * per_layer

    @cached_property
    def phases(self) -> dict[str, tuple[Term, ...]]:
        """The phases of a step, each with the terms that are in memory together."""
        model, config, c = self.model, self.config, self.compute_bytes
        L, D, V = model.num_hidden_layers, model.hidden_size, model.vocab_size
        B, R = self.num_block_parameters, self.num_root_parameters
        has_adapters, is_quantized = self.num_adapter_parameters > 0, config.optim.state_bits == 8
        q, num_whole = self.num_quantized, self.num_whole
        share = 0 if config.model.cpu_offload else self.num_trained / self.num_shards
        kept = [
            Term("parameters", 4 * share, "4 W / S, float32 masters"),
            Term("optimizer", 8 * share, "8 W / S, AdamW's two moments in float32"),
        ]
        if is_quantized:
            formula = "(2 + 8 / 256) W / S, the moments in 8 bits, 256 to a scale"
            kept[1] = Term("optimizer", (2 + 8 / 256) * share, formula)
        if has_adapters:
            frozen = 0 if config.model.cpu_offload else c * num_whole / self.num_shards
            kept.append(Term("frozen weights", frozen, "c (P - L q) / S"))
            formula = f"{NF4_BYTES:.4f} L q, whole on each GPU"
            kept.append(Term("4-bit weights", NF4_BYTES * L * q, formula))
        elif config.loss.kl_coef > 0:
            kept.append(Term("reference policy", c * share, "c P / S, for loss.kl_coef > 0"))
        gradients = Term("gradients", 4 * share, "4 W / S, float32")
        formula = "c (R + 2 B - q): root and two blocks, of which one is dequantized at most"
        gathered = Term("gathered weights", c * (R + 2 * B - q), formula)
        if not config.model.reshard_after_forward:
            gathered = gathered._replace(
                bytes=c * (num_whole + q), formula="c (P - L q + q), to their backward"
            )
        update = Term("temporary of AdamW", 4 * share, "4 W / S")
        if IS_FUSED:
            update = Term("temporary of AdamW", 0, "fused")
        if is_quantized and not config.model.cpu_offload:
            # torch.compile's peak on a CPU is 2.01 times the tensor; without it, 13.3 times.
            largest = self.num_adapter_parameters if has_adapters else max(V * D, B)
            formula = "8 max(V D, B) / S, or 8 t / S: the largest tensor, twice in float32"
            update = Term("temporary of AdamW", 8 * largest / self.num_shards, formula)
        formula = "c R + (c + 4) B: root, and a block on its way to its shards"
        reducing = Term("unsharded gradients", c * R + (c + 4) * B, formula)
        root = Term("reduction of the root", (2 * c + 4) * R, "(2 c + 4) R, with a float32 copy")
        if has_adapters:
            trained = (c + 4) * self.num_adapter_parameters
            reducing = Term("unsharded gradients", trained, "(c + 4) t: adapters of a block")
            root = Term("reduction of the root", 0, "frozen")

        T, (block, *saved, _) = config.optim.tokens_per_microbatch, self._activations
        # A chunk of logits beside a rounded dW; or half of it, then a rounded copy, beside float32.
        both, chunk = V * D + T * D, min(self.workspace_mb * 1e6, 4 * T * V)
        peak = max(c * V * D + 4 * T * D + chunk, 4 * both + max(chunk / 2, c * both))
        formula = "max(c V D + 4 N D + C, 4 (V D + N D) + max(C / 2, c (V D + N D))) + c N D"
        if has_adapters:  # a frozen head has no gradient
            peak, formula = 4 * T * D + chunk, "4 N D + C + c N D"
        head = Term("head", peak + c * T * D, formula + ", C = LASER_KERNELS_WORKSPACE_MB")
        running = [*kept, gradients, gathered, *saved]
        if config.model.router_aux_loss_coef > 0:
            entries = T * L * model.num_experts
            formula = f"(c + 4) T L E, E = {model.num_experts}: logits and probabilities"
            running.append(Term("router loss", (c + 4) * entries, formula))
        return {
            "head and loss": (*running, head),
            "backward of the blocks": (*running, reducing, block),
            "end of backward": (*kept, gradients, root),
            "optimizer step": (*kept, gradients, update),
            **{name: (*kept, *terms) for name, terms in self._engine_phases().items()},
        }

    @cached_property
    def _activations(self) -> tuple[Term, ...]:
        """A block's at work, what all blocks keep, and what model.activation_offload moves."""
        model, config, c = self.model, self.config.model, self.compute_bytes
        T, D = self.config.optim.tokens_per_microbatch, model.hidden_size
        L = model.num_hidden_layers
        A = activation_bytes_per_token(
            model,
            c,
            repeats_keys=config.attention == "varlen",
            keys_per_token=self.config.rollout.group_size,  # each completion repeats its prompt's
        )
        # Gradients of two MLP-wide and two hidden-wide tensors exist while a block runs backward.
        G = 2 * c * (_mlp_width(model) + D)
        n = self._scores_per_head * model.num_attention_heads
        block = Term("block at work", T * G + 8 * n, f"T G + 8 H n, G = {G}")
        kept = Term("activations", T * L * A, f"T L A, A = {A}")
        scores = Term("attention scores", 8 * L * n, "8 L H n: of tanh, softmax and rounding")
        if config.gradient_checkpointing or config.activation_offload:
            # Of the 16, 14.4 were measured in bfloat16 and 16.6 in float32, on a CPU.
            formula = f"T (A + G) + 16 H n, A = {A}, G = {G}"
            block = Term("block at work", T * (A + G) + 16 * n, formula)
        if config.gradient_checkpointing:
            kept = Term("activations", T * L * c * D, "T L c D, the inputs of the blocks")
            scores = scores._replace(bytes=0.0)
        moved = Term("on the host", 0.0, "")
        if config.activation_offload:
            # torch rounds what it pins up to powers of two, and copies a tensor for every operation
            # that saves it: of blocks of qwen2, qwen3 and llama 1.27 to 1.34 times A.
            factor = 2 if config.gradient_checkpointing else 2.7
            moved = Term("on the host", factor * (kept.bytes + scores.bytes), "")
            kept, scores = Term("activations", T * c * D, "T c D"), scores._replace(bytes=0.0)
        return block, kept, scores, moved

    @property
    def _scores_per_head(self) -> int:
        """n: of the longest sequences, if attention forms scores, as torch's with a softcap does.

        Rows are filled up to the longest of a bucket, at most twice their length: of S tokens and T
        in all there are fewer than 2 T / S.
        """
        capped = getattr(self.model, "attn_logit_softcapping", None) is not None
        T = self.config.optim.tokens_per_microbatch
        S = min(self.config.max_sequence_tokens, T)
        return (2 * T - S) * S if capped and self.config.model.attention == "sdpa" else 0

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
            policy = self.compute_bytes * (self.num_whole + self.num_quantized)
            formula = "c (P - L q + q), all of it, and a block dequantized"
            return {"rollout": (Term("gathered policy", policy, formula), cache)}
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
        """What model.cpu_offload and model.activation_offload keep in host memory per GPU."""
        state = 8 + (2 + 8 / 256 if self.config.optim.state_bits == 8 else 8)
        num_bytes = state * self.num_trained
        if self.num_adapter_parameters or self.config.loss.kl_coef > 0:
            num_bytes += self.compute_bytes * self.num_whole
        num_bytes *= self.config.model.cpu_offload / self.num_shards
        return 1e-9 * (num_bytes + self._activations[-1].bytes)


def count_parameters(model: PretrainedConfig) -> tuple[int, int, int]:
    """Count P, B and R of the model that a config describes, without allocating any."""
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(model)
    parts = (whole, *whole.model.layers)
    total, *blocks = (sum(p.numel() for p in part.parameters()) for part in parts)
    # The first block of a mixture of experts may be a small, dense one.
    return total, max(blocks), total - sum(blocks)


def count_adapters(model: PretrainedConfig, config: ModelConfig) -> tuple[int, int]:
    """Count t, and the weights of a block's linear layers, likewise; 0 without LoRA."""
    if not config.lora_rank:
        return 0, 0
    with torch.device("meta"):
        layers = linear_layers(AutoModelForCausalLM.from_config(model))
    check_targets(config, layers)
    num_linear = sum(math.prod(shape) for shape in layers.values())
    widths = sum(sum(layers[name]) for name in config.lora_targets or layers)
    return config.lora_rank * widths, num_linear


def activation_bytes_per_token(
    model: PretrainedConfig, c: int, *, repeats_keys: bool, keys_per_token: int = 1
) -> int:
    """A: what one block keeps of a token for its backward, in plain transformers layers.

    Norms keep a float32 copy, their normalized and their scaled output; attention keeps query,
    key, value, output and a float32 logsumexp per head; the MLP keeps four tensors of width F,
    and each chosen expert of a mixture its input and output, too. With `repeats_keys` key and
    value are repeated to the query heads; there are at most `keys_per_token` of them, the size of
    a group whose completions are short.
    """
    query, key = head_widths(model)
    norms = (4 if model.model_type in FOUR_NORMS else 2) * (4 + 2 * c) * model.hidden_size
    if model.model_type in NORMS_OF_HEADS:  # of query and key
        norms += (4 + c) * (query + key)
    kept_keys = keys_per_token * (query if repeats_keys else key)
    attention = 2 * c * (query + kept_keys) + 4 * model.num_attention_heads
    chosen = getattr(model, "num_experts_per_tok", None) or 0
    return norms + attention + 4 * c * _mlp_width(model) + 2 * c * chosen * model.hidden_size


def _mlp_width(model: PretrainedConfig) -> int:
    """F; of a mixture of experts that of those that a token meets, of shared ones, too."""
    chosen = getattr(model, "num_experts_per_tok", None)
    width = getattr(model, "moe_intermediate_size", None) or model.intermediate_size
    shared = (getattr(model, "n_shared_experts", None) or 0) * width
    shared += getattr(model, "shared_expert_intermediate_size", 0)
    return chosen * width + shared if chosen else width


def head_widths(model: PretrainedConfig) -> tuple[int, int]:
    """Widths of a token's queries, and of its keys (Dkv)."""
    heads = model.num_attention_heads
    dim = getattr(model, "head_dim", None) or model.hidden_size // heads
    return heads * dim, model.num_key_value_heads * dim
