"""TRL's GRPO with the score on TRL's own vLLM generation: vLLM's log-probs are the policy's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs TRL")

from trl_runs import save_model

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_completions_of_vllm_train_policy_and_score(tmp_path):
    # vLLM's smallest heads have 32 channels.
    save_model(tmp_path, hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    tests = Path(__file__).parents[1]
    paths = [tests / "helpers", tests.parent, tests.parent / "kernels"]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("trl_on_vllm.py")), str(tmp_path)],
        env=os.environ
        | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
        | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["whole"] and found["ended"] > 4
    assert len(found["steps"]) == 3
    for step in found["steps"]:  # the second and third after weights that changed
        assert step["sampling/sampling_logp_difference/max"] < 1e-4
        assert step["score/loss"] > 0
    assert len({step["score/loss"] for step in found["steps"]}) == 3
