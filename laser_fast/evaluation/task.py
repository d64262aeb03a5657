"""One benchmark with everything that sampling it needs, and what its samples depend on."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from laser_fast.config import Config
from laser_fast.data.prompts import PromptSource
from laser_fast.evaluation.answers import GoldCheck, check_golds
from laser_fast.evaluation.benchmarks import Benchmark
from laser_fast.evaluation.conclude import Score
from laser_fast.records import Prompt
from laser_fast.rewards import Grader
from laser_fast.training.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One benchmark with everything that sampling it needs."""

    benchmark: Benchmark
    config: Config
    prompts: list[Prompt]
    samples: int
    num_dropped: int
    golds: GoldCheck | None  # None except on rank 0

    @property
    def name(self) -> str:
        """Of the benchmark; also of its folder."""
        return self.benchmark.name


def prepare_task(
    benchmark: Benchmark,
    config: Config,
    vocabulary: Vocabulary,
    *,
    samples: int,
    limit: int,
    grader: Grader | None,
) -> Task:
    """Load the problems and look at their golds, before the model is loaded.

    Args:
        benchmark: what to load.
        config: how it is worded and graded.
        vocabulary: of the model.
        samples: completions per problem.
        limit: the first so many problems; 0: all.
        grader: looks at the golds; None on all ranks but the first.
    """
    data = config.data.model_copy(update={"eval_limit": limit})
    source = PromptSource(data, vocabulary.tokenizer, seed=config.seed, split="eval")
    prompts = [
        replace(prompt, prompt_id=prompt.prompt_id.replace("eval", benchmark.name, 1))
        for prompt in source.all()
    ]
    golds = None
    if grader is not None:
        _warn_about_prompts(benchmark.name, source, prompts)
        answers = [prompt.answer for prompt in prompts]
        golds = check_golds(answers, kind=config.reward.kind, grader=grader)
        _warn_about_golds(benchmark.name, golds, prompts)
    return Task(
        benchmark=benchmark,
        config=config,
        prompts=prompts,
        samples=samples,
        num_dropped=source.num_dropped,
        golds=golds,
    )


def sampling_settings(
    tasks: Sequence[Task], vocabulary: Vocabulary, score: Score | None
) -> dict[str, Any]:
    """Everything that decides the samples; `score` is for --rescore and may change."""
    config = tasks[0].config
    return {
        "model": config.model.path,
        "weights": _weights(config.model.path),
        "engine": config.rollout.engine,
        "compute_dtype": config.model.compute_dtype,
        "seed": config.seed,
        "temperature": config.rollout.temperature,
        "score_token": vocabulary.tokenizer.convert_ids_to_tokens(vocabulary.score_token_id),
        "needs_score": score is not None,
        "benchmarks": {
            task.name: {
                "source": task.benchmark.source,
                "samples": task.samples,
                "max_new_tokens": task.config.rollout.max_new_tokens,
                "reward": task.config.reward.kind,
                "format_gate": task.config.reward.format_gate,
                "num_prompts": len(task.prompts),
                "prompts": _digest(task.prompts),
            }
            for task in tasks
        },
        "score": None if score is None else score.to_dict(),
    }


def about(task: Task) -> dict[str, Any]:
    """What the report says of a benchmark besides its numbers."""
    assert task.golds is not None
    return {
        "source": task.benchmark.source,
        "reward": task.config.reward.kind,
        "num_dropped": task.num_dropped,
        "golds_rejected": [task.prompts[i].prompt_id for i in task.golds.rejected],
        "golds_unreadable": [task.prompts[i].prompt_id for i in task.golds.unreadable],
    }


def _weights(model: str) -> list[list[str | int]]:
    """Name, size and time of the weight files of a local model: another training, another list."""
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _digest(prompts: Sequence[Prompt]) -> str:
    content = repr([(prompt.prompt_ids, prompt.answer) for prompt in prompts])
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def _warn_about_prompts(name: str, source: PromptSource, prompts: Sequence[Prompt]) -> None:
    if source.num_dropped:
        logger.warning("%s: dropped %d over-long problems", name, source.num_dropped)
    repeated = len(prompts) - len({prompt.text for prompt in prompts})
    if repeated:
        logger.warning("%s: %d problems repeat an earlier one and count again", name, repeated)


def _warn_about_golds(name: str, golds: GoldCheck, prompts: Sequence[Prompt]) -> None:
    for indices, fault in (
        (golds.rejected, "do not equal themselves, so no answer is right"),
        (golds.unreadable, "match only their own text; other right answers will fail to grade"),
    ):
        if indices:
            shown = ", ".join(prompts[i].prompt_id for i in indices[:5])
            logger.warning("%s: %d gold answers %s: %s", name, len(indices), fault, shown)
