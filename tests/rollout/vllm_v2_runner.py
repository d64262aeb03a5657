"""Run by test_vllm_score_processor.py in a process of its own: vLLM's V2 model runner on a CPU.

That runner wants Triton kernels. Triton's interpreter runs them on CPU tensors, so all that is
needed is a vLLM that believes in a CPU backend of Triton; the sampler, its logits processors and
the scheduler are the real ones.
"""

import json
import sys
from types import SimpleNamespace

import triton.backends
from transformers import AutoModelForCausalLM

from laser_fast.config import RolloutConfig
from laser_fast.records import Prompt, Sampling, SpecialTokens
from laser_fast.rollout.vllm import VllmEngine

# Asked by vLLM while it is imported, which the engine does when it starts.
triton.backends.backends["cpu"] = SimpleNamespace(
    driver=SimpleNamespace(is_active=lambda: True), compiler=None
)


def main(path, score_token, eos, vocab, max_model_len):
    tokens = SpecialTokens(
        score_token_id=score_token, eos_token_ids=tuple(eos), pad_token_id=0, vocab_size=vocab
    )
    engine = VllmEngine(
        path,
        RolloutConfig(engine="vllm", max_new_tokens=10, max_num_seqs=16),
        tokens,
        max_model_len=max_model_len,
    )
    engine.sync(iter(AutoModelForCausalLM.from_pretrained(path).state_dict().items()))
    # The last prompt ends with an EOS id, which asks for no score.
    ids = [(10, 11, 12), (30, 31), (20, 21, eos[0])]
    prompts = [
        Prompt(prompt_id=f"p{i}", text="", prompt_ids=p, answer="") for i, p in enumerate(ids)
    ]
    found = []
    for temperature, score_at in ((1.0, "last"), (0.7, "eos")):
        sampling = Sampling(
            group_size=6, temperature=temperature, max_new_tokens=10, seed=1, score_at=score_at
        )
        groups = engine.generate(prompts, sampling)
        completions = [
            (g.prompt.prompt_ids, c.completion_ids, c.rollout_logprobs, c.score_logprob)
            for g in groups
            for c in g.completions
        ]
        found.append((temperature, score_at, completions))
    given = engine.token_logprobs(groups, temperature=0.7)
    is_v2 = engine._llm.llm_engine.vllm_config.use_v2_model_runner
    print(json.dumps({"is_v2": is_v2, "rollout": found, "given": given}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
