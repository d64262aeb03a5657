"""What is asked of SGLang and read from it; its answers are in the form of the wheel of 0.5.23."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from page_code import code_blocks

import laser_fast.integrations
from laser_fast.integrations.sglang import score_logprob, score_request

PAGE = Path(laser_fast.integrations.__file__).with_name("README.md")
PROMPT, ANSWER, EOS, SCORE_TOKEN, LOGPROB = [5, 6, 8], [9, 4], 2, 7, -9.0958

GENERATED = {
    "text": "94",
    "output_ids": [*ANSWER, EOS],
    "meta_info": {
        "id": "3e1d0a4b",
        "finish_reason": {"type": "stop", "matched": EOS},
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "cached_tokens": 0,
    },
}
SCORED = {
    "text": "",
    "output_ids": [],
    "meta_info": {
        "id": "77c2f01e",
        "finish_reason": {"type": "length", "length": 0},
        "prompt_tokens": 6,
        "completion_tokens": 0,
        "cached_tokens": 5,
        "input_token_logprobs": [],
        "output_token_logprobs": [],
        "output_token_logprobs_length": 0,
        "input_token_ids_logprobs": [],
        "output_token_ids_logprobs": [[[LOGPROB, SCORE_TOKEN, None]]],
    },
}


def test_a_score_request_draws_nothing_and_names_the_score_token():
    request = score_request((*PROMPT, *ANSWER, EOS), SCORE_TOKEN)
    assert (
        request
        == json.loads(json.dumps(request))
        == {
            "input_ids": [*PROMPT, *ANSWER, EOS],
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0, "repetition_penalty": 1.0},
            "return_logprob": True,
            "token_ids_logprob": [SCORE_TOKEN],
        }
    )


def test_the_log_prob_is_that_of_the_token_whatever_its_place():
    row = [[-3.5, 11, None], [LOGPROB, SCORE_TOKEN, "<|reserved|>"]]
    answer = {"meta_info": {"output_token_ids_logprobs": [row]}}
    assert score_logprob(answer, SCORE_TOKEN) == score_logprob(SCORED, SCORE_TOKEN) == LOGPROB


@pytest.mark.parametrize(
    "answer",
    [
        GENERATED,
        {"error": {"message": "no"}},
        {"meta_info": {"output_token_ids_logprobs": [None]}},
        {"meta_info": {"output_token_ids_logprobs": [[[-3.5, 11, None]]]}},
    ],
)
def test_an_answer_without_it_is_refused(answer):
    with pytest.raises(
        ValueError, match="expected meta_info.output_token_ids_logprobs with token 7"
    ):
        score_logprob(answer, SCORE_TOKEN)


def test_the_page_scores_the_whole_answer(monkeypatch):
    posted, replies = [], [GENERATED, SCORED]

    def post(url, json):
        posted.append((url, json))
        return SimpleNamespace(json=lambda: replies[len(posted) - 1])

    client = ModuleType("requests")
    client.post = post
    monkeypatch.setitem(sys.modules, "requests", client)
    [code] = code_blocks(PAGE, "SGLang")
    names = {"prompt_ids": PROMPT, "max_tokens": 40, "score_token_id": SCORE_TOKEN}
    names |= {"beta": 0.2, "ref_logprob": -11.0}
    exec(code, names)
    assert names["score"] == pytest.approx(0.2 * (LOGPROB + 11.0))
    (url, first), (_, second) = posted
    assert url.endswith("/generate") and first["input_ids"] == PROMPT
    assert first["sampling_params"] == {
        "max_new_tokens": 40,
        "logit_bias": {str(SCORE_TOKEN): -100.0},
    }
    assert second == score_request([*PROMPT, *ANSWER, EOS], SCORE_TOKEN)
