r"""Benchmarks by name: where their problems are, how they are worded and graded, how often sampled.

The paper's protocol (arXiv 2510.14943): T = 1, top_p = 1, at most 8192 new tokens; 2 samples a
problem on MATH500 and OlympiadBench, 32 on AMC23, AIME24 and AIME25; accuracy is the mean over all
samples, and the headline number the mean over the five sets.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from pathlib import Path

from laser_fast.config import ConfigError

MAX_NEW_TOKENS = 8192
MAX_PROMPT_TOKENS = 2048
# The released evaluation appends this to a base model's prompt, after a line break.
PROMPT_SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."
FILE_SAMPLES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """One set of problems.

    `source` is a local file, a hub data set or "sandbox". Empty fields and `reward_kind` leave the
    choice to the configuration.
    """

    name: str
    source: str
    split: str = "test"
    prompt_field: str = ""
    answer_field: str = ""
    reward_kind: str = ""
    samples: int = FILE_SAMPLES


def _on_hub(
    name: str, source: str, samples: int, fields: str = "problem answer", **options: str
) -> Benchmark:
    prompt_field, answer_field = fields.split()
    return Benchmark(
        name=name,
        source=source,
        samples=samples,
        prompt_field=prompt_field,
        answer_field=answer_field,
        **{"reward_kind": "math"} | options,
    )


SANDBOX = Benchmark(
    name="sandbox",
    source="sandbox",
    prompt_field="problem",
    answer_field="answer",
    reward_kind="laser_fast.sandbox.task:reward",
)
_NAMED = (
    _on_hub("math500", "HuggingFaceH4/MATH-500", 2),
    _on_hub("amc23", "math-ai/amc23", 32, "question answer"),
    _on_hub("aime24", "HuggingFaceH4/aime_2024", 32, split="train"),
    _on_hub("aime25", "math-ai/aime25", 32),
    _on_hub("olympiadbench", "math-ai/olympiadbench", 2, "question final_answer"),
    _on_hub("gsm8k", "openai/gsm8k:main", 8, "question answer", reward_kind="gsm8k"),
    SANDBOX,
)
NAMES = tuple(benchmark.name for benchmark in _NAMED)
# The files that the authors publish call the question so, and the answer "answer".
_FILE_PROMPT_FIELD = {"gsm8k": "question"}


def find_benchmark(name: str, *, data_dir: Path | None = None) -> Benchmark:
    """The benchmark that `name` means.

    A known name is looked for in `data_dir`, as NAME.jsonl, eval/NAME.jsonl or NAME/test.jsonl,
    and without a `data_dir` on the hub. Anything with a slash or a suffix is a file or a hub data
    set of the user's, named by its last part.

    Raises:
        ConfigError: an unknown name, or a file that is not there.
    """
    if name in NAMES:
        known = _NAMED[NAMES.index(name)]
        return known if data_dir is None or known is SANDBOX else _in_folder(known, data_dir)
    if "/" not in name and not Path(name).suffix:
        nearest = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
        hint = f'; did you mean "{nearest[0]}"?' if nearest else ""
        raise ConfigError(
            f'benchmark "{name}": expected {", ".join(NAMES)}, a data file or a hub data set '
            f"owner/name{hint}"
        )
    path = Path(name.rstrip("/"))
    own_name = path.stem if path.is_file() else path.name
    # It names a folder too.
    return Benchmark(name=re.sub(r"[^\w.-]+", "_", own_name), source=name)


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
