r"""Benchmarks by name: where their problems are, how they are worded and graded, how often sampled.

The paper's protocol (arXiv 2510.14943): T = 1, top_p = 1, at most 8192 new tokens; 2 samples a
problem on MATH500 and OlympiadBench, 32 on AMC23, AIME24 and AIME25; accuracy is the mean over all
samples, and the headline number the mean over the five sets.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Named:
    """A benchmark that has a name: on the hub, and as the file that its authors publish."""

    hub: str
    samples: int
    split: str = "test"
    hub_fields: tuple[str, str] = ("problem", "answer")
    file_fields: tuple[str, str] = ("problem", "answer")
    reward_kind: str = "math"


_NAMED = {
    "math500": _Named(hub="HuggingFaceH4/MATH-500", samples=2),
    "amc23": _Named(hub="math-ai/amc23", samples=32, hub_fields=("question", "answer")),
    "aime24": _Named(hub="HuggingFaceH4/aime_2024", samples=32, split="train"),
    "aime25": _Named(hub="math-ai/aime25", samples=32),
    "olympiadbench": _Named(
        hub="math-ai/olympiadbench", samples=2, hub_fields=("question", "final_answer")
    ),
    "gsm8k": _Named(
        hub="openai/gsm8k:main",
        samples=8,
        hub_fields=("question", "answer"),
        file_fields=("question", "answer"),
        reward_kind="gsm8k",
    ),
}
SANDBOX = Benchmark(
    name="sandbox",
    source="sandbox",
    prompt_field="problem",
    answer_field="answer",
    reward_kind="laser_fast.data.sandbox:reward",
)
NAMES = (*_NAMED, SANDBOX.name)


def find_benchmark(name: str, *, data_dir: Path | None = None) -> Benchmark:
    """The benchmark that `name` means.

    A known name is looked for in `data_dir`, as NAME.jsonl, eval/NAME.jsonl or NAME/test.jsonl,
    and without a `data_dir` on the hub. Anything with a slash or a suffix is a file or a hub data
    set of the user's, named by its last part.

    Raises:
        ConfigError: an unknown name, or a file that is not there.
    """
    if name == SANDBOX.name:
        return SANDBOX
    if name in _NAMED:
        return _named(name, _NAMED[name], data_dir)
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


def _named(name: str, known: _Named, data_dir: Path | None) -> Benchmark:
    source, fields = known.hub, known.hub_fields
    if data_dir is not None:
        places = [f"{name}.jsonl", f"eval/{name}.jsonl", f"{name}/test.jsonl"]
        found = [data_dir / place for place in places if (data_dir / place).is_file()]
        if not found:
            raise ConfigError(
                f'benchmark "{name}": {data_dir} has none of {", ".join(places)}; leave out '
                f"--data-dir to take {known.hub} from the hub"
            )
        source, fields = str(found[0]), known.file_fields
    return Benchmark(
        name=name,
        source=source,
        split=known.split,
        prompt_field=fields[0],
        answer_field=fields[1],
        reward_kind=known.reward_kind,
        samples=known.samples,
    )
