"""`laser-fast calibrate`: sample an untrained model, read all reserved tokens after the EOS.

Every candidate is read from the same EOS rows in one packed forward; calibration.py ranks them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from laser_fast.config import Config, ConfigError
from laser_fast.data.prompts import PromptSource
from laser_fast.evaluation.benchmarks import find_benchmark
from laser_fast.evaluation.calibration import Calibration, Row, rank_candidates
from laser_fast.evaluation.last_token import read_last_token
from laser_fast.evaluation.model import LoadedModel, open_model, open_vocabulary
from laser_fast.evaluation.settings import ModelOptions, build_config
from laser_fast.records import Prompt, Sampling
from laser_fast.rollout.engine import draw_seed
from laser_fast.training.distributed import World, open_world
from laser_fast.training.policy import load_model_config
from laser_fast.training.vocabulary import Vocabulary, reserved_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrateOptions:
    """What is sampled; see `laser-fast calibrate --help`."""

    data: str
    data_dir: Path | None = None
    prompts: int = 64
    samples: int = 4
    templates: Sequence[str] = ()


def calibrate(model: ModelOptions, options: CalibrateOptions) -> Calibration | None:
    """Sample, read every candidate's log-prob after the EOS, and rank the candidates.

    Returns:
        The calibration; None on all ranks but the first.

    Raises:
        ConfigError: options, data or model do not fit, or no completion ended.
    """
    config = build_config(model, find_benchmark(options.data, data_dir=options.data_dir))
    templates = tuple(options.templates) or (config.data.template,)
    with open_world() as world:
        vocabulary = open_vocabulary(config, has_token=model.token is not None)
        tokens = _tokens(
            vocabulary, model.token, num_rows=load_model_config(config.model).vocab_size
        )
        prompts = [
            (template, prompt)
            for template in templates
            for prompt in _prompts(config, template, vocabulary, options)
        ]
        with open_model(config, vocabulary, world) as loaded:
            rows = _measure(
                prompts,
                list(tokens.values()),
                config,
                loaded,
                world,
                options,
                vocabulary.tokenizer.convert_ids_to_tokens,
            )
        is_main = world.is_main
    if not is_main:
        return None
    return rank_candidates(rows, tokens)


def _tokens(vocabulary: Vocabulary, token: str | None, num_rows: int) -> dict[str, int]:
    if token is not None:
        return {token: vocabulary.score_token_id}
    return reserved_tokens(vocabulary.tokenizer, vocabulary.eos_token_ids, num_rows=num_rows)


def _prompts(
    config: Config, template: str, vocabulary: Vocabulary, options: CalibrateOptions
) -> list[Prompt]:
    if template != "chat" and "{prompt}" not in template:
        raise ConfigError(f"--template {template!r}: put {{prompt}} into it, or say chat")
    data = config.data.model_copy(
        update={"template": template, "prompts_per_step": options.prompts}
    )
    source = PromptSource(data, vocabulary.tokenizer, seed=config.seed, split="train")
    return source.prompts(0)


def _measure(
    prompts: Sequence[tuple[str, Prompt]],
    token_ids: Sequence[int],
    config: Config,
    loaded: LoadedModel,
    world: World,
    options: CalibrateOptions,
    eos_text: Callable[[int], str],
) -> list[Row]:
    """The completions of all ranks with the log-probs of the candidates after the EOS."""
    own = prompts[world.rank :: world.size]
    sampling = Sampling(
        group_size=options.samples,
        temperature=config.rollout.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
        seed=draw_seed(config.seed, "calibrate"),
        needs_score=False,
    )
    groups = loaded.engine.generate([prompt for _, prompt in own], sampling)
    drawn = [
        (template, group.prompt, completion)
        for (template, _), group in zip(own, groups, strict=True)
        for completion in group.completions
    ]
    ended = [
        prompt.prompt_ids + completion.completion_ids
        for _, prompt, completion in drawn
        if completion.is_finished
    ]
    found = iter(read_last_token(loaded.policy, ended, loaded.packer, token_ids).tolist())
    return world.gather(
        [
            Row(
                template=template,
                prompt_id=prompt.prompt_id,
                eos=eos_text(completion.completion_ids[-1]) if completion.is_finished else None,
                completion_ids=completion.completion_ids,
                logprobs=next(found) if completion.is_finished else None,
            )
            for template, prompt, completion in drawn
        ]
    )
