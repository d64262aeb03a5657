"""A deployed model scores its answers for any OpenAI client: real `vllm serve`, real `openai`."""

import asyncio
import time
import urllib.request

import pytest

from laser_fast.algorithm.score import SelfScore
from laser_fast.algorithm.vote import Calibrated
from laser_fast.rollout.adaptive import adaptive_vote, adaptive_vote_async, chat_sampler
from laser_fast.rollout.score_request import score_request

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
PROMPT = "7a*3b+4c^2="


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="unused", max_retries=0)


def encode(served, text):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(served.path)(text)["input_ids"]


def test_every_chat_completion_brings_its_own_score(client, served):
    prompt_ids = encode(served, PROMPT)
    num_scores = 0
    for seed in range(8):
        answer = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=40,
            seed=seed,
            logprobs=True,
            extra_body=score_request(served.score_token) | {"return_token_ids": True},
        )
        (choice,) = answer.choices
        assert "reserved" not in choice.message.content  # the score is no part of the answer
        if choice.finish_reason != "stop":
            continue
        *ids, last = choice.token_ids
        assert (ids[-1], last) == (served.eos[0], served.score_token)
        expected = served.logprobs(prompt_ids, ids)[-1, served.score_token].item()
        assert choice.logprobs.content[-1].logprob == pytest.approx(expected, abs=2e-5)
        num_scores += 1
    assert num_scores > 1


def test_plain_completions_too(client, served):
    prompt_ids = encode(served, PROMPT)
    answer = client.completions.create(
        model="tiny",
        prompt=PROMPT,
        n=8,
        max_tokens=40,
        seed=0,
        logprobs=0,
        extra_body=score_request(served.score_token) | {"return_token_ids": True},
    )
    finished = [choice for choice in answer.choices if choice.finish_reason == "stop"]
    assert finished
    for choice in finished:
        expected = served.logprobs(prompt_ids, choice.token_ids[:-1])[-1, served.score_token]
        assert choice.logprobs.token_logprobs[-1] == pytest.approx(expected.item(), abs=2e-5)


def test_a_score_of_the_last_row_comes_beside_the_eos(client, served):
    # Nothing here reaches the processor: any server answers so.
    prompt_ids = encode(served, PROMPT)
    fields = score_request(served.score_token, "last") | {"return_token_ids": True}
    options = {"model": "tiny", "n": 8, "max_tokens": 40, "seed": 0, "extra_body": fields}
    plain = client.completions.create(prompt=PROMPT, logprobs=0, **options)
    message = {"role": "user", "content": PROMPT}
    chat = client.chat.completions.create(messages=[message], logprobs=True, **options)
    name = f"token_id:{served.score_token}"
    found = [(c, c.logprobs.top_logprobs[-1][name]) for c in plain.choices]
    found += [(c, c.logprobs.content[-1].top_logprobs[-1].logprob) for c in chat.choices]
    assert {c.logprobs.content[-1].top_logprobs[-1].token for c in chat.choices} == {name}
    num_scores = 0
    for choice, score in found:
        assert served.score_token not in choice.token_ids
        if choice.finish_reason == "stop":
            assert choice.token_ids[-1] == served.eos[0]
            expected = served.logprobs(prompt_ids, choice.token_ids)[-2, served.score_token]
            assert score == pytest.approx(expected.item(), abs=2e-5)
            num_scores += 1
    assert num_scores > 2


def test_requests_that_do_not_ask_are_served_as_ever(client, served):
    options = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "temperature": 0.0}
    plain = {"repetition_penalty": 1.0, "return_token_ids": True}
    answer = client.completions.create(**options, extra_body=plain)
    ids = list(encode(served, PROMPT))
    import torch

    for _ in answer.choices[0].token_ids:
        ids.append(int(served.model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert answer.choices[0].token_ids == ids[-len(answer.choices[0].token_ids) :]
    # They stop at the EOS and may even say the score token.
    for wanted, reason in ((served.eos[0], "stop"), (served.score_token, "length")):
        answer = client.completions.create(
            **options, extra_body=plain | {"logit_bias": {str(wanted): 100}}
        )
        assert set(answer.choices[0].token_ids) == {wanted}
        assert answer.choices[0].finish_reason == reason


def test_a_request_that_would_get_no_score_is_told_what_to_change(client, served):
    import openai

    fields = score_request(served.score_token)
    del fields["ignore_eos"]
    with pytest.raises(openai.BadRequestError, match="ignore_eos = true and stop_token_ids"):
        client.completions.create(model="tiny", prompt=PROMPT, logprobs=0, extra_body=fields)


def test_an_adaptive_vote_stops_and_leaves_the_server_idle(server, served):
    """Requests in flight are cancelled for real: soon nothing runs, though each may take long."""
    openai = pytest.importorskip("openai")
    score = SelfScore(token_id=served.score_token, beta=0.2, ref_logprob=-8.0)
    options = {"threshold": 0.9, "max_samples": 24, "calibrated": Calibrated(num_wrong=9.0)}
    drawn = []

    async def vote():
        async with openai.AsyncOpenAI(base_url=f"{server[0]}/v1", api_key="unused") as client:
            one = chat_sampler(
                client,
                score,
                lambda text: text[:1] or None,
                model="tiny",
                messages=[{"role": "user", "content": PROMPT}],
                max_tokens=100,
            )

            async def sample():
                drawn.append(await one())
                return drawn[-1]

            return await adaptive_vote_async(sample, in_flight=6, **options)

    found = asyncio.run(vote())
    deadline = time.monotonic() + 20
    while (running := num_running(server[0])) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running == 0
    # The samples that came back, one by one, are the same vote, or it stopped between two of them.
    assert found.num_samples == len(drawn) <= 24 and found.answer is not None
    read = iter(drawn)
    one_by_one = adaptive_vote(lambda: next(read), **options | {"max_samples": len(drawn)})
    assert one_by_one.num_samples <= found.num_samples
    if one_by_one.num_samples == found.num_samples:
        assert one_by_one == found
    scores = [value for _, value in drawn if value is not None]
    assert scores and all(-2 < value < 2 for value in scores)


def num_running(url):
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    counts = [float(line.split()[-1]) for line in lines if line.split("{")[0] in names]
    assert counts
    return sum(counts)
