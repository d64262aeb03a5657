"""What only a GPU shows: real sleep, bfloat16, and weights to a server by NCCL."""

import pytest
import torch

from laser_fast.config import RolloutConfig
from laser_fast.records import Prompt, Sampling
from laser_fast.rollout.engine import check_agreement
from laser_fast.rollout.score_request import PROCESSOR
from laser_fast.rollout.vllm import VllmEngine
from laser_fast.rollout.vllm_server import VllmServerEngine

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.slow]
SAMPLING = Sampling(group_size=8, temperature=1.0, max_new_tokens=24, seed=0)
PROMPTS = [
    Prompt(prompt_id=str(i), text="", prompt_ids=tuple(range(8, 12 + i)), answer="")
    for i in range(8)
]


def check_scores_and_logprobs(policy, groups):
    rollout = [c.rollout_logprobs for group in groups for c in group.completions]
    assert check_agreement(rollout, policy.token_logprobs(groups)) < 0.05  # bfloat16, peaked model
    scored = [(g, c) for g in groups for c in g.completions if c.is_finished]
    assert len(scored) > 5
    gaps = [abs(c.score_logprob - policy.score_logprob(g, c)) for g, c in scored]
    assert sum(gaps) / len(gaps) < 0.1


def test_sleep_gives_the_memory_back_and_the_next_sync_fills_it(tiny):
    engine = VllmEngine(
        str(tiny.path),
        RolloutConfig(engine="vllm", max_new_tokens=24, gpu_memory_fraction=0.3),
        tiny.tokens,
        max_model_len=64,
    )
    for _ in range(2):
        engine.sync(tiny.weights())
        check_scores_and_logprobs(tiny, engine.generate(PROMPTS, SAMPLING))
        awake, total = torch.cuda.mem_get_info()
        engine.sleep()
        asleep, _ = torch.cuda.mem_get_info()
        assert asleep - awake > 0.15 * total
        with pytest.raises(RuntimeError, match="call sync first"):
            engine.generate(PROMPTS, SAMPLING)
    engine.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a second GPU")
def test_weights_reach_a_server_by_nccl(served, start_server):
    options = ["--logits-processors", PROCESSOR]
    options += ["--weight-transfer-config", '{"backend": "nccl"}']
    with start_server(served, *options, CUDA_VISIBLE_DEVICES="1") as (url, _):
        engine = VllmServerEngine(
            RolloutConfig(engine="vllm_server", server_url=url, max_new_tokens=24),
            served.tokens,
            max_model_len=64,
        )
        other = type(served).make(served.path.with_name("other"), seed=1)
        for policy in (other, served):
            weights = ((name, tensor.cuda()) for name, tensor in policy.weights())
            engine.sync(weights)
            check_scores_and_logprobs(policy, engine.generate(PROMPTS, SAMPLING))
        engine.close()
