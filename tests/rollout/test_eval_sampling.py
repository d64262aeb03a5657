"""Evaluations may sample otherwise than training: fewer tokens, another temperature and length."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_models import make_config, make_model

from laser_fast.config import ConfigError
from laser_fast.evaluation.settings import build_config
from laser_fast.records import Prompt, Sampling, SpecialTokens
from laser_fast.rollout.engine import make_sampling
from laser_fast.rollout.hf import HfEngine, truncate
from laser_fast.rollout.score_request import request_fields

PLAIN = Sampling(group_size=1, temperature=1.0, max_new_tokens=4, seed=0)
CASES = [
    {"top_p": 0.6},
    {"top_p": 1e-6},
    {"top_k": 3},
    {"top_k": 99},
    {"min_p": 0.3},
    {"min_p": 0.05, "top_k": 4, "top_p": 0.7},
]
TOKENS = SpecialTokens(score_token_id=3, eos_token_ids=(1,), pad_token_id=0, vocab_size=13)


def allowed(logits, sampling):
    """The tokens that are left, by the definition of each option, one after the other."""
    left = {i: math.exp(l) for i, l in enumerate(logits) if l > -math.inf}
    most = max(left.values())
    left = {i: p for i, p in left.items() if p >= sampling.min_p * most}
    order = sorted(left, key=left.get, reverse=True)[: sampling.top_k or None]
    total, before, kept = sum(left[i] for i in order), 0.0, []
    for i in order:
        if before < sampling.top_p * total:
            kept.append(i)
        before += left[i]
    return sorted(kept)


@pytest.mark.parametrize("options", CASES)
def test_what_is_left_out(options):
    logits = torch.randn(50, 9, dtype=torch.float64) * 2
    logits[:, 4] = -torch.inf  # banned
    sampling = replace(PLAIN, **options)
    found = truncate(logits, sampling)
    for before, after in zip(logits, found, strict=True):
        kept = after.isfinite().nonzero()[:, 0].tolist()
        assert kept == allowed(before.tolist(), sampling)
        assert torch.equal(after[kept], before[kept])


def test_training_draws_from_all_tokens():
    logits = torch.randn(3, 9)
    assert truncate(logits, PLAIN) is logits


def test_the_engine_keeps_to_it_and_reports_the_whole_distribution():
    model = make_model(vocab_size=16, eos_token_id=1, pad_token_id=0)
    engine = HfEngine(model, TOKENS, max_num_seqs=64)
    prompt = Prompt(prompt_id="p", text="", prompt_ids=(5, 6), answer="")
    sampling = replace(PLAIN, group_size=60, temperature=3.0, top_k=2)
    [group] = engine.generate([prompt], sampling)
    firsts = {c.completion_ids[0]: c.rollout_logprobs[0] for c in group.completions}
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([[5, 6]])).logits[0, -1] / 3.0
    banned = torch.tensor([3, 13, 14, 15])
    best = logits.index_fill(0, banned, -torch.inf).topk(2).indices.tolist()
    assert set(firsts) == set(best)
    for token, logprob in firsts.items():
        assert logprob == pytest.approx(logits.log_softmax(0)[token].item(), abs=1e-5)


def test_evaluations_have_settings_of_their_own():
    own = {"eval_temperature": 0.6, "eval_max_new_tokens": 99, "eval_top_p": 0.9}
    config = make_config(rollout={"max_new_tokens": 30, "eval_min_p": 0.1, "eval_top_k": 7, **own})
    what = {"group_size": 2, "needs_score": True}
    trains = make_sampling(config, "train", 0, **what)
    assert (trains.temperature, trains.max_new_tokens) == (1.0, 30)
    assert (trains.top_p, trains.top_k, trains.min_p) == (1.0, 0, 0.0)
    measures = make_sampling(config, "eval", **what)
    assert (measures.temperature, measures.max_new_tokens) == (0.6, 99)
    assert (measures.top_p, measures.top_k, measures.min_p) == (0.9, 7, 0.1)
    assert config.max_sequence_tokens == config.data.max_prompt_tokens + 99 + 1
    fields, _ = request_fields(TOKENS, measures)
    assert {"temperature": 0.6, "top_p": 0.9, "top_k": 7, "min_p": 0.1}.items() <= fields.items()
    last = make_sampling(make_config(score={"position": "last"}), "train", **what)
    assert (trains.score_at, last.score_at) == ("eos", "last")
    draws = [make_sampling(make_config(), draw, **what) for draw in ("eval", "train")]
    assert replace(draws[0], seed=0) == replace(draws[1], seed=0)


def test_what_is_typed_wins_against_the_evaluations_of_a_file(tmp_path):
    (tmp_path / "run.toml").write_text("[rollout]\neval_temperature = 0.6\neval_top_p = 0.9\n")
    config = build_config("m", config=tmp_path / "run.toml")
    assert make_sampling(config, "eval", group_size=1, needs_score=True).temperature == 0.6
    typed = ["rollout.temperature=0.8"]
    config = build_config("m", config=tmp_path / "run.toml", overrides=typed)
    found = make_sampling(config, "eval", group_size=1, needs_score=True)
    assert (found.temperature, found.top_p) == (0.8, 0.9)


@pytest.mark.parametrize("value", ["top_p=0.0", "top_p=1.1", "min_p=1.0", "top_k=-1"])
def test_values_out_of_range_are_refused(value):
    key, _, number = value.partition("=")
    with pytest.raises(ConfigError, match=f"rollout.eval_{key}"):
        make_config(rollout={f"eval_{key}": float(number) if "." in number else int(number)})
