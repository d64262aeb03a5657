"""The grading workers of an evaluation, answers by reward kind, and gold answers in doubt."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from laser_fast.algorithm.score import is_correct
from laser_fast.config import RewardConfig
from laser_fast.records import Prompt
from laser_fast.rewards import Grader
from laser_fast.rewards.boxed import extract_boxed
from laser_fast.rewards.gsm8k import last_number

# Readable by every grader and nobody's answer.
_NOBODY = "-7919.25"


class Graders(ExitStack):
    """One `Grader` per reward configuration, started when it is first asked for.

    `votes` has the deadline and the number of workers of the comparisons of answers.
    """

    def __init__(self, votes: RewardConfig) -> None:
        super().__init__()
        self._votes = votes.model_copy(update={"kind": "math", "format_gate": False})
        self._open: dict[RewardConfig, Grader] = {}

    def of(self, config: RewardConfig) -> Grader:
        """The grader of a configuration."""
        if config not in self._open:
            self._open[config] = self.enter_context(Grader(config))
        return self._open[config]

    def same_answer(self, first: str, second: str) -> bool:
        """Whether two answers are one value by math-verify; as text, 1/2 and 0.5 are two."""
        return self.of(self._votes).same_answer(first, second)


def answer_of(kind: str) -> Callable[[str], str | None]:
    r"""The function from a completion to the answer that votes, as the reward `kind` reads it.

    Most kinds vote with the content of the last \boxed{}, "gsm8k" with the number as an exact
    fraction, "exact" with the whole text where there is no box.
    """

    def answer(text: str) -> str | None:
        boxed = extract_boxed(text)
        if kind == "gsm8k":
            number = last_number(text.rpartition("####")[2] if boxed is None else boxed)
            return None if number is None else str(number)
        if kind == "exact" and boxed is None:
            boxed = text.strip()
        return boxed or None

    return answer


def check_golds(prompts: Sequence[Prompt], *, kind: str, grader: Grader) -> dict[str, list[str]]:
    r"""Grade every gold, in a \boxed{}, against itself, and a wrong answer against every gold.

    Returns the ids of "golds_rejected", not even equal to themselves, so that no answer can be
    right; and of "golds_unreadable", which match only the very same text, so that any other right
    answer fails to be graded and is dropped.
    """
    golds, extract = [prompt.answer for prompt in prompts], answer_of(kind)
    own = grader.grade([rf"\boxed{{{extract(gold) or gold.strip()}}}" for gold in golds], golds)
    wrong = grader.grade([rf"\boxed{{{_NOBODY}}}"] * len(golds), golds)
    found = list(zip(prompts, own, wrong, strict=True))
    return {
        "golds_rejected": [p.prompt_id for p, reward, _ in found if not is_correct(reward or 0.0)],
        "golds_unreadable": [p.prompt_id for p, _, reward in found if reward is None],
    }
