"""What model families differ in: the form of the head, and the names of weights.

    logits = C tanh(W h / (C s)) or W h / s       C softcap (Gemma), s divisor (Granite, Cohere)

No list says which models are known. `check_family` reads a config, and when a model is loaded
`Policy` compares its log-probs with the model's own logits (`policy.build_policy`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from laser_fast.config_errors import ConfigError

_LAYERS = {"full_attention", "sliding_attention"}


class LmHead(NamedTuple):
    """The language-model head as the kernels take it."""

    weight: Tensor  # W [V, D]
    divisor: float = 1.0  # s
    softcap: float | None = None  # C

    def at(self, temperature: Tensor | float) -> dict[str, Any]:
        """The options of a kernel that reads log-probs at a temperature."""
        return {"temperature": temperature * self.divisor, "softcap": self.softcap}

    def logits(self, hidden_states: Tensor, token_ids: list[int]) -> Tensor:
        """Logits [N, C] float32 of C tokens, of hidden states [N, D]."""
        logits = hidden_states.float() @ self.weight[token_ids].float().T / self.divisor
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


def head_form(config: PreTrainedConfig) -> tuple[float, float | None]:
    """Divisor and softcap of a model's logits."""
    divisor = getattr(config, "logits_scaling", None) or 1 / getattr(config, "logit_scale", 1.0)
    return float(divisor), getattr(config, "final_logit_softcapping", None)


def check_family(path: str, config: PreTrainedConfig) -> None:
    """Refuse a model whose body or attention cannot be what packed rows need."""
    layers = set(getattr(config, "layer_types", None) or _LAYERS)
    if unknown := sorted(layers - _LAYERS):
        raise ConfigError(
            f'model.path: "{path}" has layers of {", ".join(unknown)}, which cannot read packed '
            f"rows; expected {' and '.join(sorted(_LAYERS))}"
        )
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    is_decoder = kind is not None and kind.base_model_prefix == "model"
    if not is_decoder or not kind._supports_attention_backend or hasattr(config, "text_config"):
        raise ConfigError(
            f'model.path: "{path}" is a {config.model_type} model; expected a causal language '
            "model for text alone with exchangeable attention, such as llama, qwen3 or gemma2"
        )


def checkpoint_entries(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A state_dict's entry under the names of a checkpoint: experts, which are stacked, apart."""
    layer, _, kind = name.rpartition(".experts.")
    if not layer:
        yield name, tensor
        return
    for index, expert in enumerate(tensor):
        parts = {kind: expert}
        if kind == "gate_up_proj":
            parts = dict(zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True))
        for part, weight in parts.items():
            yield f"{layer}.experts.{index}.{part}.weight", weight
