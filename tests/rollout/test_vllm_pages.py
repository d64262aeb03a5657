"""The page on scoring anywhere: its command starts a server, and its code gets the right scores."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from page_code import code_blocks

import laser_fast.integrations
from laser_fast.rollout import score_request as requests
from laser_fast.rollout.score_request import PROCESSOR

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
PAGE = Path(laser_fast.integrations.__file__).with_name("README.md")
PROMPT = "7a*3b+4c^2="
BETA, REF_LOGPROB = 0.2, -8.0
NAMES = {"beta": BETA, "ref_logprob": REF_LOGPROB, "max_tokens": 40}


def test_the_command_is_that_of_the_server_that_the_tests_start():
    [command] = code_blocks(PAGE, "A server for OpenAI clients", "bash")
    assert shlex.split(command) == ["vllm", "serve", "MODEL", "--logits-processors", PROCESSOR]


def expected_score(served, prompt_ids, completion_ids, position):
    """From the model's own logits; the ids end by the EOS."""
    assert completion_ids[-1] == served.eos[0]
    rows = served.logprobs(prompt_ids, completion_ids)
    logprob = rows[-1 if position == "eos" else -2, served.score_token].item()
    return BETA * (logprob - REF_LOGPROB)


@pytest.mark.parametrize("position", ["eos", "last"])
def test_the_code_for_openai_clients(position, server, served, monkeypatch):
    openai = pytest.importorskip("openai")
    from transformers import AutoTokenizer

    prompt_ids = AutoTokenizer.from_pretrained(served.path)(PROMPT)["input_ids"]
    code = code_blocks(PAGE, "A server for OpenAI clients")[position == "last"]
    assert '"http://localhost:8000/v1"' in code
    code = code.replace("http://localhost:8000", server[0]).replace('"MODEL"', '"tiny"')
    fields = requests.score_request
    monkeypatch.setattr(  # the ids, to compute the score again
        requests, "score_request", lambda *x: fields(*x) | {"return_token_ids": True}
    )
    num_scores = 0
    for _ in range(30):
        names = NAMES | {"question": PROMPT, "score_token_id": served.score_token}
        exec(code, names)
        assert isinstance(names["client"], openai.OpenAI)
        assert ("score" in names) == (names["choice"].finish_reason == "stop")
        if "score" in names:
            ids = names["choice"].token_ids[: -1 if position == "eos" else None]
            expected = expected_score(served, prompt_ids, ids, position)
            assert names["score"] == pytest.approx(expected, abs=1e-5)
            num_scores += 1
        if num_scores == 3:
            return
    pytest.fail(f"{num_scores} of 30 answers ended")


def test_the_code_in_process(served):
    [code] = code_blocks(PAGE, "vLLM in process")
    asked = {"prompts": [PROMPT] * 12, "score_token_id": served.score_token}
    small = {"dtype": "float32", "max_model_len": served.max_model_len, "enforce_eager": True}
    options = {
        "code": code.replace('"MODEL"', repr(str(served.path))),
        "names": NAMES | asked,
        "engine_args": small,
    }
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("vllm_page.py")), json.dumps(options)],
        env=os.environ
        | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{root / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    eos, last = json.loads(done.stdout.strip().splitlines()[-1])
    for _, ids in eos["answers"]:
        assert ids.pop() == served.score_token
    for position, found in (("eos", eos), ("last", last)):
        assert len(found["scores"]) == len(found["answers"]) > 1
        for score, answer in zip(found["scores"], found["answers"], strict=True):
            assert score == pytest.approx(expected_score(served, *answer, position), abs=1e-5)
