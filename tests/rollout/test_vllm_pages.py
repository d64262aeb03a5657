"""The page on scoring anywhere: its command starts a server, and its code gets the right scores."""

import functools
import shlex
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


def test_the_code_in_process(served, monkeypatch):
    import vllm

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # In a process of its own: another test's engine may hold this one's process group.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    small = {"dtype": "float32", "max_model_len": served.max_model_len, "enforce_eager": True}
    monkeypatch.setattr(vllm, "LLM", functools.partial(vllm.LLM, **small))
    [code] = code_blocks(PAGE, "vLLM in process")
    names = NAMES | {"prompts": [PROMPT] * 12, "score_token_id": served.score_token}
    outputs = []
    generate = vllm.LLM.func.generate
    monkeypatch.setattr(
        vllm.LLM.func, "generate", lambda *x: outputs.extend(generate(*x)) or outputs
    )
    exec(code.replace('"MODEL"', repr(str(served.path))), names)
    finished = [o for o in outputs if o.outputs[0].finish_reason == "stop"]
    assert len(names["scores"]) == len(finished) > 2
    for score, output in zip(names["scores"], finished, strict=True):
        *ids, last = output.outputs[0].token_ids
        assert last == served.score_token
        expected = expected_score(served, output.prompt_token_ids, ids, "eos")
        assert score == pytest.approx(expected, abs=1e-5)

    # What the text below the code says of the position "last", on an engine without need of it.
    params = vllm.SamplingParams(
        max_tokens=40, logprob_token_ids=[served.score_token], logit_bias={served.score_token: -100}
    )
    num_scores = 0
    for output in generate(names["llm"], [PROMPT] * 12, params):
        completion = output.outputs[0]
        if completion.finish_reason == "stop":
            logprob = completion.logprobs[-1][served.score_token].logprob
            expected = expected_score(served, output.prompt_token_ids, completion.token_ids, "last")
            assert BETA * (logprob - REF_LOGPROB) == pytest.approx(expected, abs=1e-5)
            num_scores += 1
    assert num_scores > 1
