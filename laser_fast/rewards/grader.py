"""Grade completions against gold answers: a number, or None where grading itself failed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any

from laser_fast.config_errors import ConfigError, likely
from laser_fast.rewards.boxed import passes_gate
from laser_fast.rewards.pool import Failure, WorkerPool, WorkerStartError
from laser_fast.rewards.user import RewardError

if TYPE_CHECKING:
    from laser_fast.config import RewardConfig
    from laser_fast.records import Group

_BUILT_IN = {
    "math": "laser_fast.rewards.math:reward",
    "gsm8k": "laser_fast.rewards.gsm8k:reward",
    "exact": "laser_fast.rewards.boxed:exact",
    "sandbox": "laser_fast.rewards.boxed:sandbox",
}
_USER = "laser_fast.rewards.user:call"
_CHECK_USER = "laser_fast.rewards.user:check_signature"
_SAME_ANSWER = "laser_fast.rewards.math:same_answer"
# Which every built-in kind can compare with a gold that it can read.
OTHER_ANSWER = r"\boxed{-7919.25}"
# A boxed 10^{10^{10}} must end its worker, not the machine. A user's function may need more.
_MEMORY_LIMIT = 4 << 30

_log = logging.getLogger(__name__)


class Grader(ExitStack):
    """Worker processes that grade by one `RewardConfig`, until it is closed.

    `extras` are the graders of its `extra`: each is a function with workers of its own, so that
    none can cost a grade of this one.

    Args:
        config: all but `max_failed` and what is said of over-long completions is read.
        trains_score: whether rewards become targets of the score, which are from 0 to 1.
        key: what messages call the key of `kind`.

    Raises:
        ConfigError: if `kind` is unknown, does not import in a worker, is no function or asks for
            what no reward gets, or if `format_gate` is asked of a kind that has none.
    """

    def __init__(
        self, config: RewardConfig, *, trains_score: bool = False, key: str = "reward.kind"
    ) -> None:
        super().__init__()
        _check(config, key)
        self._config = config
        self._is_bounded = trains_score or config.range != (0.0, 1.0)
        self._function = _BUILT_IN.get(config.kind, config.kind)
        limit = _MEMORY_LIMIT if config.kind in _BUILT_IN else None
        try:
            self._pool = WorkerPool(self._function, num_workers=config.workers, memory_limit=limit)
        except WorkerStartError as error:
            raise ConfigError(f'{key} = "{config.kind}" cannot be loaded: {error}') from None
        self.callback(self._pool.close)
        self.fields: tuple[str, ...] = ()  # of the data, that the function asks for
        if config.kind not in _BUILT_IN:
            [found] = self._run(_CHECK_USER, [(config.kind,)])
            if not isinstance(found, tuple):
                self.close()
                raise ConfigError(f'{key} = "{config.kind}": {found}')
            self.fields = found
        alone = {"extra": {}, "format_gate": False, "range": (0.0, 1.0)}
        self.weights, self.extras = config.extra, dict[str, Grader]()
        for kind in config.extra:
            own = config.model_copy(update={"kind": kind, **alone})
            self.extras[kind] = self.enter_context(Grader(own, key="reward.extra"))

    def grade(
        self,
        texts: Sequence[str],
        answers: Sequence[str | int | float],
        *,
        prompts: Sequence[str] | None = None,
        fields: Sequence[str] | None = None,
        ids: Sequence[Sequence[int]] | None = None,
    ) -> list[float | None]:
        """Return one reward per completion; None for a grade that failed.

        Built-in kinds grade every answer by itself under the deadline `timeout_s`. An answer that
        misses it, or takes its worker down, is wrong if its gold can be compared with another one.
        A user's function gets all completions in one call under `batch_timeout_s`. If this call
        hangs or crashes, every completion gets a call of its own under `timeout_s`, so that only
        the guilty one is None. Its rewards are mapped from `range` to [0, 1].

        Args:
            texts: completions, without special tokens.
            answers: gold answers, one per completion.
            prompts: for a function that asks for them, and for `format_gate`, which wants
                `<answer>` tags where the prompt asks for them; without prompts it wants exactly
                one box.
            fields: `Prompt.fields`, for a function that asks for them.
            ids: tokens of the completions, likewise.

        Raises:
            RewardError: if a user's function raises, or returns anything but one finite number or
                None per completion, or a number outside of `range` where that matters.
            ValueError: if the lengths differ.
        """
        if len(answers) != len(texts) or (prompts is not None and len(prompts) != len(texts)):
            raise ValueError(
                f"grade: expected as many answers (and prompts) as the {len(texts)} texts, "
                f"got {len(answers)}" + ("" if prompts is None else f" and {len(prompts)}")
            )
        rows: Sequence[int] = range(len(texts))
        if self._config.format_gate:
            rows = [i for i in rows if passes_gate(texts[i], prompts[i] if prompts else "")]
        completions = [(texts[i], str(answers[i])) for i in rows]
        if self._config.kind in _BUILT_IN:
            outcomes = self._run_built_in(completions)
        else:
            outcomes = self._run_users(completions, prompts, fields, ids)
        failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
        for reason, count in Counter(failure.reason for failure in failures).items():
            example = next(failure.summary for failure in failures if failure.reason == reason)
            of = len(outcomes), self._config.kind
            _log.warning('%d of %d grades by "%s" failed: %s', count, *of, example)
        rewards: list[float | None] = [0.0] * len(texts)
        for i, outcome in zip(rows, outcomes, strict=True):
            rewards[i] = None if isinstance(outcome, Failure) else outcome
        return rewards

    def same_answer(self, first: str, second: str) -> bool:
        """Whether two extracted answers are equal, for votes; False if that cannot be found out.

        Math answers are compared by math-verify in a worker, under the deadline; the answers of
        other kinds as text.
        """
        if first.strip() == second.strip():
            return True
        if self._config.kind != "math":
            return False
        [outcome] = self._run(_SAME_ANSWER, [(first, second)])
        return outcome is True

    def _run_built_in(self, pairs: Sequence[tuple[str, str]]) -> list[Any]:
        """A reward or a `Failure` for each completion with its gold."""
        outcomes = dict(enumerate(self._run(self._function, pairs)))
        failed = [i for i, outcome in outcomes.items() if isinstance(outcome, Failure)]
        # A worker that was stopped or killed from outside says nothing of its answer.
        outcomes |= zip(failed, self._run(self._function, [pairs[i] for i in failed]), strict=True)
        failed = [i for i in failed if isinstance(outcomes[i], Failure)]
        others = self._run(self._function, [(OTHER_ANSWER, pairs[i][1]) for i in failed])
        blamed = [i for i, other in zip(failed, others, strict=True) if type(other) is float]
        outcomes |= dict.fromkeys(blamed, 0.0)
        if blamed:
            _log.warning(
                "%d of %d answers graded 0: no grader can read them", len(blamed), len(pairs)
            )
        return list(outcomes.values())

    def _run_users(
        self, pairs: Sequence[tuple[str, str]], *told: Sequence[Any] | None
    ) -> list[Any]:
        """The mapped reward or a `Failure` for each completion with its gold and what is told."""
        if not pairs:
            return []
        kind, config = self._config.kind, self._config
        [outcome] = outcomes = self._pool.run(
            _USER, [(kind, pairs, *told)], deadline_s=config.batch_timeout_s
        )
        if isinstance(outcome, Failure) and outcome.reason != "error" and len(pairs) > 1:
            _log.warning(
                'reward function "%s": a call with %d completions failed: %s; calling it with one '
                "at a time (if it is only slow, raise reward.batch_timeout_s = %g)",
                *(kind, len(pairs), outcome.summary, config.batch_timeout_s),
            )
            at = [slice(i, i + 1) for i in range(len(pairs))]
            singly = [(kind, pairs[i], *(each and each[i] for each in told)) for i in at]
            outcomes = self._run(_USER, singly)
        for error in outcomes:
            if isinstance(error, Failure) and error.reason == "error":
                name, _, fault = error.summary.partition(": ")
                if name != RewardError.__name__:
                    fault = f'reward function "{kind}" raised {error.summary}\n{error.traceback}'
                raise RewardError(fault)
        rewards = [
            item for each in outcomes for item in (each if isinstance(each, list) else [each])
        ]
        return [self._mapped(reward) if type(reward) is float else reward for reward in rewards]

    def _mapped(self, reward: float) -> float:
        low, high = self._config.range
        if self._is_bounded and not low <= reward <= high:
            raise RewardError(
                f'reward function "{self._config.kind}": got {reward:.12g}, but the score learns '
                f"rewards from {low:g} to {high:g}; set reward.range = [lowest, highest], which is "
                "mapped to [0, 1], or score.loss_coef = 0"
            )
        return (reward - low) / (high - low)

    def _run(self, function: str, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        return self._pool.run(function, calls, deadline_s=self._config.timeout_s)


def grade_groups(
    grader: Grader,
    groups: Sequence[Group],
    decode: Callable[[Sequence[int]], str],
    *,
    with_extras: bool = False,
) -> list[Group]:
    """The groups with a reward for every completion, None where grading failed.

    `with_extras`, also with those of `reward.extra`, one after the other; None adds nothing.
    """
    members = [(group.prompt, c) for group in groups for c in group.completions]
    texts = [decode(completion.completion_ids) for _, completion in members]
    answers = [prompt.answer for prompt, _ in members]
    told: dict[str, Any] = {"prompts": [p.text for p, _ in members]}
    told["fields"] = [p.fields for p, _ in members]
    told["ids"] = [c.completion_ids for _, c in members]
    rewards = grader.grade(texts, answers, **told)
    extras: list[dict[str, float | None]] = [{} for _ in members]
    for name, extra in grader.extras.items() if with_extras else ():
        for said, value in zip(extras, extra.grade(texts, answers, **told), strict=True):
            said[name] = value
    totals = [
        None if r is None else r + sum(grader.weights[n] * (v or 0.0) for n, v in said.items())
        for r, said in zip(rewards, extras, strict=True)
    ]
    rows = iter(zip(rewards, totals, extras, strict=True))
    own = (zip(*islice(rows, len(group.completions)), strict=True) for group in groups)
    numbered = zip(groups, own, strict=True)
    return [replace(g, rewards=r, totals=t, extras=e) for g, (r, t, e) in numbered]


def grade(
    kind: str, completion_text: str, answer: str | int | float, *, timeout_s: float = 10.0
) -> float | None:
    """Grade one completion in a worker that is kept for the next call of the same kind.

    Args:
        kind: math, gsm8k, exact, sandbox or "module:function".
        completion_text: what the model wrote, without special tokens.
        answer: the gold answer.
        timeout_s: deadline in seconds.

    Returns:
        The reward, or None if grading failed.

    Raises:
        ConfigError: if `kind` names nothing that grades.
        RewardError: if a user's function is broken.
    """
    [reward] = _shared_grader(kind, float(timeout_s)).grade([completion_text], [answer])
    return reward


@cache
def _shared_grader(kind: str, timeout_s: float) -> Grader:
    from laser_fast.config import RewardConfig

    return Grader(RewardConfig(kind=kind, timeout_s=timeout_s, workers=1))


def _check(config: RewardConfig, key: str) -> None:
    """Refuse what no worker needs to find out."""
    kind = config.kind
    module, _, function = kind.partition(":")
    if kind not in _BUILT_IN and not (module and function):
        expected = f'{", ".join(_BUILT_IN)} or "module:function"{likely(kind, _BUILT_IN)}'
        raise ConfigError(f'{key} = "{kind}": expected {expected}')
    if config.format_gate and kind != "math":
        raise ConfigError(
            f'reward.format_gate = true works only with reward.kind = "math", got "{kind}"; '
            "set it to false or check the format in your function"
        )
