"""laser_kernels in the heads of prime-rl's trainer, with their temperature for each token.

Importing this module replaces the forward of `FusedOutputLinear` and of its twin with a softcap. To
import it in the trainer, name a function of a module that does as the custom loss.
"""

from typing import Any

from torch import Tensor

from laser_fast import needs_host
from laser_fast.integrations import check_host, refuse

with needs_host("prime_rl", "install prime-rl 0.8 from its repository"):
    from prime_rl.trainer.models.layers import lm_head, lm_head_gemma

from laser_kernels import linear_logprob_entropy

_FORWARD = "self hidden_states labels temperature"
_VANILLA = (lm_head.VanillaOutputLinear, lm_head_gemma.GemmaVanillaOutputLinear)
_FUSED = (lm_head.FusedOutputLinear, lm_head_gemma.GemmaFusedOutputLinear)
check_host("prime-rl", "0.8", {head.forward: _FORWARD for head in (*_FUSED, *_VANILLA)})


def _forward(
    self: Any,
    hidden_states: Tensor,  # [B, S, D]
    labels: Tensor,  # [B, S]
    temperature: Tensor,  # [B, S]; prime-rl's FSDP2 rounds it to bfloat16 on its way here
) -> lm_head.PrimeLmOutput:
    logprobs, entropy = linear_logprob_entropy(
        hidden_states.flatten(0, 1),
        self.weight,
        labels.flatten(),
        temperature=temperature.flatten().float(),
        softcap=getattr(self, "softcap", None),
    )
    return lm_head.PrimeLmOutput(
        logprobs=logprobs.view(labels.shape), entropy=entropy.view(labels.shape)
    )


def _refuse(*_: Any, **__: Any) -> None:
    setting = 'trainer.model.fused_lm_head_token_chunk_size = "disabled"'
    refuse("laser_fast.integrations.prime_rl", {setting: True})


for _head in _FUSED:
    _head.forward = _forward
for _head in _VANILLA:
    _head.forward = _refuse
