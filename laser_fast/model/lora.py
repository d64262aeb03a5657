"""LoRA: two small trained matrices beside every frozen one, by peft (arXiv 2106.09685).

    h = W x + alpha / r B A x        W [out, in] frozen, A [r, in] random at first, B [out, r] zero

W is kept in the compute dtype, or in 4 bits; A and B are float32 masters. Whoever takes weights, an
engine or a Hugging Face folder, is given W + alpha / r B A under W's own name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from laser_fast.config_errors import ConfigError, needs_package
from laser_fast.model.distributed import World
from laser_fast.model.nf4 import Nf4Linear, quantize_blocks

if TYPE_CHECKING:  # of the policy, which needs no pydantic
    from laser_fast.config import ModelConfig

_A, _B, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer"


def add_adapters(
    hf: PreTrainedModel, config: ModelConfig, world: World, *, dtype: torch.dtype
) -> None:
    """Freeze a float32 model in `dtype` and put adapters into its blocks, in place.

    Values are those of rank 0; what is in 4 bits is on the device then, the rest on the CPU.
    """
    with needs_package("peft", "model.lora_rank > 0", extra="lora"):
        from peft import LoraConfig, inject_adapter_in_model
    layers = linear_layers(hf)
    check_targets(config, layers)
    if any(linear_layers(hf, block) != layers for block in range(len(hf.model.layers))):
        raise ConfigError(
            "model.lora_rank > 0: the blocks of this model differ in their linear layers, which "
            "adapters do not support; train its weights"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # A, which training moves; a run's own seed names its data
        own = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # a factor, whatever its hint says
            target_modules=list(config.lora_targets or layers),
            task_type="CAUSAL_LM",
            base_model_name_or_path=config.path,
        )
        inject_adapter_in_model(own, hf)
    if config.lora_4bit:
        quantize_blocks(hf, dtype=dtype, device=world.device, is_loaded=world.is_main)
    for name, parameter in hf.named_parameters():
        assert parameter.requires_grad == name.endswith((_A, _B)), name
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def check_targets(config: ModelConfig, layers: Collection[str]) -> None:
    """Refuse targets that are not among the `layers` of a block."""
    if unknown := [name for name in config.lora_targets if name not in layers]:
        raise ConfigError(
            f"model.lora_targets: {', '.join(unknown)} is no linear layer of the model's blocks; "
            f"expected some of {', '.join(layers)}"
        )


def linear_layers(hf: PreTrainedModel, block: int = 0) -> dict[str, tuple[int, int]]:
    """The linear layers of a block by name, with their (in, out)."""
    return {
        name.rpartition(".")[2]: (module.in_features, module.out_features)
        for name, module in hf.model.layers[block].named_modules()
        if isinstance(module, nn.Linear)
    }


def merged(
    state: Mapping[str, Tensor], hf: nn.Module, gather: Callable[[Tensor], Tensor] = Tensor.cpu
) -> Iterator[tuple[str, Tensor]]:
    """A state_dict's entries as those of the model without adapters, which it may not have.

    `gather` makes a whole tensor of an entry, one after the other in the same order on all ranks.
    Weights in 4 bits, which no state_dict has, come last.
    """
    layers = {f"{k}.weight": v for k, v in hf.named_modules() if isinstance(v, Nf4Linear)}
    entries: dict[str, Tensor | Nf4Linear] = {**state, **layers}
    for name, entry in entries.items():
        if name.endswith((_A, _B)):
            continue
        whole = gather(entry.dequantized() if isinstance(entry, Nf4Linear) else entry)
        layer = name.removesuffix(f"{_BASE}.weight")
        if layer + _A in state:
            scaling: Any = hf.get_submodule(layer).scaling
            A, B = (gather(state[layer + suffix]).float() for suffix in (_A, _B))
            whole = whole.float() + scaling["default"] * (B @ A)
        yield name.replace(f"{_BASE}.", "."), whole


def set_adapters(model: nn.Module, *, enabled: bool) -> None:
    """Switch all adapters of a model on or off; without any, nothing happens."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer.enable_adapters(enabled)


def write_adapter(state: Mapping[str, Tensor], hf: PreTrainedModel, out: Path) -> None:
    """Write the adapters among the entries of a state_dict as a folder of peft."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    found = get_peft_model_state_dict(hf, state_dict=dict(state))
    out.mkdir(parents=True)
    weights = {f"base_model.model.{name}": t.contiguous() for name, t in found.items()}
    save_file(weights, out / "adapter_model.safetensors", metadata={"format": "pt"})
    hf.peft_config["default"].save_pretrained(str(out))
