"""`laser-fast eval`: sample, grade and score benchmarks, then report.

Samples are written chunk by chunk, so that a killed evaluation continues where it was. Sampling
noise is keyed by (seed, prompt, sample) and chunks have fixed borders, hence the same numbers.
Under torchrun the ranks share the prompts of every chunk; rank 0 writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from laser_fast.config import ConfigError
from laser_fast.evaluation.answers import answer_of
from laser_fast.evaluation.benchmarks import Benchmark, find_benchmark
from laser_fast.evaluation.conclude import Conclusion, conclude
from laser_fast.evaluation.evaluate import collect
from laser_fast.evaluation.folder import EvalFolder
from laser_fast.evaluation.graders import Graders
from laser_fast.evaluation.model import LoadedModel, open_model, open_vocabulary
from laser_fast.evaluation.report import ReportOptions
from laser_fast.evaluation.settings import ModelOptions, build_config, score_of
from laser_fast.evaluation.task import Task, about, prepare_task, sampling_settings
from laser_fast.records import Sampling
from laser_fast.rewards import Grader
from laser_fast.rollout.engine import draw_seed
from laser_fast.training.distributed import World, open_world
from laser_fast.training.run import max_positions
from laser_fast.training.vocabulary import Vocabulary

# Completions of a chunk per rank, in rounds of rollout.max_num_seqs. vLLM admits sequences as
# others end, so it wants many; the hf engine works round by round anyway.
_ROUNDS = {"hf": 1}
_MANY_ROUNDS = 16

Progress = Callable[[str, int, int], None]  # benchmark, problems done, problems


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalOptions:
    """What is evaluated and where the result goes; see `laser-fast eval --help`."""

    benchmarks: Sequence[str]
    out: Path
    data_dir: Path | None = None
    samples: int | None = None
    limit: int = 0
    needs_score: bool = True
    overwrite: bool = False
    report: ReportOptions = ReportOptions()


def run_evaluation(
    model: ModelOptions, options: EvalOptions, *, on_progress: Progress = lambda *_: None
) -> Conclusion | None:
    """Evaluate `model` as the options say.

    Returns:
        What was found; None on all ranks but the first.

    Raises:
        ConfigError: options, data or model do not fit, or the output is taken.
    """
    benchmarks = _find_benchmarks(options)
    configs = [build_config(model, benchmark) for benchmark in benchmarks]
    score = score_of(configs[0], model) if options.needs_score else None
    folder = EvalFolder(options.out)
    if not options.overwrite:
        folder.refuse_finished()
    longest = max(configs, key=max_positions)
    with Graders(longest.reward) as graders:
        with open_world() as world:
            vocabulary = open_vocabulary(longest, has_token=options.needs_score)
            tasks = [
                prepare_task(
                    benchmark,
                    config,
                    vocabulary,
                    samples=options.samples or benchmark.samples,
                    limit=options.limit,
                    grader=graders.of(config.reward) if world.is_main else None,
                )
                for benchmark, config in zip(benchmarks, configs, strict=True)
            ]
            if world.is_main:
                settings = sampling_settings(tasks, vocabulary, score)
                folder.prepare(settings, overwrite=options.overwrite)
            world.barrier()
            done = [_count_done(task, folder, world) for task in tasks]
            pending = [
                (task, count)
                for task, count in zip(tasks, done, strict=True)
                if count < len(task.prompts)
            ]
            if pending:
                with open_model(longest, vocabulary, world) as loaded:
                    for task, count in pending:
                        _sample(
                            task,
                            count,
                            folder=folder,
                            vocabulary=vocabulary,
                            loaded=loaded,
                            grader=graders.of(task.config.reward),
                            world=world,
                            needs_score=options.needs_score,
                            on_progress=on_progress,
                        )
            is_main = world.is_main
        if not is_main:
            return None
        return conclude(
            folder,
            {task.name: about(task) for task in tasks},
            score=score,
            options=options.report,
            same_answer=graders.same_answer,
        )


def _find_benchmarks(options: EvalOptions) -> list[Benchmark]:
    found = [find_benchmark(name, data_dir=options.data_dir) for name in options.benchmarks]
    if not found:
        raise ConfigError("name at least one --benchmark")
    names = [benchmark.name for benchmark in found]
    for benchmark in found:
        samples = options.samples or benchmark.samples
        if names.count(benchmark.name) > 1:
            raise ConfigError(f'two benchmarks are called "{benchmark.name}"; evaluate them apart')
        if max(options.report.ks or (1,)) > samples:
            raise ConfigError(
                f"--k {max(options.report.ks)} needs as many samples, and {benchmark.name} gets "
                f"{samples}; raise --samples or lower --k"
            )
    return found


def _chunk(task: Task, world: World) -> int:
    """Problems that are sampled together and written together."""
    rollout = task.config.rollout
    completions = _ROUNDS.get(rollout.engine, _MANY_ROUNDS) * rollout.max_num_seqs * world.size
    return max(completions // task.samples, 1)


def _count_done(task: Task, folder: EvalFolder, world: World) -> int:
    """Problems whose samples the folder holds; what is left of a chunk is dropped. Collective."""
    done = 0
    if world.is_main:
        ids = [prompt.prompt_id for prompt in task.prompts]
        done = folder.keep_whole_chunks(
            task.name, ids, size=task.samples, chunk=_chunk(task, world)
        )
    return world.max(done)


def _sample(
    task: Task,
    done: int,
    *,
    folder: EvalFolder,
    vocabulary: Vocabulary,
    loaded: LoadedModel,
    grader: Grader,
    world: World,
    needs_score: bool,
    on_progress: Progress,
) -> None:
    """Sample, grade and append the problems from `done` on. Collective."""
    config, total = task.config, len(task.prompts)
    sampling = Sampling(
        group_size=task.samples,
        temperature=config.rollout.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
        seed=draw_seed(config.seed, "eval"),
        needs_score=needs_score,
    )
    ref_logprob = config.score.ref_logprob
    chunk = _chunk(task, world)
    on_progress(task.name, done, total)
    for start in range(done, total, chunk):
        prompts = task.prompts[start : start + chunk]
        records = collect(
            prompts[world.rank :: world.size],
            engine=loaded.engine,
            decode=vocabulary.decode,
            grader=grader,
            sampling=sampling,
            beta=config.score.beta,
            # Unknown as yet: the scores are written when all samples are there.
            ref_logprob=float("nan") if ref_logprob == "auto" else ref_logprob,
            extract=answer_of(config.reward.kind),
        )
        records = world.gather(records)
        if world.is_main:
            place = {prompt.prompt_id: i for i, prompt in enumerate(prompts)}
            records.sort(key=lambda record: (place[record.prompt_id], record.sample))
            folder.append(task.name, records)
            on_progress(task.name, min(start + chunk, total), total)
