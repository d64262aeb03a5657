"""A tiny model of every family: vLLM and the policy agree after each of two syncs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from family_models import FAMILIES

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="engines that sleep, as on a GPU, are one per process"
    ),
]
# Keys of the configuration and the rank of LoRA, where they are not those of the other tests. The
# groups of experts are those of the first engine's model, so that it has some.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CASES = {
    "qwen3_moe": ({"mlp_only_layers": [1]}, 0),
    "glm4_moe": (EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}, 0),
    "olmoe": (EXPERTS, 0),
    "qwen2_moe": (EXPERTS | {"shared_expert_intermediate_size": 32}, 0),
    "qwen2": ({"use_sliding_window": False, "sliding_window": None, "layer_types": None}, 0),
    "qwen3": ({}, 4),
    "llama": ({}, 0),
}
CASES |= {family: ({}, 0) for family in FAMILIES if family not in CASES}
LIMIT = 2e-5  # nats of any token, in float32
REFUSED = ("qwen2",)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    root = Path(__file__).parents[2]
    options = {"folder": str(tmp_path_factory.mktemp("families")), "families": CASES}
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("vllm_families.py")),
            json.dumps(options | {"refused": REFUSED}),
        ],
        env=os.environ
        | {"PYTHONPATH": f"{root}:{root / 'kernels'}:{root / 'tests' / 'helpers'}"}
        # vLLM compiles some layers although it is asked not to, a minute of C++.
        | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr.partition("nanobind: leaked")[0][-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("family", CASES)
def test_the_engine_has_the_weights_of_the_policy(measured, family):
    rounds = measured[0][family]
    for found in rounds:
        assert found["tokens"] < LIMIT
        assert found["scores"] < LIMIT
        assert found["num_tokens"] > 20
        assert found["num_scores"] > 3
    assert rounds[1]["stale"] > 0.1


def test_windows_that_vllm_does_not_know_are_refused_in_a_sentence(measured):
    assert 'vLLM cannot run "' in measured[1]["qwen2"]
    assert "Sliding window for some but all layers is not supported" in measured[1]["qwen2"]
