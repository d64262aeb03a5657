"""`laser-fast eval`: sample, grade and score benchmarks, then report.

Samples are written chunk by chunk, so that a killed evaluation continues where it was. Sampling
noise is keyed by (seed, prompt, sample) and chunks have fixed borders, hence the same numbers.
Under torchrun the ranks share the prompts of every chunk; rank 0 writes.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from laser_fast.config import ConfigError, MeasureConfig
from laser_fast.data.prompts import PromptSource
from laser_fast.data.rows import open_rows
from laser_fast.evaluation.benchmarks import Benchmark, Graders, answer_of, check_golds
from laser_fast.evaluation.folder import EvalFolder
from laser_fast.evaluation.rescore import finish_evaluation
from laser_fast.evaluation.settings import known_ref_logprob, read_calibrated
from laser_fast.evaluation.statistics import ReportOptions
from laser_fast.log.samples import to_records
from laser_fast.model.distributed import World, check_world, open_world
from laser_fast.model.policy import build_policy, load_without_weights
from laser_fast.model.vocabulary import Vocabulary
from laser_fast.records import Prompt, Sampling
from laser_fast.rewards import grade_groups
from laser_fast.rollout.engine import Engine, make_engine, make_sampling
from laser_fast.rollout.sync import sync_engine

logger = logging.getLogger(__name__)

# Completions of a chunk per rank, in rounds of rollout.max_num_seqs. vLLM admits sequences as
# others end, so it wants many; the hf engine works round by round anyway.
_ROUNDS = {"hf": 1, "vllm": 16, "vllm_server": 16}
_DOUBTS = {
    "golds_rejected": "%s: %d golds do not equal themselves, so no answer is right: %s",
    "golds_unreadable": "%s: %d golds equal no other form of the right answer: %s",
}

Progress = Callable[[str, int, int], None]  # benchmark, problems done, problems


@dataclass(frozen=True, slots=True)
class _Task:
    """One benchmark with everything that sampling it needs."""

    name: str
    config: MeasureConfig
    sampling: Sampling
    chunk: int  # problems that are sampled together and written together
    prompts: list[Prompt]
    settings: dict[str, Any]  # what decides the samples
    golds: dict[str, list[str]]  # ids of the problems whose gold is in doubt, on rank 0


def run_evaluation(
    measured: Sequence[tuple[Benchmark, MeasureConfig]],
    out: Path,
    report: ReportOptions,
    *,
    samples: int | None = None,
    limit: int = 0,
    needs_score: bool = True,
    overwrite: bool = False,
    on_progress: Progress = lambda *_: None,
) -> EvalFolder | None:
    """Evaluate a model on benchmarks into the folder `out`; see `laser-fast eval --help`.

    Each benchmark comes with its configuration, all of the same model. All ranks but the first
    return None. A ConfigError names what does not fit, or says that the output is taken.
    """
    measured = [(replace(b, samples=samples or b.samples), config) for b, config in measured]
    _check([benchmark for benchmark, _ in measured], max(report.ks or (1,)))
    configs = [config for _, config in measured]
    if needs_score:
        known_ref_logprob(configs[0].score)
    folder = EvalFolder(out)
    if not overwrite:
        folder.refuse_finished()
    longest = max(configs, key=lambda config: config.max_sequence_tokens)
    with Graders(longest.reward) as graders:
        with open_world(longest.rollout.timeout_s) as world:
            check_world(longest, world.size)
            token = longest.score.token if needs_score else None
            _, vocabulary = load_without_weights(longest, score_token=token)
            part = _Part(world, vocabulary, graders, folder, needs_score, on_progress)
            tasks = [part.prepare(benchmark, config, limit) for benchmark, config in measured]
            settings = _settings(tasks, vocabulary, needs_score)
            world.on_main(lambda: folder.prepare(settings, overwrite=overwrite))
            starts = [(task, part.count_done(task)) for task in tasks]
            pending = [(task, done) for task, done in starts if done < len(task.prompts)]
            if pending:
                policy = build_policy(longest.model, world)
                with closing(make_engine(longest, policy, vocabulary.special)) as engine:
                    sync_engine(engine, policy, pending[0][0].prompts, longest, world)
                    for task, done in pending:
                        part.sample(task, done, engine)
        if not world.is_main:
            return None
        return finish_evaluation(folder, report, graders)


@dataclass(frozen=True, slots=True)
class _Part:
    """This rank's part in an evaluation."""

    world: World
    vocabulary: Vocabulary
    graders: Graders
    folder: EvalFolder
    needs_score: bool
    on_progress: Progress

    def prepare(self, benchmark: Benchmark, config: MeasureConfig, limit: int) -> _Task:
        """Load the problems and look at their golds, before the model is loaded."""
        name, samples = benchmark.name, benchmark.samples
        rollout, reward = config.rollout, config.reward
        sampling = make_sampling(config, "eval", group_size=samples, needs_score=self.needs_score)
        rows = open_rows(benchmark.source, split=config.data.eval_split)
        tokenizer, asked = self.vocabulary.tokenizer, self.graders.of(reward).fields
        source = PromptSource(config.data, tokenizer, rows, name=name, limit=limit, asked=asked)
        prompts = source.all()
        logger.info("%s: the first prompt is %r", name, prompts[0].text)
        settings = {
            "source": benchmark.source,
            "samples": samples,
            "max_new_tokens": sampling.max_new_tokens,
            "reward": reward.kind,
            "format_gate": reward.format_gate,
            "num_prompts": len(prompts),
            "num_dropped": source.num_dropped,
            "prompts": source.digest,
        }
        golds: dict[str, list[str]] = {}
        if self.world.is_main:
            golds = check_golds(prompts, kind=reward.kind, grader=self.graders.of(reward))
            if source.num_dropped:
                logger.warning("%s: %d over-long problems are left out", name, source.num_dropped)
            if repeated := len(prompts) - len({prompt.text for prompt in prompts}):
                fault = "problems repeat an earlier one and count again"
                logger.warning("%s: %d %s", name, repeated, fault)
            for key, ids in golds.items():
                if ids:
                    logger.warning(_DOUBTS[key], name, len(ids), ", ".join(ids[:5]))
        chunk = max(_ROUNDS[rollout.engine] * rollout.max_num_seqs * self.world.size // samples, 1)
        return _Task(name, config, sampling, chunk, prompts, settings, golds)

    def count_done(self, task: _Task) -> int:
        """Problems whose samples the folder holds; the rest of a chunk is dropped. Collective."""
        ids, size = [prompt.prompt_id for prompt in task.prompts], task.sampling.group_size
        return self.world.on_main(
            lambda: self.folder.keep_chunks(task.name, ids, size=size, chunk=task.chunk)
        )

    def sample(self, task: _Task, done: int, engine: Engine) -> None:
        """Sample, grade and append the problems from `done` on. Collective."""
        config, world, total = task.config, self.world, len(task.prompts)
        decode, extract = self.vocabulary.decode, answer_of(config.reward.kind)
        self.on_progress(task.name, done, total)
        for start in range(done, total, task.chunk):
            prompts = task.prompts[start : start + task.chunk]
            groups = engine.generate(prompts[world.rank :: world.size], task.sampling)
            groups = grade_groups(self.graders.of(config.reward), groups, decode)
            # They get their scores when all samples are there, and c_ref is known.
            records = world.gather(to_records(groups, decode=decode, extract=extract))
            if world.is_main:
                place = {prompt.prompt_id: i for i, prompt in enumerate(prompts)}
                records.sort(key=lambda record: (place[record.prompt_id], record.sample))
                self.folder.append(task.name, records)
                self.on_progress(task.name, min(start + task.chunk, total), total)


def _check(benchmarks: Sequence[Benchmark], k: int) -> None:
    """Refuse benchmarks that cannot be told apart, or have fewer than k samples per problem."""
    if not benchmarks:
        raise ConfigError("name at least one --benchmark")
    for place, (name, count) in enumerate((b.name, b.samples) for b in benchmarks):
        if name in (benchmark.name for benchmark in benchmarks[:place]):
            raise ConfigError(f'two benchmarks are called "{name}"; evaluate them apart')
        if k > count:
            raise ConfigError(
                f"--k {k} needs as many samples, and {name} gets {count}; raise --samples or "
                "lower --k"
            )


def _settings(tasks: Sequence[_Task], vocabulary: Vocabulary, needs_score: bool) -> dict[str, Any]:
    """What decides the samples; also golds, score and calibration, which may change."""
    config, sampling = tasks[0].config, tasks[0].sampling
    token_id = vocabulary.special.score_token_id
    score = config.score.model_dump(include={"token", "position", "beta", "ref_logprob"})
    return {
        "model": config.model.path,
        "weights": _weights(config.model.path),
        "engine": config.rollout.engine,
        "compute_dtype": config.model.compute_dtype,
        "seed": config.seed,
        **{key: getattr(sampling, key) for key in ("temperature", "top_p", "top_k", "min_p")},
        "score_token": vocabulary.tokenizer.convert_ids_to_tokens(token_id),
        "score_position": config.score.position,
        "needs_score": needs_score,
        "benchmarks": {task.name: task.settings for task in tasks},
        "golds": {task.name: task.golds for task in tasks},
        "score": score if needs_score else None,
        "calibrated": read_calibrated(config.model.path, score),
    }


def _weights(model: str) -> list[list[str | int]]:
    """Name, size and time of the weight files of a local model: another training, another list."""
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
