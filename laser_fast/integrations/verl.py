"""laser_kernels in verl's FSDP engine, and LaSeR's score in the same forward.

Importing this module puts our op in the place of verl's fused heads "torch" and "triton". verl does
so itself in each worker, with `actor_rollout_ref.model.external_lib=laser_fast.integrations.verl`
and `actor_rollout_ref.model.use_fused_kernels=True`.
"""

import types
import warnings
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from laser_fast import needs_host
from laser_fast.integrations import check_host, refuse

with needs_host("verl", "pip install 'verl>=0.9,<0.10'"):
    from verl.models.transformers import monkey_patch
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.utils.kernel import linear_cross_entropy as triton_head
    from verl.workers.engine.fsdp import transformer_impl as fsdp

from laser_kernels import linear_logprob_entropy

_verl_patch = monkey_patch.patch_forward_with_backends
_verl_inputs = fsdp.FSDPEngineWithLMHead.prepare_model_inputs
check_host(
    "verl",
    "0.9",
    {
        _verl_patch: "model use_fused_kernels fused_kernels_backend",
        _verl_inputs: "self micro_batch",
        FusedLinearForPPO.forward: "self hidden_states vocab_weights input_ids temperature",
        triton_head.LinearCrossEntropy.forward: (
            "ctx hidden weight labels temperature reduction dist_process_group"
        ),
    },
)
# What some models do between the head's matrix and the softmax, and verl's fused heads leave out.
_SCALES = "final_logit_softcapping logit_scale logits_scaling lm_head_multiplier output_multiplier"
_heads: WeakSet[torch.nn.Module] = WeakSet()


class _Temperature(float):
    """A temperature of all rows but some, whose temperature is 1.

    A float, as verl asserts; and FSDP rounds a tensor to 16 bits on its way into a forward.
    """

    unit_rows: Tensor  # [B] int64


def _head(
    hidden_states: Tensor,  # [B, S, D]
    vocab_weights: Tensor,  # [V, D]
    input_ids: Tensor,  # [B, S], shifted
    temperature: float = 1.0,
) -> Any:
    """Log-probs and entropies, [B, S] float32, of all rows: verl masks prompts later.

    By way of the head's module: only there does FSDP2 make the weight of an untied head whole.
    """
    for head in _heads:
        if head.weight is vocab_weights:
            found = head(hidden_states, input_ids, temperature)
            return tuple(x.view(input_ids.shape).clone() for x in found)  # FSDP2 wants no views
    raise RuntimeError("laser_fast.integrations.verl: import it before verl makes its models")


def _head_forward(
    self: torch.nn.Linear, hidden: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    temperatures = torch.full((labels.numel(),), float(temperature), device=labels.device)
    if isinstance(temperature, _Temperature):
        temperatures[temperature.unit_rows] = 1.0
    labels = labels.flatten().long()
    return linear_logprob_entropy(
        hidden.flatten(0, -2), self.weight, labels, temperature=temperatures
    )


def _fsdp_op(hidden: Any, weight: Any, labels: Any, temperature: float, *options: Any) -> Any:
    return _head(hidden, weight, labels, temperature) if options == ("none",) else _refuse()


def _refuse(*_: Any) -> None:
    refuse("laser_fast.integrations.verl", {"other engines than FSDP, as Megatron": True})


def _patch_forward_with_backends(
    model: Any, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
) -> None:
    """verl's, for a model whose head is what the op computes."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    refused = {name: getattr(config, name, None) not in (None, 1.0) for name in _SCALES.split()}
    refused |= {
        f"a head of type {type(head).__name__}": type(head) is not torch.nn.Linear,
        "a head with a bias": getattr(head, "bias", None) is not None,
        f"impl_backend={fused_kernels_backend}": fused_kernels_backend not in ("torch", "triton"),
    }
    if use_fused_kernels:
        refuse("laser_fast.integrations.verl", refused)
        head.forward = types.MethodType(_head_forward, head)
        _heads.add(head)
    else:
        warnings.warn("use_fused_kernels is off: verl does not use laser_kernels", stacklevel=2)
    _verl_patch(model, use_fused_kernels, fused_kernels_backend)


monkey_patch.patch_forward_with_backends = _patch_forward_with_backends
FusedLinearForPPO.forward = staticmethod(_head)
triton_head.linear_cross_entropy = _fsdp_op
triton_head.LinearCrossEntropy.forward = staticmethod(_refuse)  # for who already holds verl's op


@dataclass(frozen=True)
class EosScore:
    """LaSeR's score from the policy's own forward: z_c is the label of the EOS that ends an answer.

    verl computes that row and throws it away. The score's temperature is 1, whatever verl's is.
    """

    token_id: int  # z_c, a token that occurs in no answer
    eos_token_ids: tuple[int, ...]

    def install(self) -> None:
        """Score in all later forwards of this process's language models."""

        def prepare_model_inputs(engine: Any, micro_batch: Any) -> tuple[dict[str, Any], Any]:
            inputs, output_args = _verl_inputs(engine, micro_batch)
            if isinstance(engine, fsdp.FSDPEngineWithValueHead):
                return inputs, output_args
            if "shift_labels" not in inputs or engine.use_ulysses_sp:
                raise ValueError(
                    "EosScore: expected use_fused_kernels=True, use_remove_padding=True and "
                    "ulysses_sequence_parallel_size=1; set them, or leave the score out"
                )
            ends, is_finished = self._ends(micro_batch)
            labels = inputs["shift_labels"] = inputs["shift_labels"].clone()  # [1, T]
            labels[0, ends] = labels[0, ends].masked_fill(is_finished, self.token_id)
            temperature = inputs["temperature"] = _Temperature(inputs["temperature"])
            temperature.unit_rows = ends
            return inputs, output_args

        fsdp.FSDPEngineWithLMHead.prepare_model_inputs = prepare_model_inputs

    def logprobs(self, model_output: Any, data: Any) -> tuple[Tensor, Tensor]:
        """Log pi(z_c | x, y) [B] float32, and which answers are finished, in a loss of verl."""
        ends, is_finished = self._ends(data)
        return model_output["log_probs"].values()[ends], is_finished

    def _ends(self, data: Any) -> tuple[Tensor, Tensor]:
        """Row of the last token of each sequence of the packed batch, and whether it is an EOS."""
        if not _heads:  # VeOmni's engine, for one, is FSDP's, but sets its labels again
            refuse("EosScore", {"other engines than FSDP": True})
        ids = data["input_ids"]
        ends = ids.offsets()[1:] - 1
        return ends, torch.isin(ids.values()[ends], ids.values().new_tensor(self.eos_token_ids))
