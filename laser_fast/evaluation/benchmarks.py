r"""Benchmarks by name: where their problems are, how they are worded and graded, how often sampled.

The paper's protocol (arXiv 2510.14943): T = 1, top_p = 1, at most 8192 new tokens; 2 samples a
problem on MATH500 and OlympiadBench, 32 on AMC23, AIME24 and AIME25; accuracy is the mean over all
samples, and the headline number the mean over the five sets.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from laser_fast.algorithm.score import is_correct
from laser_fast.config import ConfigError, RewardConfig
from laser_fast.config_errors import likely
from laser_fast.records import Prompt
from laser_fast.rewards import Grader
from laser_fast.rewards.boxed import extract_boxed
from laser_fast.rewards.grader import OTHER_ANSWER
from laser_fast.rewards.gsm8k import final_number

# The released evaluation appends this to a base model's prompt, after a line break.
PROMPT_SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One set of problems; most fields are named like the configuration's keys.

    `source` is a local file or a hub data set. Empty fields and `kind`, of the reward, leave the
    choice to the configuration, which may also change the wording and the lengths.
    """

    name: str
    source: str
    prompt_field: str = ""
    answer_field: str = ""
    kind: str = ""
    samples: int = 8
    eval_split: str = "test"
    template: str = "chat"
    prompt_suffix: str = PROMPT_SUFFIX
    max_prompt_tokens: int = 2048
    max_new_tokens: int = 8192


_NAMED = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("math500", "HuggingFaceH4/MATH-500", "problem", "answer", "math", 2),
        Benchmark("amc23", "math-ai/amc23", "question", "answer", "math", 32),
        Benchmark("aime24", "HuggingFaceH4/aime_2024", "problem", "answer", "math", 32, "train"),
        Benchmark("aime25", "math-ai/aime25", "problem", "answer", "math", 32),
        Benchmark("olympiadbench", "math-ai/olympiadbench", "question", "final_answer", "math", 2),
        Benchmark("gsm8k", "openai/gsm8k:main", "question", "answer", "gsm8k"),
        # The command line makes their files.
        *(Benchmark(name, "", "problem", "answer", "sandbox", template="{prompt}",
                    prompt_suffix="", max_prompt_tokens=24, max_new_tokens=48)
          for name in ("sandbox", "sandbox-hard")),
    )
}  # fmt: skip
NAMES = tuple(_NAMED)
# What the files of the authors call the question; the answer is always "answer".
_FILE_PROMPT_FIELD = {"gsm8k": "question"}


def find_benchmark(
    name: str, *, data_dir: Path | None = None, files: Mapping[str, Path] | None = None
) -> Benchmark:
    """The benchmark that `name` means.

    A known name is looked for in `files`, then in `data_dir`, as NAME.jsonl, eval/NAME.jsonl or
    NAME/test.jsonl, and without a `data_dir` on the hub. Anything with a slash or a suffix is a
    file or a hub data set of the user's, named by its last part.
    """
    if name in _NAMED:
        known = _NAMED[name]
        if files and name in files:
            return replace(known, source=str(files[name]))
        return known if data_dir is None else _in_folder(known, data_dir)
    if "/" not in name and not Path(name).suffix:
        raise ConfigError(
            f'benchmark "{name}": expected {", ".join(NAMES)}, a data file or a hub data set '
            f"owner/name{likely(name, NAMES)}"
        )
    path = Path(name.rstrip("/"))
    own_name = path.stem if path.is_file() else path.name
    # The name is also that of the folder with the samples.
    return Benchmark(re.sub(r"[^\w.-]+", "_", own_name), name, prompt_suffix="")


def _in_folder(known: Benchmark, folder: Path) -> Benchmark:
    name = known.name
    places = [f"{name}.jsonl", f"eval/{name}.jsonl", f"{name}/test.jsonl"]
    found = [folder / place for place in places if (folder / place).is_file()]
    if not found:
        raise ConfigError(
            f'benchmark "{name}": {folder} has none of {", ".join(places)}; leave out '
            f"--data-dir to take {known.source} from the hub"
        )
    prompt_field = _FILE_PROMPT_FIELD.get(name, "problem")
    return replace(known, source=str(found[0]), prompt_field=prompt_field, answer_field="answer")


class Graders(ExitStack):
    """One `Grader` per reward configuration, started when it is first asked for.

    `votes` has the deadline and the number of workers of the comparisons of answers.
    """

    def __init__(self, votes: RewardConfig) -> None:
        super().__init__()
        self._votes = votes.model_copy(update={"kind": "math", "format_gate": False})
        self._open: dict[str, Grader] = {}  # by configuration, in which a dict is not hashable

    def of(self, config: RewardConfig) -> Grader:
        """The grader of a configuration."""
        key = config.model_dump_json()
        if key not in self._open:
            self._open[key] = self.enter_context(Grader(config))
        return self._open[key]

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
            number = final_number(text)
            return None if number is None else str(number)
        if kind == "exact" and boxed is None:
            boxed = text.strip()
        return boxed or None

    return answer


def check_golds(prompts: Sequence[Prompt], *, kind: str, grader: Grader) -> dict[str, list[str]]:
    r"""Grade every gold, in a \boxed{}, against itself, and a wrong answer against every gold.

    Returns the ids of "golds_rejected", not even equal to themselves, so that no answer can be
    right; and of "golds_unreadable", which match only the very same text, so that any other right
    answer fails to be graded and is dropped. A user's function, which need not read a box, is not
    asked.
    """
    if ":" in kind:
        return {"golds_rejected": [], "golds_unreadable": []}
    golds, extract = [prompt.answer for prompt in prompts], answer_of(kind)
    own = grader.grade([rf"\boxed{{{extract(gold) or gold.strip()}}}" for gold in golds], golds)
    wrong = grader.grade([OTHER_ANSWER] * len(golds), golds)
    found = list(zip(prompts, own, wrong, strict=True))
    return {
        "golds_rejected": [p.prompt_id for p, reward, _ in found if not is_correct(reward or 0.0)],
        "golds_unreadable": [p.prompt_id for p, _, reward in found if reward is None],
    }
