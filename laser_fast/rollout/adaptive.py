"""Votes that sample until the posterior of the winner suffices (algorithm.vote).

    client = openai.AsyncOpenAI(base_url="http://localhost:8000/v1", api_key="unused")
    score = SelfScore(token_id=151652, beta=0.1, ref_logprob=-23.0)
    sample = chat_sampler(client, score, extract, model="m", messages=messages, max_tokens=4097)
    vote = await adaptive_vote_async(sample, threshold=0.95, max_samples=16, calibrated=calibrated)

The server is `vllm serve`, with the score's processor if the score is read at the EOS. What a
threshold costs in samples is in the report of `laser-fast eval`; token, position, beta, c_ref and
the fields of `calibrated`, which `laser-fast rescore --store` measures, are in the model's
laser_fast.json.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Generic, NamedTuple, TypeVar

from laser_fast.algorithm.score import SelfScore
from laser_fast.algorithm.vote import UNCALIBRATED, Calibrated, PosteriorVote
from laser_fast.records import ScorePosition
from laser_fast.rollout.score_request import score_request

Answer = TypeVar("Answer")
# An answer, hashable, and its score r_s, not clipped; None where there is none.
Sample = tuple[Answer | None, float | None]


class Vote(NamedTuple, Generic[Answer]):
    """The winner, None without any answer; the posterior that it is right; samples counted."""

    answer: Answer | None
    confidence: float
    num_samples: int


def adaptive_vote(
    sample: Callable[[], Sample[Answer]],
    *,
    threshold: float,
    max_samples: int,
    calibrated: Calibrated = UNCALIBRATED,
    equal: Callable[[Answer, Answer], bool] | None = None,
) -> Vote[Answer]:
    """Call `sample` until the winner's posterior is `threshold` or more, `max_samples` at most.

    `calibrated` says how a score is read, `equal` which answers are one beyond `==`.
    """
    _check(threshold, max_samples, 1)
    vote, count = PosteriorVote(calibrated, equal=equal), 0
    while count < max_samples and vote.confidence < threshold:
        vote.add(*sample())
        count += 1
    return Vote(vote.winner, vote.confidence, count)


async def adaptive_vote_async(
    sample: Callable[[], Awaitable[Sample[Answer]]],
    *,
    threshold: float,
    max_samples: int,
    in_flight: int = 4,
    calibrated: Calibrated = UNCALIBRATED,
    equal: Callable[[Answer, Answer], bool] | None = None,
) -> Vote[Answer]:
    """`adaptive_vote` with up to `in_flight` samples being drawn at once; cancels what is left.

    Samples count as they arrive, short ones first: where length tells right from wrong, the early
    ones are no fair draw, and fewer in flight come nearer to one. An error of a sample is raised.
    """
    _check(threshold, max_samples, in_flight)
    vote, count = PosteriorVote(calibrated, equal=equal), 0
    tasks: set[asyncio.Future[Sample[Answer]]] = set()
    try:
        while count < max_samples and vote.confidence < threshold:
            while len(tasks) < min(in_flight, max_samples - count):
                tasks.add(asyncio.ensure_future(sample()))
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for arrived in done:
                vote.add(*arrived.result())
            tasks -= done
            count += len(done)
    finally:
        for task in tasks:  # where one has failed also others that are done, and may have failed
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return Vote(vote.winner, vote.confidence, count)


def chat_sampler(
    client: Any,
    score: SelfScore,
    extract: Callable[[str], Answer | None],
    *,
    position: ScorePosition = "eos",
    **request: Any,
) -> Callable[[], Awaitable[Sample[Answer]]]:
    """A function that samples one chat from a server that scores; truncated ones say nothing.

    Args:
        client: an `openai.AsyncOpenAI`, of the caller's own installation.
        score: score token, beta and c_ref of the served model.
        extract: finds the answer in the text of a completion.
        position: of the model's score, in its laser_fast.json.
        request: `model`, `messages`, `max_tokens`, one more than the answer may have if the score
            is read at the EOS, and other fields of `client.chat.completions.create`; no `seed`,
            with which all samples are one, and no `stop`, behind which there is no score.
    """
    given, own = request.pop("extra_body", {}), score_request(score.token_id, position)
    if taken := sorted({*given, *request} & {*own, "seed", "stop"}):
        raise ValueError(f"chat_sampler: a vote asks without {', '.join(taken)} of yours")

    async def sample() -> Sample[Answer]:
        create = client.chat.completions.create
        (choice,) = (await create(**request, logprobs=True, extra_body=given | own)).choices
        if choice.finish_reason != "stop":
            return None, None
        last = choice.logprobs.content[-1]
        found = last if position == "eos" else last.top_logprobs[-1]
        return extract(choice.message.content or ""), score.of(found.logprob)

    return sample


def _check(threshold: float, max_samples: int, in_flight: int) -> None:
    if not 0 < threshold <= 1 or min(max_samples, in_flight) < 1:
        raise ValueError(
            "adaptive_vote: expected a posterior 0 < threshold <= 1, max_samples and in_flight "
            f">= 1, got {threshold}, {max_samples} and {in_flight}"
        )
