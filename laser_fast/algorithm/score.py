"""The last-token self-score and its class balance (LaSeR, arXiv 2510.14943).

    r_s = beta (log pi(z_c | x, y) - c_ref)                                  (eq. 11)
    L   = 1 / (N_c + N_i) * sum_finished w (r_s - r_v)^2                     (eq. 14)
    w_c = (N_c + N_i) / (2 N_c),   w_i = (N_c + N_i) / (2 N_i)

z_c is one reserved token, read at the EOS position of a finished completion; r_v is the verifier's
reward. A correct answer's target log-prob is c_ref + 1/beta: far below 0, so that the token stays
improbable and generation is not disturbed.

z_c may also be read one row earlier, where the EOS is predicted: then it costs no token at all.

c_ref is a constant, or floats (not in the paper): every step moves it by a share of

    d   = 1 / (N_c + N_i) * sum_finished w (log pi(z_c | x, y) - c_ref - r_v / beta),

which is 0 where L pulls no longer on all scores together, but only tells right from wrong. With a
constant they first rise together by half of 1/beta, for 10 to 20 steps of the sandbox.
"""

import math
import warnings
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

# beta log Z, the bias of leaving out the partition function, stays under about 0.05 * beta while
# the target is at most -3, and the closed form of eq. 8 stops making sense when it nears 0.
MAX_TARGET = -1.0
WARN_TARGET = -3.0
# Share of d by which the floating reference moves, an average over about five steps.
FLOAT_RATE = 0.2
DRIFT = 0.1

Logprobs = TypeVar("Logprobs", float, Tensor)


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfScore:
    """The score token z_c of a model, and how its log-probs become scores (eq. 11).

    `ref_logprob` is c_ref; it is nan where nobody reads a score, which is then undefined.
    """

    token_id: int
    beta: float
    ref_logprob: float

    def of(self, logprobs: Logprobs) -> Logprobs:
        """Scores r_s of log-probs of the score token, of any shape."""
        return self_reward_score(logprobs, beta=self.beta, ref_logprob=self.ref_logprob)


def self_reward_score(logprobs: Logprobs, *, beta: float, ref_logprob: float) -> Logprobs:
    """Score of log-probs of the reserved token, any shape: beta (logprobs - ref_logprob), eq. 11.

    0 is the untrained model, 1 the target of a correct answer; its users clamp it to [0, 1].
    """
    return beta * (logprobs - ref_logprob)


def is_correct(rewards: Tensor | float) -> Tensor:
    """Which rewards count as correct for the class balance and the verification metrics."""
    return torch.as_tensor(rewards) > 0.5


def class_weights(
    rewards: Tensor,  # [P, G]
    is_finished: Tensor,  # [P, G] bool
    *,
    max_weight: float = float("inf"),
) -> Tensor:
    """Weights that give both classes the same total in the MSE (eq. 14).

    w_c and w_i, clipped at `max_weight`, count the finished completions of the whole step;
    unfinished ones get 0. [P, G] float32.
    """
    check_tables("class_weights", rewards=rewards, is_finished=is_finished)
    correct, num_finished = is_correct(rewards), is_finished.sum()
    num_correct = (correct & is_finished).sum()
    num_same_class = torch.where(correct, num_correct, num_finished - num_correct)
    weights = num_finished.float() / (2 * num_same_class).clamp(min=1)
    return torch.where(is_finished, weights.clamp(max=max_weight), 0.0)


def refit_reference(
    score: SelfScore,
    logprobs: Tensor,  # [P, G]
    rewards: Tensor,  # [P, G]
    weights: Tensor,  # [P, G]
) -> SelfScore:
    """The score with its floating c_ref moved towards that of a step's completions.

    `weights` are those of the MSE, clips and denominator included, and 0 without a target: with
    others, as balanced ones where a clip acts, c_ref and all log-probs drift away together. A
    log-prob that is no finite number moves nothing. The target of a correct answer stays at or
    below `WARN_TARGET`.
    """
    residual = logprobs - score.ref_logprob - rewards / score.beta
    moved = score.ref_logprob + FLOAT_RATE * float((weights * residual).sum())
    if not math.isfinite(moved):
        return score
    return replace(score, ref_logprob=min(moved, WARN_TARGET - 1 / score.beta))


def score_loss(
    logprobs: Tensor,  # [N]
    rewards: Tensor,  # [N]
    weights: Tensor,  # [N]
    *,
    beta: float,
    ref_logprob: float,
) -> Tensor:
    """Terms w (r_s - r_v)^2 of the MSE, [N]; `weights` hold class weight and denominator."""
    # Not clamped: a clamp would kill the gradient outside [0, 1].
    scores = self_reward_score(logprobs, beta=beta, ref_logprob=ref_logprob)
    return weights * (scores - rewards) ** 2


def check_score_target(*, beta: float, ref_logprob: float) -> None:
    """Refuse a beta whose target log-prob for a correct answer is no longer improbable.

    Raises:
        ValueError: ref_logprob + 1/beta > -1 (between -3 and -1 it warns), beta not positive, or
            ref_logprob not finite, as for a token whose logit is masked.
    """
    if not beta > 0 or not math.isfinite(ref_logprob):
        raise ValueError(
            f"expected beta > 0 and a finite ref_logprob, got beta = {beta:g} and ref_logprob = "
            f"{ref_logprob:g}; choose a token that the untrained model samples, though rarely"
        )
    target = ref_logprob + 1 / beta
    remedy = "choose a token that the untrained model finds less probable"
    if ref_logprob < WARN_TARGET:
        # Rounded up, so that following the advice ends the complaint.
        smallest = math.ceil(1e3 / (WARN_TARGET - ref_logprob)) / 1e3
        remedy = f"choose beta >= {smallest:g}"
    message = (
        f"the target log-prob of a correct answer, ref_logprob + 1/beta = {ref_logprob:g} + "
        f"1/{beta:g} = {target:.3g}, must stay well below 0; {remedy}"
    )
    if target > MAX_TARGET:
        raise ValueError(message)
    if target > WARN_TARGET:
        warnings.warn(message, stacklevel=2)


def check_reference(score: SelfScore, logprobs: Tensor, is_finished: Tensor) -> None:
    """Warn of a given c_ref that is not the untrained model's, whose `logprobs` [P, G] these are.

    Scores then start away from 0; DRIFT of the way to 1 is ten standard errors of 256 completions.
    """
    measured = float(logprobs[is_finished].mean())  # nan without any, which says nothing
    start = score.of(measured)
    if abs(start) > DRIFT:
        warnings.warn(
            f"score.ref_logprob = {score.ref_logprob:g}, but this model's mean log-prob of the "
            f"score token is {measured:.2f}, so that scores start at {start:.2f} instead of 0; set "
            f'score.ref_logprob = {measured:.2f}, or "auto"',
            stacklevel=2,
        )


def check_tables(name: str, **tables: Tensor) -> None:
    """Refuse tables that are not all of one shape [P, G]."""
    shapes = [tuple(table.shape) for table in tables.values()]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2:
        expected, found = ", ".join(tables), ", ".join(map(str, shapes))
        raise ValueError(f"{name}: expected {expected} of one shape [P, G], got {found}")
