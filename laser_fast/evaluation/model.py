"""A model ready to be measured: vocabulary first, weights and engine only when asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from laser_fast.config import Config
from laser_fast.rollout.engine import Engine
from laser_fast.training.distributed import World
from laser_fast.training.packing import Packer
from laser_fast.training.policy import Policy, build_policy, load_model_config
from laser_fast.training.run import check_lengths, make_engine
from laser_fast.training.vocabulary import Vocabulary, load_vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """The policy, and a sampler that already holds its weights."""

    policy: Policy
    engine: Engine
    packer: Packer


def open_vocabulary(config: Config, *, has_token: bool = True) -> Vocabulary:
    """The tokenizer and special ids, after a look at the model's configuration alone.

    Args:
        config: names model and score token.
        has_token: False takes any reserved token instead of `score.token`.

    Raises:
        ConfigError: the model or its tokenizer cannot be measured, or the lengths do not fit.
    """
    model_config = load_model_config(config.model)
    check_lengths(config, model_config.max_position_embeddings)
    return load_vocabulary(
        config.model.path,
        score_token=config.score.token if has_token else None,
        model_config=model_config,
    )


@contextmanager
def open_model(config: Config, vocabulary: Vocabulary, world: World) -> Iterator[LoadedModel]:
    """Load the weights and hand them to the engine that the configuration names. Collective."""
    policy = build_policy(config.model, world)
    engine = make_engine(config, policy, vocabulary)
    try:
        engine.sync(policy.stream_weights(world.device))
        packer = Packer(
            budget=config.optim.tokens_per_microbatch,
            score_token_id=vocabulary.score_token_id,
            temperature=1.0,
            device=world.device,
            agree=world.max,
        )
        yield LoadedModel(policy=policy, engine=engine, packer=packer)
    finally:
        engine.close()
