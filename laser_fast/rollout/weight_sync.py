"""Weights into vLLM, with every tensor accounted for.

vLLM loads what it is sent and only warns about what it is not: a head that was left out stays
stale, silently. So its parameters are listed once, under the names that a checkpoint uses, and
every stream is checked against that list while it passes through.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn


def checkpoint_names(model: nn.Module) -> list[str]:
    """Names under which a checkpoint must hold the parameters of a vLLM model.

    vLLM fuses some, such as q_proj, k_proj and v_proj into qkv_proj; a tied head is listed under
    both of its names.
    """
    fused = getattr(model, "packed_modules_mapping", {})
    names = []
    for name, _ in model.named_parameters(remove_duplicate=False):
        *path, module, leaf = name.split(".")
        names += [".".join((*path, part, leaf)) for part in fused.get(module, [module])]
    return names


def account_for(
    weights: Iterable[tuple[str, Tensor]], names: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """The same weights, checked: each of `names` exactly once and nothing else.

    Unknown names are left out, and the error waits for the end of the stream: drawing an item may
    be collective, so every rank must draw them all.

    Raises:
        ValueError: names the tensors.
    """
    missing = set(names)
    unexpected = []
    for name, tensor in weights:
        if name in missing:
            missing.remove(name)
            yield name, tensor
        else:
            unexpected.append(f"{name} (twice)" if name in names else name)
    if missing or unexpected:
        raise ValueError(
            f"weight sync: expected {len(names)} tensors, each once; "
            f"missing: {_listing(missing)}; unexpected: {_listing(unexpected)}. Stream every "
            "entry of the state_dict, a tied head under both of its names"
        )


def _listing(names: Iterable[str]) -> str:
    names = sorted(names)
    shown = ", ".join(names[:8]) or "none"
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"
