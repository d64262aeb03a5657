"""The weights of a model, refused unless they are those of its configuration, and numbers.

transformers logs what a checkpoint lacks, fills it with random numbers and goes on; it drops what
it does not know, such as the scales of quantized weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, logging

from laser_fast.config_errors import ConfigError, reading

if TYPE_CHECKING:  # models are read where pydantic is not installed
    from laser_fast.config import ModelConfig

_POINTER = b"version https://git-lfs"
# As safetensors and torch name them; the loader casts any other, such as int8, without its scale.
_DTYPES = {"F64", "F32", "F16", "BF16", torch.float64, torch.float32, torch.float16, torch.bfloat16}
_NUM_NAMED = 4  # tensors that a message names


def load_weights(path: str, *, attention: str) -> PreTrainedModel:
    """The float32 model of a folder or hub id, on the CPU; a ConfigError names what is wrong."""
    if Path(path).is_dir():
        for file in sorted(Path(path).iterdir()):
            _check_file(file)
    logging.disable_progress_bar()  # one of tensors, on a screen that shows the run's own
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what is warned of here is refused below
    try:
        with reading(f'model.path: cannot load the weights of "{path}"'):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=torch.float32,
                attn_implementation=attention,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    finally:
        logging.set_verbosity(verbosity)
    hf, report = loaded
    for problem in _problems(hf, report):
        raise ConfigError(f'model.path: the weights of "{path}" {problem}')
    return hf


def has_weights(path: str) -> bool:
    """Whether the weights of a folder or hub id, whose config.json is here, are here too."""
    folder = Path(str(cached_file(path, "config.json"))).parent
    return any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir())


def base_digest(config: ModelConfig, model_config: PreTrainedConfig) -> dict[str, str]:
    """What names the frozen weights of a run with adapters, whose checkpoints hold none of them.

    The commit of a hub model; of a folder the names, sizes, first and last megabyte of its files.
    """
    if not config.lora_rank:
        return {}
    digest = hashlib.blake2b(str(getattr(model_config, "_commit_hash", "")).encode())
    files = Path(config.path).iterdir() if Path(config.path).is_dir() else ()
    for path in sorted(file for file in files if file.suffix in (".safetensors", ".bin")):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(1 << 20))
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            digest.update(file.read())
    return {"model.path": digest.hexdigest()[:32]}


def _check_file(file: Path) -> None:
    """Name the file that is no model file: transformers' errors do not."""
    if not file.is_file():
        return
    with file.open("rb") as content:
        if content.read(len(_POINTER)) == _POINTER:
            raise ConfigError(
                f"model.path: {file} is a pointer of git-lfs, not the file; run `git lfs pull`"
            )
    if file.name == "adapter_config.json":
        raise ConfigError(f"model.path: {file} is of an adapter; merge it into its model first")
    with reading(f"model.path: {file} is truncated or broken"):
        dtypes = _stored_dtypes(file)
    if quantized := [name for name, dtype in dtypes.items() if dtype not in _DTYPES]:
        raise ConfigError(
            f"model.path: {file} holds quantized weights, such as {quantized[0]} of dtype "
            f"{dtypes[quantized[0]]}; train the model they were made from"
        )


def _stored_dtypes(file: Path) -> dict[str, Any]:
    """The dtypes of the tensors in a file of weights, by name."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}
    if file.match("pytorch_model*.bin"):
        held = torch.load(file, map_location="meta", weights_only=True)
        return {name: tensor.dtype for name, tensor in held.items()}
    return {}


def _problems(hf: PreTrainedModel, report: dict[str, set]) -> Iterator[str]:
    misshapen = [
        f"{name} (expected {list(expected)}, got {list(got)})"
        for name, got, expected in report["mismatched_keys"]
    ]
    for fault, names in (
        ("lack", report["missing_keys"]),
        ("hold unexpected", report["unexpected_keys"]),
        ("have a wrong shape in", misshapen),
    ):
        if names:
            yield f"{fault} {_listed(names)}; they and config.json must be of one model"
    # The extremes of 1e8 numbers take 16 ms, isfinite() takes 520 ms; a NaN is both of them.
    extremes = {name: torch.stack(p.aminmax()) for name, p in hf.named_parameters()}
    if broken := [name for name, ends in extremes.items() if not ends.isfinite().all()]:
        yield f"are NaN or infinite in {_listed(broken)}; restore the files"
    head, embedding = hf.get_output_embeddings(), hf.get_input_embeddings()
    if hf.config.tie_word_embeddings and head.weight is not embedding.weight:
        yield (
            "hold an lm_head.weight of their own, but config.json says tie_word_embeddings = true; "
            "set that to false, or remove the tensor"
        )


def _listed(names: list[str] | set[str]) -> str:
    first = ", ".join(sorted(names)[:_NUM_NAMED])
    return first if len(names) <= _NUM_NAMED else f"{first} and {len(names) - _NUM_NAMED} more"
