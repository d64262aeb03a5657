"""Colocated on two gloo ranks: FSDP2 shards and vLLM in the same processes, nothing simulated."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks need two GPUs or none"),
]


def run_ranks(path, tensor_parallel):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        + ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        + [str(Path(__file__).with_name("vllm_ranks.py")), str(path), str(tensor_parallel)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{root / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def data_parallel(tiny):
    return run_ranks(tiny.path, 1)


def test_every_sync_of_sharded_weights_arrives(data_parallel):
    for ranks in data_parallel:
        for found in ranks:
            assert found["given"] < 1e-5
            assert found["rollout"] < 1e-5
    first, second = data_parallel
    assert first[0]["draws"] != second[0]["draws"]
    assert sum(found["scores"] for ranks in data_parallel for found in ranks) > 0


def test_tensor_parallel_ranks_share_an_engine_and_keep_their_own_prompts(tiny, data_parallel):
    for ranks, expected in zip(run_ranks(tiny.path, 2), data_parallel, strict=True):
        for found, theirs in zip(ranks, expected, strict=True):
            assert found["given"] < 1e-5
            assert found["rollout"] < 1e-5
            # Who samples together is no part of the draw.
            assert found["draws"] == theirs["draws"]
