"""Score an answer on an SGLang server: one more request to `/generate`, which draws nothing.

SGLang returns log pi(z_c | ...) of the row behind the last given id, for `token_ids_logprob` and
`max_new_tokens = 0`, as its own `/v1/score` asks (read in the wheel of 0.5.23: io_struct,
logprob_processor and tokenizer_manager_score_mixin; no server has run here). Prompt and answer are
in its prefix cache by then, so that a score costs one prefilled token. `/v1/score` itself returns
probabilities, and the OpenAI endpoints have no field for a named token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def score_request(sequence_ids: Sequence[int], score_token_id: int) -> dict[str, Any]:
    """The JSON of a POST to `/generate` that asks for log pi(z_c | sequence_ids).

    `sequence_ids` are the prompt and the answer: with its EOS for a score of the position "eos",
    without it for "last".

    Example:
        >>> score_request([5, 6, 2], 7)["token_ids_logprob"]
        [7]
    """
    return {
        "input_ids": list(sequence_ids),
        # Stated, because a batch with requests that do sample tempers and penalizes every row.
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0, "repetition_penalty": 1.0},
        "return_logprob": True,
        "token_ids_logprob": [score_token_id],
    }


def score_logprob(answer: Mapping[str, Any], score_token_id: int) -> float:
    """Log pi(z_c | ...) in the answer to a `score_request`; a score is beta (it - c_ref).

    Raises:
        ValueError: the answer holds no such log-prob.
    """
    rows = answer.get("meta_info", {}).get("output_token_ids_logprobs") or [[]]
    found = {token_id: logprob for logprob, token_id, _ in rows[0] or []}
    if score_token_id not in found:
        raise ValueError(
            f"expected meta_info.output_token_ids_logprobs with token {score_token_id}, got "
            f"{sorted(answer.get('meta_info', answer))}; is it the answer to a score_request?"
        )
    return float(found[score_token_id])
