"""Stand-ins for what the integrations touch of verl, prime-rl and torchtitan, as recorded.

`SOURCES` says where each function is in the host's package; test_hosts.py compares the parameters
with an installed host's.
"""

import importlib
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import torch
from torch.nn.functional import cross_entropy

VERL = {
    "verl.models.transformers.monkey_patch": ["patch_forward_with_backends"],
    "verl.utils.experimental.torch_functional": ["FusedLinearForPPO.forward"],
    "verl.utils.kernel.linear_cross_entropy": ["LinearCrossEntropy.forward"],
    "verl.workers.engine.fsdp.transformer_impl": ["FSDPEngineWithLMHead.prepare_model_inputs"],
}
PRIME_RL = {
    "prime_rl.trainer.models.layers.lm_head": [
        "FusedOutputLinear.forward",
        "VanillaOutputLinear.forward",
    ],
    "prime_rl.trainer.models.layers.lm_head_gemma": [
        "GemmaFusedOutputLinear.forward",
        "GemmaVanillaOutputLinear.forward",
    ],
}
TORCHTITAN = {
    "torchtitan.components.loss": ["compute_logprobs", "ChunkedLossWrapper.__call__"],
    "torchtitan.experiments.rl.losses.dapo": [],
}
SOURCES = VERL | PRIME_RL | TORCHTITAN


def load(monkeypatch, host, version):
    """Import an integration over the fake of its host; returns it and the host's modules."""
    modules = {name: ModuleType(name) for name in SOURCES if name.startswith(f"{host}.")}
    for name, module in list(modules.items()):
        parts = name.split(".")
        for end in range(1, len(parts)):
            package = modules.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
            package.__path__ = []
        FILL[name](module)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        package, _, last = name.rpartition(".")
        if package:
            setattr(modules[package], last, module)
    if host == "torchtitan":
        modules["torchtitan.experiments.rl.losses"].DAPOLoss = modules[
            "torchtitan.experiments.rl.losses.dapo"
        ].DAPOLoss
    integration = f"laser_fast.integrations.{host}"
    monkeypatch.delitem(sys.modules, integration, raising=False)
    found = [SimpleNamespace(version=version)] if version else []
    monkeypatch.setattr("laser_fast.integrations.distributions", lambda **_: found)
    return integration, modules


def import_over(monkeypatch, host, version):
    """The integration over the fake of its host, and the host's modules."""
    integration, modules = load(monkeypatch, host, version)
    module = importlib.import_module(integration)
    monkeypatch.delitem(sys.modules, integration)  # so that it is there no longer after the test
    return module, modules


def _monkey_patch(module):
    def patch_forward_with_backends(model, use_fused_kernels=False, fused_kernels_backend=None):
        model.backend = fused_kernels_backend if use_fused_kernels else None

    module.patch_forward_with_backends = patch_forward_with_backends


def _torch_functional(module):
    class FusedLinearForPPO:
        def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
            raise AssertionError("verl's own head")

    module.FusedLinearForPPO = FusedLinearForPPO


def _linear_cross_entropy(module):
    class LinearCrossEntropy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, labels, temperature, reduction, dist_process_group=None):
            raise AssertionError("verl's own head")

    module.LinearCrossEntropy = LinearCrossEntropy
    module.linear_cross_entropy = LinearCrossEntropy.apply


def _transformer_impl(module):
    class FSDPEngineWithLMHead:
        use_ulysses_sp = False

        def prepare_model_inputs(self, micro_batch):
            ids = micro_batch["input_ids"].values()[None]
            inputs = {"input_ids": ids, "temperature": micro_batch["temperature"]}
            if micro_batch["use_remove_padding"]:
                inputs["shift_labels"] = ids.roll(-1, dims=1)
            return inputs, {}

    class FSDPEngineWithValueHead(FSDPEngineWithLMHead):
        pass

    module.FSDPEngineWithLMHead = FSDPEngineWithLMHead
    module.FSDPEngineWithValueHead = FSDPEngineWithValueHead


def _prime_head(name):
    def forward(self, hidden_states, labels=None, temperature=None):
        raise AssertionError("prime-rl's own head")

    def make(self, in_features, out_features, softcap=None):
        torch.nn.Linear.__init__(self, in_features, out_features, bias=False)
        if softcap:
            self.softcap = softcap

    return type(name, (torch.nn.Linear,), {"forward": forward, "__init__": make})


def _lm_head(module):
    module.PrimeLmOutput = dict
    for name in ("FusedOutputLinear", "VanillaOutputLinear"):
        setattr(module, name, _prime_head(name))


def _lm_head_gemma(module):
    for name in ("GemmaFusedOutputLinear", "GemmaVanillaOutputLinear"):
        setattr(module, name, _prime_head(name))


def _loss(module):
    def compute_logprobs(logits, labels, *, return_entropy=False):
        logprobs = -cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
        p = logits.softmax(-1)
        entropy = -(p * p.log()).sum(-1).detach()
        logprobs = logprobs.view(labels.shape)
        return (logprobs, entropy) if return_entropy else logprobs

    class ChunkedLossWrapper:
        @dataclass(kw_only=True, slots=True)
        class Config:
            num_chunks: int = 8
            loss_fn: object = field(default=None)

        def __init__(self, config, *, compile_config=None):
            self.num_chunks, self.loss_fn = config.num_chunks, config.loss_fn

        def set_lm_head(self, lm_head):
            self.lm_head = lm_head

        def __call__(self, pred, labels, global_valid_tokens=None, **loss_inputs):
            return self.loss_fn(self.lm_head(pred), labels, global_valid_tokens, **loss_inputs)

    module.IGNORE_INDEX = -100
    module.compute_logprobs = compute_logprobs
    module.ChunkedLossWrapper = ChunkedLossWrapper


def _dapo(module):
    module.compute_logprobs = None  # torchtitan's imports it by name, and so does the test

    class DAPOLoss:
        def __call__(self, logits, labels, tokens=None, *, advantages, loss_mask, **_):
            logprobs, entropy = module.compute_logprobs(logits, labels, return_entropy=True)
            loss = -(logprobs * advantages * loss_mask).sum() / tokens
            return loss, {"entropy/mean": (entropy * loss_mask).sum() / tokens}

    module.DAPOLoss = DAPOLoss


FILL = {
    "verl.models.transformers.monkey_patch": _monkey_patch,
    "verl.utils.experimental.torch_functional": _torch_functional,
    "verl.utils.kernel.linear_cross_entropy": _linear_cross_entropy,
    "verl.workers.engine.fsdp.transformer_impl": _transformer_impl,
    "prime_rl.trainer.models.layers.lm_head": _lm_head,
    "prime_rl.trainer.models.layers.lm_head_gemma": _lm_head_gemma,
    "torchtitan.components.loss": _loss,
    "torchtitan.experiments.rl.losses.dapo": _dapo,
}
