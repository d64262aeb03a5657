"""What a vLLM request says and collects to get its own score, and how its answer is read.

A scored request goes past its EOS by exactly one token, the score token z_c, which the logits
processor of laser_fast/rollout/score_processor.py forces there:

    prompt | y_1 ... y_n EOS z_c        raw log-prob of the last token = log pi(z_c | x, y)

`ignore_eos` keeps vLLM from stopping at the EOS, `stop_token_ids = [z_c]` makes it stop after
the score. The fields below travel in `SamplingParams.extra_args`, which an OpenAI client reaches
as `vllm_xargs`.

A score of the "last" row is read in the step that draws the EOS and costs no token: vLLM's own
`logprob_token_ids = [z_c]` (since 0.22; both runners and both OpenAI endpoints, read in 0.26 to
0.32) returns log pi(z_c | ...) of every step beside the drawn token's, raw as that one. Of the
processor it needs the bans alone.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from laser_fast.records import Completion, Sampling, ScorePosition, SpecialTokens

PROCESSOR = "laser_fast.rollout.score_processor:SelfScoreProcessor"
"""What vLLM loads by `--logits-processors`, or by `logits_processors` in process."""
SCORE_TOKEN_ID = "laser_score_token_id"
"""int: the score token, never sampled and forced after an EOS; without it nothing happens."""
EOS_TOKEN_IDS = "laser_eos_token_ids"
"""list[int]: what ends a completion; the served model's own by default, empty: force nothing."""
VOCAB_SIZE = "laser_vocab_size"
"""int: ids from here on are padding of the head and never sampled; by default none are."""
TEMPERING = "laser_tempering"
"""`Tempering`, in process only: collects what turns log-probs of temperature 1 into tempered."""


def score_request(score_token_id: int, position: ScorePosition = "eos") -> dict[str, Any]:
    """Fields that make any OpenAI request to a vLLM server return its own score.

    Pass them as `extra_body`, and ask for log-probs (`logprobs=True` in chat, `logprobs=0` in
    completions). `position` is the model's, in its laser_fast.json. If the finish reason is "stop"
    and no stop string of yours was met, log pi(z_c | x, y) is

        "eos"    the last log-prob; the server needs the logits processor, and one more token than
                 the answer may have
        "last"   on a plain server, for no token, beside the EOS:
                 `choice.logprobs.content[-1].top_logprobs[-1].logprob` in chat,
                 `choice.logprobs.top_logprobs[-1][f"token_id:{score_token_id}"]` in completions

    Example:
        >>> score_request(151652)["stop_token_ids"]
        [151652]
        >>> score_request(151652, "last")["logprob_token_ids"]
        [151652]
    """
    if position == "last":
        return {
            "logprob_token_ids": [score_token_id],
            "return_tokens_as_token_ids": True,  # names of tokens need not be unique
            "logit_bias": {str(score_token_id): -100.0},  # never sampled; log-probs are raw
        }
    return {
        "ignore_eos": True,
        "stop_token_ids": [score_token_id],
        "vllm_xargs": {SCORE_TOKEN_ID: score_token_id},
    }


def request_fields(
    tokens: SpecialTokens, sampling: Sampling
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a request for sampled completions says: vLLM's own fields, and the processor's.

    The latter are `extra_args` in process and `vllm_xargs` on a server. Unless the score is read
    after it, an EOS stops the request and nothing is forced, but z_c and the head's padding stay
    banned.
    """
    eos_token_ids, is_last = list(tokens.eos_token_ids), sampling.score_at == "last"
    forcing, stopping = (eos_token_ids, []) if sampling.score_at == "eos" else ([], eos_token_ids)
    fields = {
        **{key: getattr(sampling, key) for key in ("temperature", "top_p", "top_k", "min_p")},
        "max_tokens": sampling.num_steps,
        "ignore_eos": True,
        "stop_token_ids": [tokens.score_token_id, *stopping],
        # With both, vLLM would look for the most probable token, too.
        **({"logprob_token_ids": [tokens.score_token_id]} if is_last else {"logprobs": 0}),
    }
    own = {EOS_TOKEN_IDS: forcing, VOCAB_SIZE: tokens.vocab_size}
    return fields, {SCORE_TOKEN_ID: tokens.score_token_id, **own}


def parse_completion(
    ids: Sequence[int],
    logprobs: Sequence[float],
    score_logprobs: Sequence[float],
    tokens: SpecialTokens,
    sampling: Sampling,
) -> Completion:
    """The completion among sampled ids, and its score if the sampling asks for one.

    Ends and lengths are found by position: the first EOS within `max_new_tokens` finishes, the id
    after it must be the score token if the score is read at the EOS, and later ones are ignored.
    `score_logprobs` are those of the score token in the step that drew each id.
    """
    drawn = ids[: sampling.max_new_tokens]
    end = next((t for t, token_id in enumerate(drawn) if token_id in tokens.eos_token_ids), None)
    if end is None and len(drawn) < sampling.max_new_tokens:
        raise ValueError(
            f"expected an EOS or {sampling.max_new_tokens} tokens, got {len(drawn)} tokens without "
            "one; was the request aborted, or the server paused?"
        )
    length = len(drawn) if end is None else end + 1
    score_logprob = None
    if end is not None and sampling.score_at:
        row = length if sampling.score_at == "eos" else end
        if row == length and list(ids[row : row + 1]) != [tokens.score_token_id]:
            raise ValueError(
                f"expected the score token {tokens.score_token_id} after the EOS, got "
                f"{list(ids[length : length + 4])}; is the logits processor {PROCESSOR} loaded?"
            )
        score_logprob = float(score_logprobs[row])
    return Completion(
        completion_ids=tuple(drawn[:length]),
        rollout_logprobs=tuple(logprobs[:length]),
        finish_reason="length" if end is None else "stop",
        score_logprob=score_logprob,
    )


class Tempering:
    """Log-probs at the sampling temperature, from a vLLM that reports them at temperature 1.

        log_softmax(l / T)[y] = log_softmax(l)[y] / T + c,   c = logsumexp(l) / T - logsumexp(l / T)

    on raw logits l; c depends only on the row. vLLM's own "processed" log-probs are tempered too,
    but after bans and forced tokens, so they are not those of the distribution that is trained. A
    logits processor in the same process sees l and hands over the c of every token.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        # By position: c of all rows that were drawn with it, left on the device, and the own row.
        self.corrections: dict[int, tuple[Tensor, int]] = {}

    def __deepcopy__(self, memo: dict) -> Self:
        return self  # vLLM copies sampling parameters; the collector is shared with the caller

    def apply(self, logprobs: Sequence[float]) -> list[float]:
        """Tempered log-probs of the completion's tokens from those of temperature 1."""
        found = [self.corrections[t] for t in range(len(logprobs))]
        corrections = torch.stack([c[row] for c, row in found]).tolist() if found else []
        return [p / self.temperature + c for p, c in zip(logprobs, corrections, strict=True)]


def collect(logits: Tensor, drawn: dict[int, tuple[Tempering, int]]) -> None:
    """Hand c to the requests that want it: by row of `logits` [B, V], collector and position."""
    by_temperature: dict[float, list[int]] = {}
    for row in sorted(drawn):
        by_temperature.setdefault(drawn[row][0].temperature, []).append(row)
    for temperature, rows in by_temperature.items():
        raw = logits[row_index(rows, logits)]
        corrections = raw.logsumexp(1) / temperature - (raw / temperature).logsumexp(1)
        for place, row in enumerate(rows):
            tempering, position = drawn[row]
            tempering.corrections[position] = corrections, place


def row_index(rows: list[int], logits: Tensor) -> Tensor | slice:
    """Ascending rows as an index; all of them as a slice, which needs no copy to the device."""
    if len(rows) == len(logits):
        return slice(None)
    return torch.tensor(rows, device=logits.device)
