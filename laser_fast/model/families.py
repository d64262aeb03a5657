"""What model families differ in: the form of the head, and the names of weights.

    logits = C tanh(W h / (C s)) or W h / s       C softcap (Gemma), s divisor (Granite, Cohere)

What a config says decides, and what it cannot say is proved: when a model is loaded, its log-probs
from packed rows are compared with transformers' own attention and logits (`policy.build_policy`).
Two lists are of what that proof cannot see: whose attention is told its window, and whose experts
have the names that engines expect.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from laser_fast.config_errors import ConfigError

_LAYERS = {"full_attention", "sliding_attention"}
# Their attention functions are told the window; elsewhere in transformers a mask may hold it.
_WINDOWED = set(
    "cohere2 gemma2 gemma3_text mistral olmo3 phi3 qwen2 qwen3 qwen3_moe smollm3".split()
)
# Stacked as experts.gate_up_proj and experts.down_proj, and apart in checkpoints.
_EXPERTS = {"glm4_moe", "olmoe", "qwen2_moe", "qwen3_moe"}


class LmHead(NamedTuple):
    """The language-model head as the kernels take it."""

    weight: Tensor  # W [V, D]
    divisor: float = 1.0  # s
    softcap: float | None = None  # C
    router_loss: Tensor = torch.zeros(())  # what the blocks before it add to a loss; scalar

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
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap is not None and divisor != 1:
        raise ConfigError(
            f"model.path: a {config.model_type} model with a softcap and a divisor of its logits "
            "is not supported"
        )
    return float(divisor), softcap


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

    window = getattr(config, "sliding_window", None)
    has_windows = window is not None and getattr(config, "use_sliding_window", True) is not False
    if has_windows and config.model_type not in _WINDOWED:
        raise ConfigError(
            f'model.path: "{path}" is a {config.model_type} model with windows of {window} tokens, '
            f"which are known of {', '.join(sorted(_WINDOWED))} only; set it to full attention"
        )
    if getattr(config, "num_experts_per_tok", None) and config.model_type not in _EXPERTS:
        raise ConfigError(
            f'model.path: "{path}" is a {config.model_type} model, whose experts are not known; '
            f"expected one of {', '.join(sorted(_EXPERTS))}"
        )


def balancer(config: PreTrainedConfig) -> Callable[[tuple[Tensor, ...]], Tensor]:
    """The load-balancing loss of the router logits [T, E] of all layers, as transformers has it.

    E sum_e f_e P_e, f_e the share of tokens that choose e and P_e its mean probability (Switch
    Transformer, arXiv 2101.03961): the number of experts of a token, if all get as many tokens.
    """
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    loss = getattr(sys.modules[kind.__module__], "load_balancing_loss_func", None)
    if loss is None:
        fault = f"transformers balances no routers of a {config.model_type} model"
        raise ConfigError(f"model.router_aux_loss_coef: {fault}; set it to 0")
    return partial(loss, num_experts=config.num_experts, top_k=config.num_experts_per_tok)


def position_limit(config: PreTrainedConfig) -> int:
    """Positions that a sequence may have.

    Where longer ones change the rotary frequencies of all, as of Phi-3's "longrope", those of a
    packed row would depend on its neighbours, so that the first ones are all that there are.
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if kinds & {"dynamic", "longrope"}:
        name = "original_max_position_embeddings"
        return getattr(config, name, None) or rope.get(name) or config.max_position_embeddings
    return config.max_position_embeddings


def checkpoint_entries(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A state_dict's entry under the names of a checkpoint: experts, which are stacked, apart."""
    layer, _, kind = name.rpartition(".experts.")
    if not layer:
        yield name, tensor
        return
    parts = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else [kind]
    for index, expert in enumerate(tensor):
        for part, weight in zip(parts, expert.chunk(len(parts)), strict=True):
            yield f"{layer}.experts.{index}.{part}.weight", weight
