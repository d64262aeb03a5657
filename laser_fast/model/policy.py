"""The policy: a Hugging Face causal LM whose head is fused, sharded by FSDP2.

`Policy.forward` runs the body, selects the rows that carry a label and hands them with the
unsharded `lm_head.weight` to a head function, all inside the FSDP2 root group: tied embeddings
need no special case, and [tokens, vocabulary] logits never exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.functional import embedding
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from laser_fast.config_errors import ConfigError, needs_package, reading
from laser_fast.model.attention import IMPLEMENTATIONS, attention_kwargs
from laser_fast.model.distributed import World
from laser_fast.model.families import (
    LmHead,
    balancer,
    check_family,
    checkpoint_entries,
    head_form,
    position_limit,
)
from laser_fast.model.lora import add_adapters, merged, set_adapters
from laser_fast.model.offload import ActivationOffload
from laser_fast.model.packing import Packer
from laser_fast.model.vocabulary import Vocabulary, load_vocabulary
from laser_fast.model.weights import load_weights
from laser_fast.records import Microbatch, TrainingSequence
from laser_kernels import linear_logprob

if TYPE_CHECKING:  # it trains where pydantic is not installed
    from laser_fast.config import MeasureConfig, ModelConfig

Output = TypeVar("Output")
Head = Callable[[Tensor, LmHead], Output]  # (hidden_states [N, D], its head) -> outputs

# Largest mean difference, in nats, of a token's log-prob from the model's own logits. These are
# rounded to bfloat16, at 30 by 0.06.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


class Policy(nn.Module):
    """A causal LM read through a head function."""

    def __init__(self, hf: PreTrainedModel, *, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.hf = hf
        self.compute_dtype = compute_dtype
        self.head_form = head_form(hf.config)
        # What `shard` may set: how activations are saved, and whether blocks are gathered twice.
        self.saving: Callable[[], AbstractContextManager] = nullcontext
        self.reshards_blocks = True

    def forward(self, batch: Microbatch, head: Head[Output]) -> Output:
        """Hidden states of the labelled rows and the model's own head, through `head`."""
        device = batch.input_ids.device
        balances = batch.router_weight > 0 and torch.is_grad_enabled()
        with self.saving():  # not the head, whose weight and logits stay where they are
            output = self.hf.model(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                use_cache=False,
                output_router_logits=balances,
                **attention_kwargs(batch.segments, device),
            )
        lm_head = LmHead(self.hf.lm_head.weight, *self.head_form)
        if balances:  # in float32, as routers choose
            loss = balancer(self.hf.config)(tuple(x.float() for x in output.router_logits))
            lm_head = lm_head._replace(router_loss=batch.router_weight * loss)
        # Rows repeat; an embedding's backward adds them up in a fixed order.
        return head(embedding(batch.rows, output.last_hidden_state[0]), lm_head)

    def backward(self, loss: Tensor, world: World, *, is_last: bool) -> None:
        """Accumulate the gradients of a rank's part of a loss; replicas meet in the last one only.

        FSDP2 averages gradients over ranks, but the denominators of a loss are already global.
        """
        if isinstance(self, FSDPModule):
            self.set_requires_all_reduce(is_last)
        (loss * world.size).backward()

    def release(self) -> None:
        """Give gathered parameters back, the root's at least, after a forward without backward."""
        for module in self._sharded():
            module.reshard()

    def _sharded(self) -> list[FSDPModule]:
        return [module for module in self.modules() if isinstance(module, FSDPModule)]

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Gather every parameter once, so that ranks may then run the model out of step.

        Compiled blocks run eagerly in here: decoding changes its shapes with every token.
        """
        modules = self._sharded()
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for module in modules:
                module.reshard()
                reshards = self.reshards_blocks and module is not self
                module.set_reshard_after_forward(reshards, recurse=False)

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """The model as LoRA found it."""
        set_adapters(self.hf, enabled=False)
        try:
            yield
        finally:
            set_adapters(self.hf, enabled=True)

    def stream_weights(self, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of a checkpoint, weights in the compute dtype, gathered one at a time.

        Buffers keep their dtype: with a rounded bias a router chooses other experts. A tied head
        comes under both names, adapters are merged. Collective: each item may be an all-gather, so
        every rank must exhaust the iterator.
        """
        fixed = {name for name, _ in self.hf.named_buffers()}

        def gather(tensor: Tensor) -> Tensor:
            dtype = self.compute_dtype if isinstance(tensor, DTensor) else tensor.dtype
            tensor = tensor.detach().to(device=device, dtype=dtype)
            return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

        for name, tensor in merged(self.hf.state_dict(), self.hf, gather):
            dtype = tensor.dtype if name in fixed else self.compute_dtype
            yield from checkpoint_entries(name, tensor.to(dtype))


def label_head(batch: Microbatch) -> Head[Tensor]:
    """The head function that reads the log-probs [N] of a microbatch's labels."""

    def read(hidden_states: Tensor, head: LmHead) -> Tensor:
        options = head.at(batch.temperature)
        return linear_logprob(hidden_states, head.weight, batch.labels, **options)

    return read


def load_model_config(config: ModelConfig) -> PreTrainedConfig:
    """The model's own configuration, refused early when the policy cannot train it."""
    with reading(f'model.path: cannot load "{config.path}", as a folder or hub id'):
        model_config = AutoConfig.from_pretrained(config.path, trust_remote_code=False)
    check_family(config.path, model_config)
    dtype = model_config.dtype
    is_plain = dtype is None or (dtype.is_floating_point and dtype.itemsize > 1)
    if not is_plain or getattr(model_config, "quantization_config", None) is not None:
        raise ConfigError(
            f'model.path: "{config.path}" is quantized, says its config.json; train the model it '
            "was made from"
        )
    if config.router_aux_loss_coef:
        balancer(model_config)
    pad, num_rows = model_config.pad_token_id, model_config.vocab_size
    if pad is not None and not -num_rows <= pad < num_rows:
        raise ConfigError(
            f'model.path: pad_token_id = {pad} in the config.json of "{config.path}" is beyond '
            f"its {num_rows} embeddings; set it to an id that is there"
        )
    return model_config


def check_lengths(config: MeasureConfig, available: int) -> None:
    """Refuse lengths that the model's `available` positions cannot hold."""
    if config.max_sequence_tokens > available:
        score = " + 1 score position" if config.score.position == "eos" else ""
        rollout = config.rollout
        is_eval = (rollout.eval_max_new_tokens or 0) > rollout.max_new_tokens
        raise ConfigError(
            f"data.max_prompt_tokens + rollout.{'eval_' * is_eval}max_new_tokens{score} = "
            f"{config.max_sequence_tokens} exceeds the {available} positions of the model; lower "
            "them"
        )


def load_without_weights(
    config: MeasureConfig, *, score_token: str | None
) -> tuple[PreTrainedConfig, Vocabulary]:
    """A model's own configuration, if it holds the lengths that are sampled, and its vocabulary."""
    model_config = load_model_config(config.model)
    check_lengths(config, position_limit(model_config))
    path = config.model.path
    return model_config, load_vocabulary(path, score_token=score_token, model_config=model_config)


def compute_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """Dtype of forward and backward; parameters and optimizer state are always float32."""
    if config.compute_dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, config.compute_dtype)


def build_policy(config: ModelConfig, world: World, *, is_trained: bool = True) -> Policy:
    """Load the model on rank 0, shard it, and broadcast the shards' values.

    The other ranks allocate but never touch a full copy, so host memory holds one. A policy that
    is not trained needs no masters: its parameters are in the compute dtype, to which FSDP2 rounds
    those of another one whenever it gathers them.
    """
    if config.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        raise ConfigError(
            'model.attention = "flash_attention_2" needs flash-attn; pip install '
            "'laser-fast[flash]', or set \"varlen\", which comes with torch"
        )
    hf, full_state = _load_on_main(config, world, is_trained=is_trained)
    buffers = dict(hf.named_buffers())
    policy = Policy(hf, compute_dtype=compute_dtype(config, world.device)).train()
    if config.liger:
        _apply_liger(hf)
    if config.gradient_checkpointing:
        hf.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        for block in hf.model.layers:
            block.compile()
    shard(policy, config, world)
    set_model_state_dict(
        policy.hf,
        full_state,
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    # Rotary frequencies and the like are not in the state dict.
    for name, buffer in policy.hf.named_buffers():
        value = buffers[name].to(world.device)
        dist.broadcast(value, src=0)
        buffer.copy_(value)
    _prove_head(policy, config, world)
    return policy


def shard(policy: Policy, config: ModelConfig, world: World) -> None:
    """`fully_shard` every block, then the policy; masters and reductions stay float32."""
    names, shape = ("replicate", "shard"), (config.replicas, world.size // config.replicas)
    start = 0 if config.replicas > 1 else 1
    mesh = init_device_mesh(world.device.type, shape[start:], mesh_dim_names=names[start:])
    precision = MixedPrecisionPolicy(param_dtype=policy.compute_dtype, reduce_dtype=torch.float32)
    offload = OffloadPolicy()
    if config.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    policy.reshards_blocks = config.reshard_after_forward
    # The root stays gathered until its backward: embedding, final norm and head are used at both
    # ends of the forward.
    for module in (*policy.hf.model.layers, policy):
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=policy.reshards_blocks and module is not policy,
            mp_policy=precision,
            offload_policy=offload,
        )
    if config.activation_offload:
        body = policy.hf.model
        policy.saving = ActivationOffload([*body.layers, *body.children()])


@torch.no_grad()
def _prove_head(policy: Policy, config: ModelConfig, world: World) -> None:
    """Refuse a model of which packed rows and the fused head do not give the own log-probs.

    It is the first forward, too, and its module becomes FSDP2's root: the engine's direct use of
    the model would make one of every block.
    """
    device, vocab_size = world.device, policy.hf.config.vocab_size
    packer = Packer(budget=64, device=device)
    ids = [(7919 * place + 104729) % vocab_size for place in range(1, 49)]
    rows = [(ids[:16], ids[16:24]), (ids[:16], ids[24:36]), (ids[36:40], ids[40:])]
    batch = packer.pack([
        TrainingSequence(
            prompt_ids=tuple(prompt),
            completion_ids=tuple(response),
            rollout_logprobs=(0.0,) * len(response),
            score_at=None,
        )
        for prompt, response in rows
    ])  # fmt: skip

    packed = policy(batch, label_head(batch))
    policy.release()  # the optimizer must find the shards
    own, implementation = [], policy.hf.config._attn_implementation
    policy.hf.eval()  # packed rows have no dropout
    with policy.unsharded():
        policy.hf.set_attn_implementation("eager")  # by definition, and none of ours
        for prompt, response in rows:
            inputs = torch.tensor([prompt + response], device=device)
            mask = torch.ones_like(inputs, dtype=torch.bool)
            logits = policy.hf(input_ids=inputs, attention_mask=mask, use_cache=False).logits
            labels = inputs[0, len(prompt) :, None]
            found = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            own.append(found.gather(1, labels)[:, 0])
        policy.hf.set_attn_implementation(implementation)
    policy.hf.train()
    difference = float((packed - torch.cat(own)).abs().mean())
    with world.agreement():  # with experts, ranks may differ in the last digits
        if not difference <= _TOLERANCE.get(policy.compute_dtype, 0.1):
            raise ConfigError(
                f'model.path: log-probs of "{config.path}" from packed rows and lm_head.weight '
                f"differ from those of its own logits by {difference:.3g} nats a token; a "
                f"{policy.hf.config.model_type} model has a head or an attention that is not known"
            )


def _load_on_main(
    config: ModelConfig, world: World, *, is_trained: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model with its weights on rank 0, and an untouched allocation elsewhere."""
    attention, dtype = IMPLEMENTATIONS[config.attention], compute_dtype(config, world.device)
    with world.agreement():
        if world.is_main:
            hf = load_weights(config.path, attention=attention)
        else:
            with torch.device("meta"):
                hf = AutoModelForCausalLM.from_config(
                    load_model_config(config), dtype=torch.float32, attn_implementation=attention
                )
            hf.to_empty(device="cpu")
            hf.tie_weights()
        if not hasattr(hf, "model") or not hasattr(hf.model, "layers"):
            raise ConfigError(
                f'model.path: "{config.path}" is a {hf.config.model_type} model, whose blocks are '
                "not at model.layers; expected a decoder such as llama, qwen3 or gemma2"
            )
        if config.lora_rank:
            add_adapters(hf, config, world, dtype=dtype)
        elif not is_trained:
            for parameter in hf.requires_grad_(False).parameters():
                parameter.data = parameter.data.to(dtype)  # buffers stay float32
    return hf, hf.state_dict() if world.is_main else {}


def _apply_liger(hf: PreTrainedModel) -> None:
    with needs_package("liger-kernel", "model.liger = true", extra="liger"):
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    _apply_liger_kernel_to_instance(hf, fused_linear_cross_entropy=False, cross_entropy=False)
