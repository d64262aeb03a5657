"""What a vLLM request says to get its own score, and how the answer is read. No vLLM here.

A scored request goes past its EOS by exactly one token, the score token z_c, which the logits
processor of laser_fast/rollout/score_processor.py forces there:

    prompt | y_1 ... y_n EOS z_c        raw log-prob of the last token = log pi(z_c | x, y)

`ignore_eos` keeps vLLM from stopping at the EOS, `stop_token_ids = [z_c]` makes it stop after
the score. The fields below travel in `SamplingParams.extra_args`, which an OpenAI client reaches
as `vllm_xargs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from laser_fast.records import Completion

SCORE_TOKEN_ID = "laser_score_token_id"
"""int: the score token, never sampled and forced after an EOS; without it nothing happens."""
EOS_TOKEN_IDS = "laser_eos_token_ids"
"""list[int]: what ends a completion; the served model's own by default, empty: force nothing."""
VOCAB_SIZE = "laser_vocab_size"
"""int: ids from here on are padding of the head and never sampled; by default none are."""
TEMPERING = "laser_tempering"
"""`Tempering`, in process only: collects what turns log-probs of temperature 1 into tempered."""


def score_request(score_token_id: int) -> dict[str, Any]:
    """Fields that make any OpenAI request to a scoring server return its own score.

    Pass them as `extra_body`, and ask for log-probs (`logprobs=True` in chat, `logprobs=0` in
    completions). If the finish reason is "stop", the last log-prob is log pi(z_c | x, y); allow
    one more token than the answer may have.

    Example:
        >>> score_request(151652)["stop_token_ids"]
        [151652]
    """
    return {
        "ignore_eos": True,
        "stop_token_ids": [score_token_id],
        "vllm_xargs": {SCORE_TOKEN_ID: score_token_id},
    }


def read_completion(
    ids: Sequence[int],
    logprobs: Sequence[float],
    *,
    eos_token_ids: Sequence[int],
    max_new_tokens: int,
    score_token_id: int | None,
) -> Completion:
    """The completion among the ids that vLLM returned; with a score token, its score too.

    Ends and lengths are found by position: the first EOS within `max_new_tokens` finishes, and
    with `score_token_id` the id after it must be the score token.

    Raises:
        ValueError: the server did not force the score token, or ended before any EOS.
    """
    drawn = ids[:max_new_tokens]
    end = next((t for t, token_id in enumerate(drawn) if token_id in eos_token_ids), None)
    if end is None and len(drawn) < max_new_tokens:
        raise ValueError(
            f"expected an EOS or {max_new_tokens} tokens, got {len(drawn)} tokens without one; "
            "was the request aborted, or the server paused?"
        )
    length = len(drawn) if end is None else end + 1
    score_logprob = None
    if end is not None and score_token_id is not None:
        if list(ids[length:]) != [score_token_id]:
            raise ValueError(
                f"expected the score token {score_token_id} alone after the EOS, got "
                f"{list(ids[length : length + 4])}; is the logits processor "
                "laser_fast.rollout.score_processor:SelfScoreProcessor loaded?"
            )
        score_logprob = float(logprobs[length])
    return Completion(
        completion_ids=tuple(drawn[:length]),
        rollout_logprobs=tuple(logprobs[:length]),
        finish_reason="length" if end is None else "stop",
        score_logprob=score_logprob,
    )
