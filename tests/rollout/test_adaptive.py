"""Votes that stop: which samples are drawn, which are cancelled, and what a client is asked."""

import asyncio
import gc
from types import SimpleNamespace

import pytest

from laser_fast.algorithm.score import SelfScore
from laser_fast.algorithm.vote import Calibrated
from laser_fast.rollout.adaptive import adaptive_vote, adaptive_vote_async, chat_sampler
from laser_fast.rollout.score_request import score_request

READER = Calibrated(base_rate=0.5, num_wrong=4.0)


def test_sampling_stops_when_the_posterior_suffices():
    samples = iter([("a", 0.6), (None, None), ("b", 0.4), ("a", 0.7), ("a", 0.9)])
    vote = adaptive_vote(lambda: next(samples), threshold=0.9, max_samples=9, calibrated=READER)
    a, b = 4 * 0.6 / 0.4 * 4 * 0.7 / 0.3, 4 * 0.4 / 0.6
    assert (vote.answer, vote.num_samples) == ("a", 4)
    assert vote.confidence == pytest.approx(a / (a + b + 3))
    assert next(samples) == ("a", 0.9)


def test_at_most_as_many_samples_as_allowed():
    vote = adaptive_vote(lambda: (None, None), threshold=0.5, max_samples=3)
    assert vote == (None, 0.0, 3)
    vote = adaptive_vote(lambda: ("a", 0.5), threshold=1.0, max_samples=2)
    assert vote == ("a", pytest.approx(0.5, abs=1e-6), 2)


def test_equivalent_answers_join():
    samples = iter([("0.5", 0.6), ("1/2", 0.6)])
    values = {"0.5": 0.5, "1/2": 0.5}
    vote = adaptive_vote(
        lambda: next(samples),
        threshold=0.9,
        max_samples=2,
        calibrated=READER,
        equal=lambda first, second: values[first] == values[second],
    )
    assert vote == ("0.5", pytest.approx(36 / 40), 2)


@pytest.mark.parametrize("given", [{"threshold": 0}, {"threshold": 95}, {"max_samples": 0}])
def test_bad_arguments_are_named(given):
    with pytest.raises(ValueError, match="0 < threshold <= 1, max_samples and in_flight >= 1"):
        adaptive_vote(lambda: ("a", 0.5), **{"threshold": 0.9, "max_samples": 4, **given})


class Server:
    """Answers in the order of `delays`; counts what was started, running at once and cancelled."""

    def __init__(self, samples, delays):
        self.samples, self.delays = samples, delays
        self.started = self.running = self.most = self.cancelled = 0

    async def sample(self):
        place = self.started
        self.started += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.delays[place])
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return self.samples[place]


def test_requests_fly_together_and_the_rest_is_cancelled():
    server = Server([("a", 0.5), ("a", 0.8), ("b", 0.8), ("a", 0.8)], [30, 0.01, 30, 0.04])

    async def vote():
        found = await adaptive_vote_async(
            server.sample, threshold=0.9, max_samples=16, in_flight=3, calibrated=READER
        )
        assert len(asyncio.all_tasks()) == 1  # nothing is left behind
        return found

    found = asyncio.run(vote())
    # The second and the fourth arrived; the other two and the fifth's place were cut off.
    assert found == ("a", pytest.approx(256 / 260), 2)
    assert (server.started, server.most, server.cancelled) == (4, 3, 2)


def test_no_more_than_the_allowed_samples_are_started():
    server = Server([(None, None)] * 5, [0.0] * 5)
    found = asyncio.run(adaptive_vote_async(server.sample, threshold=0.9, max_samples=5))
    assert found == (None, 0.0, 5) and (server.started, server.most) == (5, 4)


def test_an_error_is_raised_and_the_rest_cancelled():
    server = Server([], [0.0, 30, 30, 30])  # the first sample is not there
    with pytest.raises(IndexError):
        asyncio.run(adaptive_vote_async(server.sample, threshold=0.9, max_samples=8))
    assert (server.started, server.cancelled) == (4, 3)


def test_errors_that_come_together_leave_no_complaint_behind(caplog):
    async def fail():
        raise IndexError

    with pytest.raises(IndexError):
        asyncio.run(adaptive_vote_async(fail, threshold=0.9, max_samples=8))
    gc.collect()  # when asyncio says what nobody has looked at
    assert "never retrieved" not in caplog.text


def test_a_cancelled_vote_cancels_its_requests():
    server = Server([], [30] * 4)

    async def give_up():
        vote = adaptive_vote_async(server.sample, threshold=0.9, max_samples=8)
        await asyncio.wait_for(vote, 0.05)

    with pytest.raises(TimeoutError):
        asyncio.run(give_up())
    assert (server.started, server.cancelled) == (4, 4)


@pytest.mark.parametrize("position", ["eos", "last"])
def test_a_chat_is_asked_for_its_score(position):
    asked = []

    async def create(**request):
        asked.append(request)
        # What vLLM returns: the score token's own log-prob, or the EOS with the score token's.
        other = [SimpleNamespace(logprob=value) for value in (-0.3, -16.0)]
        last = SimpleNamespace(logprob=-16.0 if position == "eos" else -0.3, top_logprobs=other)
        tokens = [SimpleNamespace(logprob=-0.1, top_logprobs=[]), last]
        choice = SimpleNamespace(
            finish_reason={2: "length", 4: "tool_calls"}.get(len(asked), "stop"),
            message=SimpleNamespace(content=None if len(asked) == 3 else "so: 42"),
            logprobs=SimpleNamespace(content=tokens),
        )
        return SimpleNamespace(choices=[choice])

    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    score = SelfScore(token_id=7, beta=0.1, ref_logprob=-23.0)
    extra = {"return_token_ids": True}
    sample = chat_sampler(
        client,
        score,
        lambda text: text[4:] or None,
        position=position,
        model="m",
        max_tokens=9,
        extra_body=extra,
    )
    assert asyncio.run(sample()) == ("42", pytest.approx(0.7))
    assert asyncio.run(sample()) == (None, None)  # a truncated one
    assert asyncio.run(sample()) == (None, pytest.approx(0.7))  # all of it was reasoning
    assert asyncio.run(sample()) == (None, None)  # what it calls is no answer
    expected = {"model": "m", "max_tokens": 9, "logprobs": True}
    assert asked == [expected | {"extra_body": extra | score_request(7, position)}] * 4


@pytest.mark.parametrize("name", ["seed", "stop", "logit_bias", "return_tokens_as_token_ids"])
def test_what_a_vote_asks_for_itself_is_refused_in_either_place(name):
    score = SelfScore(token_id=7, beta=0.1, ref_logprob=-23.0)
    for request in ({name: 1}, {"extra_body": {name: 1}}):
        with pytest.raises(ValueError, match=f"asks without {name} of yours"):
            chat_sampler(None, score, str, position="last", model="m", **request)
