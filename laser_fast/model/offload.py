"""Activations in host memory between forward and backward, by torch's save_on_cpu.

What autograd saves is copied to pinned memory on the stream that computes, and back when its
backward needs it; with gradient checkpointing that is the input of every block, a few hundred
times less than all of it. torch's own wrapper (offload_wrapper) has the same hooks, which take the
gathered weights that a linear layer saves, too. Its asynchronous stream is for whole compiled
graphs, marked "testing purpose", and the CPU_OFFLOAD policies of its selective checkpointing say
which operations' outputs go, each by name.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks


class ActivationOffload:
    """Makes contexts in which what is saved goes to the host, the weights of `modules` excepted.

    FSDP2 gathers a module's weights right before its forward, so that their storages, by which a
    saved view of one is known, are asked for then; make this after `fully_shard`.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.weights: set[int] = set()
        for module in modules:
            module.register_forward_pre_hook(self._look)

    @torch.compiler.disable  # a compiled graph would keep the storages of its first call
    def _look(self, module: nn.Module, _: Any) -> None:
        self.weights = {storage_of(weight) for weight in module.parameters()}

    def __call__(self) -> saved_tensors_hooks:
        """The context."""
        host = save_on_cpu(pin_memory=True)

        def pack(tensor: Tensor) -> Any:
            return tensor if storage_of(tensor) in self.weights else host.pack_hook(tensor)

        def unpack(packed: Any) -> Tensor:
            return packed if isinstance(packed, Tensor) else host.unpack_hook(packed)

        return saved_tensors_hooks(pack, unpack)


def storage_of(tensor: Tensor) -> int:
    """What tensors that share their memory have in common."""
    return tensor.untyped_storage()._cdata
