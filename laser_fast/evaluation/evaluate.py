"""`laser-fast eval`: sample, grade and score benchmarks, then report.

Samples are written chunk by chunk, so that a killed evaluation continues where it was. Sampling
noise is keyed by (seed, prompt, sample) and chunks have fixed borders, hence the same numbers.
Under torchrun the ranks share the prompts of every chunk; rank 0 writes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from laser_fast.config import Config, ConfigError
from laser_fast.data.prompts import PromptSource
from laser_fast.evaluation.benchmarks import Benchmark, find_benchmark
from laser_fast.evaluation.folder import EvalFolder
from laser_fast.evaluation.grading import Graders, answer_of, check_golds
from laser_fast.evaluation.model import open_engine, open_vocabulary
from laser_fast.evaluation.rescore import Conclusion, conclude
from laser_fast.evaluation.settings import Score, build_config, score_of
from laser_fast.evaluation.statistics import DEFAULTS, ReportOptions
from laser_fast.log.samples import to_records
from laser_fast.model.distributed import World, open_world
from laser_fast.model.policy import build_policy
from laser_fast.model.vocabulary import Vocabulary
from laser_fast.records import Prompt, Sampling
from laser_fast.rollout.engine import Engine, draw_seed
from laser_fast.training.run import max_positions

logger = logging.getLogger(__name__)

# Completions of a chunk per rank, in rounds of rollout.max_num_seqs. vLLM admits sequences as
# others end, so it wants many; the hf engine works round by round anyway.
_ROUNDS = {"hf": 1}
_MANY_ROUNDS = 16

Progress = Callable[[str, int, int], None]  # benchmark, problems done, problems


@dataclass(frozen=True, slots=True)
class _Shared:
    """What all benchmarks of one evaluation share."""

    folder: EvalFolder
    vocabulary: Vocabulary
    graders: Graders
    world: World
    needs_score: bool
    on_progress: Progress


@dataclass(frozen=True, slots=True)
class _Task:
    """One benchmark with everything that sampling it needs."""

    benchmark: Benchmark
    config: Config
    samples: int
    prompts: list[Prompt]
    num_dropped: int
    rejected: list[str]  # ids of problems whose gold no answer equals, on rank 0
    unreadable: list[str]  # and of those whose gold equals its own text alone

    @property
    def name(self) -> str:
        return self.benchmark.name

    def chunk(self, world: World) -> int:
        """Problems that are sampled together and written together."""
        rollout = self.config.rollout
        completions = _ROUNDS.get(rollout.engine, _MANY_ROUNDS) * rollout.max_num_seqs * world.size
        return max(completions // self.samples, 1)


def run_evaluation(
    model: str,
    benchmarks: Sequence[str],
    out: Path,
    *,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    data_dir: Path | None = None,
    samples: int | None = None,
    limit: int = 0,
    needs_score: bool = True,
    overwrite: bool = False,
    report: ReportOptions = DEFAULTS,
    on_progress: Progress = lambda *_: None,
) -> Conclusion | None:
    """Evaluate `model` on `benchmarks` into the folder `out`; see `laser-fast eval --help`.

    Returns:
        What was found; None on all ranks but the first.

    Raises:
        ConfigError: options, data or model do not fit, or the output is taken.
    """
    found = [find_benchmark(name, data_dir=data_dir) for name in benchmarks]
    counts = [samples or benchmark.samples for benchmark in found]
    _check_benchmarks(found, counts, max(report.ks or (1,)))
    configs = [
        build_config(model, benchmark, config=config, overrides=overrides) for benchmark in found
    ]
    score = score_of(configs[0]) if needs_score else None
    folder = EvalFolder(out)
    if not overwrite:
        folder.refuse_finished()
    longest = max(configs, key=max_positions)
    with Graders(longest.reward) as graders:
        with open_world() as world:
            vocabulary = open_vocabulary(longest, has_token=needs_score)
            shared = _Shared(folder, vocabulary, graders, world, needs_score, on_progress)
            tasks = [
                _prepare(*parts, limit, shared)
                for parts in zip(found, configs, counts, strict=True)
            ]
            if world.is_main:
                folder.prepare(_settings(tasks, vocabulary, score), overwrite=overwrite)
            world.barrier()
            starts = [(task, _count_done(task, shared)) for task in tasks]
            pending = [(task, done) for task, done in starts if done < len(task.prompts)]
            if pending:
                policy = build_policy(longest.model, world)
                with open_engine(longest, policy, vocabulary, world) as engine:
                    for task, done in pending:
                        _sample(task, done, engine, shared)
            is_main = world.is_main
        if not is_main:
            return None
        about = {task.name: _about(task) for task in tasks}
        same_answer = graders.same_answer
        return conclude(folder, about, score=score, options=report, same_answer=same_answer)


def _check_benchmarks(found: Sequence[Benchmark], counts: Sequence[int], k: int) -> None:
    if not found:
        raise ConfigError("name at least one --benchmark")
    names = [benchmark.name for benchmark in found]
    for name, count in zip(names, counts, strict=True):
        if names.count(name) > 1:
            raise ConfigError(f'two benchmarks are called "{name}"; evaluate them apart')
        if k > count:
            raise ConfigError(
                f"--k {k} needs as many samples, and {name} gets {count}; raise --samples or "
                "lower --k"
            )


def _prepare(
    benchmark: Benchmark, config: Config, samples: int, limit: int, shared: _Shared
) -> _Task:
    """Load the problems and look at their golds, before the model is loaded."""
    data = config.data.model_copy(update={"eval_limit": limit})
    source = PromptSource(data, shared.vocabulary.tokenizer, seed=config.seed, split="eval")
    prompts = [
        replace(prompt, prompt_id=prompt.prompt_id.replace("eval", benchmark.name, 1))
        for prompt in source.all()
    ]
    rejected, unreadable = [], []
    if shared.world.is_main:
        reward, answers = config.reward, [prompt.answer for prompt in prompts]
        found = check_golds(answers, kind=reward.kind, grader=shared.graders.of(reward))
        rejected, unreadable = ([prompts[i].prompt_id for i in indices] for indices in found)
    task = _Task(benchmark, config, samples, prompts, source.num_dropped, rejected, unreadable)
    if shared.world.is_main:
        _warn(task)
    return task


def _warn(task: _Task) -> None:
    repeated = len(task.prompts) - len({prompt.text for prompt in task.prompts})
    rejected, unreadable = (", ".join(ids[:5]) for ids in (task.rejected, task.unreadable))
    for count, fault in (
        (task.num_dropped, "over-long problems are left out"),
        (repeated, "problems repeat an earlier one and count again"),
        (len(task.rejected), f"golds do not equal themselves, so no answer is right: {rejected}"),
        (len(task.unreadable), f"golds equal no other form of the right answer: {unreadable}"),
    ):
        if count:
            logger.warning("%s: %d %s", task.name, count, fault)


def _settings(
    tasks: Sequence[_Task], vocabulary: Vocabulary, score: Score | None
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
        "score": None if score is None else asdict(score),
    }


def _about(task: _Task) -> dict[str, Any]:
    """What the report says of a benchmark besides its numbers."""
    return {
        "source": task.benchmark.source,
        "reward": task.config.reward.kind,
        "num_dropped": task.num_dropped,
        "golds_rejected": task.rejected,
        "golds_unreadable": task.unreadable,
    }


def _weights(model: str) -> list[list[str | int]]:
    """Name, size and time of the weight files of a local model: another training, another list."""
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _digest(prompts: Sequence[Prompt]) -> str:
    content = repr([(prompt.prompt_ids, prompt.answer) for prompt in prompts])
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def _count_done(task: _Task, shared: _Shared) -> int:
    """Problems whose samples the folder holds; what is left of a chunk is dropped. Collective."""
    done, world = 0, shared.world
    if world.is_main:
        ids = [prompt.prompt_id for prompt in task.prompts]
        chunk = task.chunk(world)
        done = shared.folder.keep_whole_chunks(task.name, ids, size=task.samples, chunk=chunk)
    return world.max(done)


def _sample(task: _Task, done: int, engine: Engine, shared: _Shared) -> None:
    """Sample, grade and append the problems from `done` on. Collective."""
    config, world, total = task.config, shared.world, len(task.prompts)
    sampling = Sampling(
        group_size=task.samples,
        temperature=config.rollout.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
        seed=draw_seed(config.seed, "eval"),
        needs_score=shared.needs_score,
    )
    ref_logprob = config.score.ref_logprob
    chunk = task.chunk(world)
    shared.on_progress(task.name, done, total)
    for start in range(done, total, chunk):
        prompts = task.prompts[start : start + chunk]
        records = to_records(
            engine.generate(prompts[world.rank :: world.size], sampling),
            decode=shared.vocabulary.decode,
            grader=shared.graders.of(config.reward),
            beta=config.score.beta,
            # Unknown as yet: the scores are written when all samples are there.
            ref_logprob=float("nan") if ref_logprob == "auto" else ref_logprob,
            extract=answer_of(config.reward.kind),
        )
        records = world.gather(records)
        if world.is_main:
            place = {prompt.prompt_id: i for i, prompt in enumerate(prompts)}
            records.sort(key=lambda record: (place[record.prompt_id], record.sample))
            shared.folder.append(task.name, records)
            shared.on_progress(task.name, min(start + chunk, total), total)
