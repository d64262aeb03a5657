"""The logits processor inside both of vLLM's runners, and next to requests that know nothing."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from laser_fast.rollout.score_request import (
    EOS_TOKEN_IDS,
    SCORE_TOKEN_ID,
    TEMPERING,
    VOCAB_SIZE,
    score_request,
)

pytestmark = pytest.mark.vllm


def run(engine, params, prompt_ids=(10, 11, 12)):
    from vllm import SamplingParams

    drafts = [SamplingParams(**{"max_tokens": 40, "detokenize": False, **p}) for p in params]
    inputs = [{"prompt_token_ids": list(prompt_ids)}] * len(drafts)
    outputs = engine._llm.generate(inputs, drafts, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def greedy(tiny, prompt_ids, num, banned=()):
    ids = list(prompt_ids)
    for _ in range(num):
        logits = tiny.model(torch.tensor([ids])).logits[0, -1].detach()
        logits[list(banned)] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[len(prompt_ids) :]


def test_requests_that_ask_for_nothing_are_untouched_by_neighbours_that_do(engine, tiny):
    asked = {
        "extra_args": {SCORE_TOKEN_ID: tiny.score_token, EOS_TOKEN_IDS: []},
        "stop_token_ids": [tiny.score_token],
    }
    # The bias makes the score token the greedy choice of everyone who may have it.
    wants = {"temperature": 0.0, "logit_bias": {tiny.score_token: 100.0}, "ignore_eos": True}
    plain = {"temperature": 0.0, "ignore_eos": True}
    free, banned, neighbour, plain_banned = run(
        engine, [wants, wants | asked, plain, plain | asked]
    )
    assert free == [tiny.score_token] * 40
    assert tiny.score_token not in banned
    assert neighbour == greedy(tiny, (10, 11, 12), 40)
    assert plain_banned == greedy(tiny, (10, 11, 12), 40, banned=[tiny.score_token])


def test_each_request_has_its_own_token_vocabulary_and_ends(engine):
    asked = [
        {SCORE_TOKEN_ID: 7, EOS_TOKEN_IDS: [5], VOCAB_SIZE: 10},
        {SCORE_TOKEN_ID: 9, EOS_TOKEN_IDS: [5, 6], VOCAB_SIZE: 12},
        {SCORE_TOKEN_ID: 7, EOS_TOKEN_IDS: [], VOCAB_SIZE: 8},
    ]
    fields = {"seed": 1, "logprobs": 0, "ignore_eos": True}
    stops = [[7], [9], [7]]
    drawn = run(
        engine,
        [
            fields | {"extra_args": extra, "stop_token_ids": stop}
            for extra, stop in zip(asked, stops, strict=True)
        ],
    )
    for ids, (token, ends, size) in zip(
        drawn, [(7, {5}, 10), (9, {5, 6}, 12), (7, set(), 8)], strict=True
    ):
        *body, last = ids
        assert max(ids) < size
        assert token not in body
        assert (last == token) == bool(set(body) & ends)
        if ends:
            assert body[-1] in ends and not set(body[:-1]) & ends


def test_the_served_models_own_eos_ids_are_the_default(engine, tiny):
    fields = score_request(tiny.score_token)
    extra = {"extra_args": fields.pop("vllm_xargs")}
    drawn = run(engine, [{"seed": s, "logprobs": 0, **fields, **extra} for s in range(60)])
    scored = [ids for ids in drawn if ids[-1] == tiny.score_token]
    assert {ids[-2] for ids in scored} == set(tiny.eos)
    assert all(not set(ids[:-2]) & set(tiny.eos) for ids in scored)


def test_models_served_before_load_the_same_class_by_its_old_name():
    code = "import sys; from laser_fast.rollout import score_processor, self_reward;"
    code += "assert self_reward.SelfScoreProcessor is score_processor.SelfScoreProcessor;"
    code += "assert 'laser_fast.config' not in sys.modules"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def asking(fields):
    return {"extra_args": {SCORE_TOKEN_ID: 7} | fields}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ignore_eos": False}, "ignore_eos = true and stop_token_ids"),
        ({"stop_token_ids": [3]}, r"stop_token_ids = \[7\]"),
        ({"logprobs": None}, "needs logprobs"),
        ({"extra_args": {SCORE_TOKEN_ID: "seven"}}, "expected a token id, got 'seven'"),
        ({"extra_args": {SCORE_TOKEN_ID: True}}, "expected a token id, got True"),
        ({"extra_args": {SCORE_TOKEN_ID: -1}}, "expected a token id, got -1"),
        (asking({EOS_TOKEN_IDS: 5}), "laser_eos_token_ids: expected a list of token ids, got 5"),
        (asking({EOS_TOKEN_IDS: ["a"]}), r"expected a list of token ids, got \['a'\]"),
        (asking({EOS_TOKEN_IDS: [2**40]}), "expected a list of token ids"),
        (asking({EOS_TOKEN_IDS: [], VOCAB_SIZE: "x"}), "laser_vocab_size: .* got 'x'"),
        (asking({VOCAB_SIZE: 7}), "laser_vocab_size: expected a number above 7, got 7"),
        (asking({TEMPERING: 0.7}), "laser_tempering is for engines in process"),
        # Without a score as well, the token must be one of the model's.
        (
            asking({EOS_TOKEN_IDS: [], SCORE_TOKEN_ID: 10**9}),
            r"needs ignore_eos = true and stop_token_ids = \[1000000000\]",
        ),
        (
            asking({EOS_TOKEN_IDS: [], SCORE_TOKEN_ID: 10**9}) | {"stop_token_ids": [10**9]},
            "stop_token_ids contain",
        ),
    ],
)
def test_a_request_that_would_get_no_score_is_refused(engine, change, message):
    from vllm.exceptions import VLLMValidationError

    fields = {
        "ignore_eos": True,
        "stop_token_ids": [7],
        "logprobs": 0,
        "extra_args": {SCORE_TOKEN_ID: 7},
    }
    with pytest.raises((VLLMValidationError, ValueError), match=message):  # the latter in 0.26
        run(engine, [fields | change])
    (ids,) = run(engine, [fields | {"seed": 0}])
    assert ids


@pytest.mark.slow
def test_the_v2_runner_gives_the_same_numbers(tiny):
    from vllm import __version_tuple__

    if __version_tuple__ < (0, 31):
        pytest.skip("the V2 runner takes logits processors since vLLM 0.31")
    root = Path(__file__).parents[2]
    options = {
        "path": str(tiny.path),
        "score_token": tiny.score_token,
        "eos": tiny.eos,
        "vocab": tiny.vocab,
        "max_model_len": 64,
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("vllm_v2_runner.py")), json.dumps(options)],
        env=os.environ
        | {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "OMP_NUM_THREADS": "1"}
        | {"PYTHONPATH": f"{root}:{root / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["is_v2"] is True
    num_scores = 0
    for temperature, score_at, completions in found["rollout"]:
        for prompt_ids, ids, logprobs, score in completions:
            rows = tiny.logprobs(prompt_ids, ids, temperature)
            expected = rows[:-1].gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
            assert logprobs == pytest.approx(expected, abs=2e-5)
            assert tiny.score_token not in ids and max(ids) < tiny.vocab
            assert (score is None) == (ids[-1] not in tiny.eos)
            if score is not None:
                row = -1 if score_at == "eos" else -2
                read = tiny.logprobs(prompt_ids, ids)[row, tiny.score_token].item()
                assert score == pytest.approx(read, abs=2e-5)
                num_scores += 1
    assert num_scores >= 4
    *_, (_, _, completions) = found["rollout"]
    for given, (_, _, logprobs, _) in zip(found["given"], completions, strict=True):
        assert given == pytest.approx(logprobs, abs=2e-5)


def test_a_server_of_an_untested_version_warns(monkeypatch, recwarn):
    import vllm

    from laser_fast.rollout.vllm import NEWEST, OLDEST

    name = "laser_fast.rollout.score_processor"

    def load(version):
        monkeypatch.setattr(vllm, "__version_tuple__", version)
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.import_module(name)

    load((*OLDEST, 0))
    load((*NEWEST, 1))
    assert not [warning for warning in recwarn if "tested with vLLM" in str(warning.message)]
    for version in ((0, OLDEST[1] - 1, 0), (0, NEWEST[1] + 1, 0, "dev1")):
        with pytest.warns(UserWarning, match="tested with vLLM 0.26 to 0.32"):
            load(version)
    monkeypatch.delitem(sys.modules, name)
