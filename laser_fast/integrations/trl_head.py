"""laser_kernels in the head of TRL's own trainers.

The heads of TRL's trainers all end in one op, which gets hidden states, weight and labels.
`use_laser_kernels` puts ours in its place for the models of one trainer; backbone, FSDP2's gather
of the weight, masks and losses stay TRL's.
"""

import functools
import inspect
import math
import types
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy

from laser_fast import needs_host
from laser_fast.integrations import refuse

with needs_host("trl", "pip install 'laser-fast[trl]'"):
    import trl
    from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer, SFTTrainer
    from trl.trainer import utils as trl_utils

from laser_kernels import linear_logprob_entropy

# The op and its signature are private: they changed in 1.7, 1.14 and 1.15.
if trl.__version__.split(".")[:2] != ["1", "16"]:
    raise ImportError(
        f"laser_fast.integrations.trl: expected trl>=1.16,<1.17, got {trl.__version__}; "
        "pip install 'laser-fast[trl]'"
    )

NO_LABEL = -100
_TRAINERS = (GRPOTrainer, RLOOTrainer, DPOTrainer, KTOTrainer, SFTTrainer)
_CHECKED_ROWS = 64
# float32 GEMMs differ by 2.5e-4 at logits of 43; another formula by far more.
_TOLERANCE = 1e-3
_trl_op = trl_utils._ChunkedLogProbFunction


def use_laser_kernels(trainer: Any) -> None:
    """Compute the log-probs of a GRPO, RLOO, DPO, KTO or SFT trainer by `laser_kernels`.

    Call it before `trainer.train()`. The first batch is also scored by TRL's op, in float32.

    Raises:
        TypeError: the trainer is none of these.
        ValueError: it has something that cannot be honoured; the message names it.
        RuntimeError: raised by the first batch, if its log-probs are not those of TRL.
    """
    name = type(trainer).__name__
    if not isinstance(trainer, _TRAINERS):
        expected = ", ".join(kind.__name__ for kind in _TRAINERS)
        raise TypeError(f"use_laser_kernels: expected one of {expected}, got {name}")
    model, args = base_model(trainer), trainer.args
    head, deepspeed = model.get_output_embeddings(), trainer.accelerator.state.deepspeed_plugin
    has_softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    has_mean_logits = isinstance(trainer, DPOTrainer | KTOTrainer)
    smooths = isinstance(trainer, SFTTrainer) and args.label_smoothing_factor > 0
    refused = {
        f"a head of type {type(head).__name__}": type(head) is not torch.nn.Linear,
        "a head with a bias": getattr(head, "bias", None) is not None,
        "final_logit_softcapping, whose mean logits are not known": has_softcap and has_mean_logits,
        "torch_compile=True": args.torch_compile,
        "DeepSpeed ZeRO-3": deepspeed is not None and deepspeed.zero_stage == 3,
        "use_weighting=True": getattr(args, "use_weighting", False),  # of DPO
        "label_smoothing_factor > 0": smooths and args.loss_type == "nll",
        # Below transformers 5.19 TRL puts a text there.
        "compute_loss_func": callable(trainer.compute_loss_func),
    }
    refuse(f"use_laser_kernels: {name}", refused)
    fsdp = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.fsdp_version == 2:
        # With mixed precision accelerate lets it round what the forward returns: the log-probs.
        policy = fsdp.mixed_precision_policy or MixedPrecisionPolicy()
        fsdp.mixed_precision_policy = replace(policy, output_dtype=None)
    _patch_forward(model)
    if getattr(trainer, "ref_model", None) is not None:
        _patch_forward(trainer.ref_model)


def base_model(trainer: Any) -> Any:
    """The causal model of a trainer, without its adapters."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    # transformers' own `add_adapter` leaves a model with a peft_config and without a base model.
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@dataclass
class _Call:
    """What the op has to know of the forward that it runs in."""

    labels: Tensor  # [B, S] shifted
    unit_rows: Tensor | None  # [B, S] bool: rows at temperature 1, not the trainer's
    is_checked: bool
    num_rows: int | None = None  # set by the op


_current_call: ContextVar[_Call | None] = ContextVar("current_call", default=None)


def _is_patch(forward: Any) -> bool:
    return hasattr(forward, "runs_laser_kernels")


def _patch_forward(model: Any) -> None:
    """Let forwards with `fused_lm_head=True` run our op, also with some rows at temperature 1."""
    # Under a wrapper of accelerate; but another trainer of the model puts TRL's op above it.
    if _is_patch(inspect.unwrap(model.forward, stop=_is_patch)):
        return
    trl_utils._ChunkedLogProbFunction = _Head
    trl_forward, is_checked = model.forward, False

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        # [B, S] bool: FSDP and DeepSpeed round temperatures, as all floats, on their way in here.
        unit_rows: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        nonlocal is_checked
        if not fused_lm_head:
            return trl_forward(*args, **kwargs)
        labels = kwargs.get("shift_labels")
        labels = kwargs["labels"][:, 1:] if labels is None else labels
        call = _Call(labels, unit_rows, is_checked)
        token = _current_call.set(call)
        try:
            outputs = trl_forward(*args, fused_lm_head=True, **kwargs)
        finally:
            _current_call.reset(token)
        if call.num_rows is None:
            raise RuntimeError("use_laser_kernels: another patch of the model took the head away")
        is_checked = is_checked or call.num_rows > 0
        return outputs

    forward.runs_laser_kernels = True  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


class _Head:
    """Stands in for TRL's op, which other models of the process still get."""

    @staticmethod
    def apply(
        hidden: Tensor,  # [N, D], or [B S, D] where TRL does not select the rows
        weight: Tensor,  # [V, D]
        bias: Tensor | None,
        targets: Tensor,  # [N] or [B S]
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """Log-probs and what else `outputs` names, in TRL's order; None for the rest."""
        call, num_given = _current_call.get(), len(hidden)
        if call is None:
            options = (temperature, chunk_size, softcap, logit_scale, outputs)
            return _trl_op.apply(hidden, weight, bias, targets, *options)
        rows = (call.labels.flatten() != NO_LABEL).nonzero().squeeze(1).to(hidden.device)
        call.num_rows = len(rows)
        if num_given == call.labels.numel():  # on a CPU TRL also scores rows without a label
            hidden, targets = hidden[rows], targets[rows]
        temperatures = torch.full(rows.shape, temperature, device=hidden.device)
        if call.unit_rows is not None:
            temperatures[call.unit_rows.flatten()[rows]] = 1.0
        # As TRL's op does, also outside autocast, where a head may be float32 and the rest 16-bit.
        kind, dtype = hidden.device.type, hidden.dtype
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        log_probs, entropy = linear_logprob_entropy(
            hidden,
            weight,
            targets,
            # TRL scales, caps and tempers: C tanh(s z / C) / T.
            temperature=temperatures / logit_scale,
            softcap=None if softcap is None else softcap / logit_scale,
        )
        mean_logits = is_top1 = None
        with torch.no_grad():
            if not call.is_checked:
                _check(log_probs, hidden, weight, targets, temperatures, (softcap, logit_scale))
            if "mean_logits" in outputs:
                mean_weight = weight.mean(0, dtype=torch.float32)
                mean_logits = (hidden * mean_weight).sum(1) * logit_scale / temperatures
            if "is_top1" in outputs:
                is_top1 = _is_top1(log_probs, entropy, hidden, weight, targets)
        found = (log_probs, entropy if "entropy" in outputs else None, None, mean_logits, is_top1)
        if num_given == len(rows):
            return found
        return tuple(
            None if x is None else x.new_zeros(num_given).index_copy(0, rows, x) for x in found
        )


def _is_top1(
    log_probs: Tensor, entropy: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor
) -> Tensor:
    """Whether no token is likelier than the target, [N] bool.

    A p > 1/2 is the largest, and the largest is at least e^-entropy; only the rows that neither
    decides need their logits.
    """
    is_top1 = log_probs > math.log(0.5) + 1e-3
    unsure = (~is_top1 & (log_probs > -entropy - 1e-3)).nonzero().squeeze(1)
    for some in unsure.split(1024):
        is_top1[some] = (hidden[some] @ weight.t()).argmax(1) == targets[some]
    return is_top1


def _check(
    log_probs: Tensor,  # [N]
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    temperatures: Tensor,  # [N]
    formula: tuple[float | None, float],
) -> None:
    """Refuse to go on unless TRL's op finds the same for a few rows of each temperature."""
    for temperature in temperatures.unique().tolist():
        some = (temperatures == temperature).nonzero().squeeze(1)[:_CHECKED_ROWS]
        options = (None, targets[some], temperature, 32768, *formula, ())
        with torch.autocast(hidden.device.type, enabled=False):
            expected = _trl_op.apply(hidden[some].float(), weight, *options)[0]
        error = ((log_probs[some] - expected).abs() / (1 + expected.abs())).max()
        if not error < _TOLERANCE:
            raise RuntimeError(
                f"use_laser_kernels: expected the log-probs of TRL's own head at temperature "
                f"{temperature:g}, got them with a relative error of {error:.1e}; train without "
                "laser_kernels and report the model"
            )
