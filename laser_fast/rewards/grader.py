"""Grade completions against gold answers: a number, or None where grading itself failed."""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any

from laser_fast.config_errors import ConfigError
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
_SAME_ANSWER = "laser_fast.rewards.math:same_answer"
# A boxed 10^{10^{10}} must end its worker, not the machine. A user's function may need more.
_MEMORY_LIMIT = 4 << 30

_log = logging.getLogger(__name__)


class Grader(ExitStack):
    """Worker processes that grade by one `RewardConfig`, until it is closed.

    Args:
        config: `kind`, `timeout_s`, `workers` and `format_gate` are read.

    Raises:
        ConfigError: if `kind` is unknown, does not import in a worker or is no function, or if
            `format_gate` is asked of a kind that has none.
    """

    def __init__(self, config: RewardConfig) -> None:
        super().__init__()
        _check(config)
        self._config = config
        self._function = _BUILT_IN.get(config.kind, config.kind)
        limit = _MEMORY_LIMIT if config.kind in _BUILT_IN else None
        try:
            self._pool = WorkerPool(self._function, num_workers=config.workers, memory_limit=limit)
        except WorkerStartError as error:
            raise ConfigError(f'reward.kind = "{config.kind}" cannot be loaded: {error}') from None
        self.callback(self._pool.close)

    def grade(
        self,
        texts: Sequence[str],
        answers: Sequence[str | int | float],
        *,
        prompts: Sequence[str] | None = None,
    ) -> list[float | None]:
        """Return one reward per completion; None for a grade that failed.

        Built-in kinds grade every answer by itself under the deadline `timeout_s`. A user's
        function gets all completions in one call under that same deadline. If this call hangs or
        crashes, every completion gets a call of its own, so that only the guilty one is None.

        Args:
            texts: completions, without special tokens.
            answers: gold answers, one per completion.
            prompts: for `format_gate`, which wants `<answer>` tags where the prompt asks for
                them; without prompts it wants exactly one box.

        Raises:
            RewardError: if a user's function raises, or returns anything but one finite number or
                None per completion.
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
        outcomes = self._outcomes([(texts[i], str(answers[i])) for i in rows])
        failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
        for reason, count in Counter(failure.reason for failure in failures).items():
            example = next(failure.summary for failure in failures if failure.reason == reason)
            _log.warning("%d of %d grades failed: %s", count, len(outcomes), example)
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

    def _outcomes(self, pairs: Sequence[tuple[str, str]]) -> list[Any]:
        """A reward or a `Failure` for each completion with its gold."""
        kind = self._config.kind
        if kind in _BUILT_IN or not pairs:
            return self._run(self._function, pairs)
        [outcome] = outcomes = self._run(_USER, [(kind, pairs)])
        if isinstance(outcome, Failure) and outcome.reason != "error" and len(pairs) > 1:
            _log.warning(
                'reward function "%s": a call with %d completions failed: %s; calling it with one '
                "at a time (if it is only slow, raise reward.timeout_s = %g)",
                *(kind, len(pairs), outcome.summary, self._config.timeout_s),
            )
            outcomes = self._run(_USER, [(kind, [pair]) for pair in pairs])
        for error in outcomes:
            if isinstance(error, Failure) and error.reason == "error":
                name, _, fault = error.summary.partition(": ")
                if name != RewardError.__name__:
                    fault = f'reward function "{kind}" raised {error.summary}\n{error.traceback}'
                raise RewardError(fault)
        return [item for each in outcomes for item in (each if isinstance(each, list) else [each])]

    def _run(self, function: str, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        return self._pool.run(function, calls, deadline_s=self._config.timeout_s)


def grade_groups(
    grader: Grader, groups: Sequence[Group], decode: Callable[[Sequence[int]], str]
) -> list[Group]:
    """The groups with a reward for every completion, None where grading failed."""
    members = [(group.prompt, c) for group in groups for c in group.completions]
    rewards = iter(
        grader.grade(
            [decode(completion.completion_ids) for _, completion in members],
            [prompt.answer for prompt, _ in members],
            prompts=[prompt.text for prompt, _ in members],
        )
    )
    return [replace(g, rewards=tuple(islice(rewards, len(g.completions)))) for g in groups]


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


def _check(config: RewardConfig) -> None:
    """Refuse what no worker needs to find out."""
    kind = config.kind
    if kind == "laser_fast.data.sandbox:reward":  # before 0.2
        raise ConfigError(f'reward.kind = "{kind}" is now a kind: set it to "sandbox"')
    module, _, function = kind.partition(":")
    if kind not in _BUILT_IN and not (module and function):
        nearest = difflib.get_close_matches(kind, _BUILT_IN, n=1, cutoff=0.5)
        hint = f'; did you mean "{nearest[0]}"?' if nearest else ""
        raise ConfigError(
            f'reward.kind = "{kind}": expected {", ".join(_BUILT_IN)} or "module:function"{hint}'
        )
    if config.format_gate and kind != "math":
        raise ConfigError(
            f'reward.format_gate = true works only with reward.kind = "math", got "{kind}"; '
            "set it to false or check the format in your function"
        )
