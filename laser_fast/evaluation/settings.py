"""From the options of a verb to a configuration: one vocabulary for training and measuring.

Later layers win:

    defaults of the paper's protocol, laser_fast.json of the model
    --config, such as the config.toml of a training run
    source, fields, split and reward of a named benchmark
    options of the command line, section.key=value overrides
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laser_fast.config import Config, ConfigError, apply_override, parse_config
from laser_fast.evaluation.benchmarks import (
    MAX_NEW_TOKENS,
    MAX_PROMPT_TOKENS,
    PROMPT_SUFFIX,
    SANDBOX,
    Benchmark,
)
from laser_fast.evaluation.conclude import Score
from laser_fast.evaluation.score_settings import read_score_settings

_Layer = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """What every measuring verb is told about the model; None leaves it to the lower layers."""

    model: str
    config: Path | None = None
    token: str | None = None
    beta: float | None = None
    ref_logprob: str | None = None  # a number or "auto"
    engine: str = "hf"
    seed: int | None = None
    overrides: Sequence[str] = ()

    @property
    def measures_ref(self) -> bool:
        """Whether the user asked for c_ref from this very model's completions."""
        asked = [self.ref_logprob, *(o.partition("score.ref_logprob=")[2] for o in self.overrides)]
        return any(value is not None and value.strip("\"' ") == "auto" for value in asked)


def build_config(options: ModelOptions, benchmark: Benchmark | None = None) -> Config:
    """The configuration of one benchmark's measurement.

    `data.eval` and `data.train` both name the problems. What only training reads is neutral, and
    `optim.tokens_per_microbatch` holds the longest sequence.

    Raises:
        ConfigError: an option or key that does not fit.
    """
    _refuse_run_folder(options.model)
    layers: _Layer = _defaults(benchmark)
    _merge(layers, {"score": read_score_settings(options.model)})
    _merge(layers, _file_layer(options.config))
    if benchmark is not None:
        _merge(layers, _benchmark_layer(benchmark))
    _merge(layers, _option_layer(options))
    for override in options.overrides:
        apply_override(layers, override)
    _neutralize(layers)
    return parse_config(layers, source=str(options.config or "options"))


def score_of(config: Config, options: ModelOptions) -> Score:
    """The score that the options and the model's own file ask for.

    Raises:
        ConfigError: nobody said c_ref.
    """
    ref_logprob = config.score.ref_logprob
    if ref_logprob == "auto" and not options.measures_ref:
        raise ConfigError(
            "a score needs c_ref, the log-prob that the untrained model gave its token: pass "
            "--ref-logprob (`laser-fast calibrate` measures it on the base model), or "
            "--ref-logprob auto if this model never trained a score"
        )
    return Score(
        token=config.score.token,
        beta=config.score.beta,
        ref_logprob=None if ref_logprob == "auto" else ref_logprob,
    )


def read_ref_logprob(text: str) -> float | str:
    """The number of --ref-logprob, or "auto".

    Raises:
        ConfigError: neither.
    """
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f'--ref-logprob: expected a number or "auto", got "{text}"') from None


def _defaults(benchmark: Benchmark | None) -> _Layer:
    data = {"train": "none", "max_prompt_tokens": MAX_PROMPT_TOKENS}
    if benchmark is not None:
        data["prompt_suffix"] = PROMPT_SUFFIX
    rollout = {"max_new_tokens": MAX_NEW_TOKENS}
    if benchmark == SANDBOX:
        data |= {"template": "{prompt}", "prompt_suffix": "", "max_prompt_tokens": 24}
        rollout = {"max_new_tokens": 48}
    return {"output_dir": "", "data": data, "rollout": rollout, "optim": {"steps": 1}}


def _file_layer(path: Path | None) -> _Layer:
    if path is None:
        return {}
    try:
        layer = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    score = layer.get("score")
    if isinstance(score, dict) and score.get("ref_logprob") == "auto":
        # It was measured in training, and the exported model knows it.
        del score["ref_logprob"]
    return layer


def _benchmark_layer(benchmark: Benchmark) -> _Layer:
    data = {
        "train": benchmark.source,
        "eval": benchmark.source,
        "prompt_field": benchmark.prompt_field,
        "answer_field": benchmark.answer_field,
        "train_split": benchmark.split,
        "eval_split": benchmark.split,
    }
    layer: _Layer = {"data": {key: value for key, value in data.items() if value}}
    if benchmark.reward_kind:
        layer["reward"] = {"kind": benchmark.reward_kind}
    return layer


def _option_layer(options: ModelOptions) -> _Layer:
    layer: _Layer = {"model": {"path": options.model}, "rollout": {"engine": options.engine}}
    if options.engine == "hf":
        layer["rollout"]["tensor_parallel"] = 1
    if options.seed is not None:
        layer["seed"] = options.seed
    score = {"token": options.token, "beta": options.beta}
    if options.ref_logprob is not None:
        score["ref_logprob"] = read_ref_logprob(options.ref_logprob)
    layer["score"] = {key: value for key, value in score.items() if value is not None}
    return layer


def _neutralize(layers: _Layer) -> None:
    """Let nothing that only training reads stand in the way of a measurement."""
    for name in ("data", "rollout", "score", "advantage", "optim"):
        if not isinstance(layers.setdefault(name, {}), dict):
            raise ConfigError(f'"{name}" is a section, not a value; set its keys, {name}.key=value')
    layers["score"]["loss_coef"] = layers["advantage"]["score_coef"] = 0.0
    rollout = layers["rollout"]
    if rollout.get("score") == "off":
        rollout["score"] = "auto"  # scores come from generation here
    # Wrong types are left to the validation, which names them.
    lengths = (layers["data"].get("max_prompt_tokens"), rollout.get("max_new_tokens"))
    budget = layers["optim"].get("tokens_per_microbatch", 16384)
    if all(isinstance(number, int) for number in (*lengths, budget)):
        layers["optim"]["tokens_per_microbatch"] = max(budget, sum(lengths) + 1)


def _merge(layers: _Layer, upper: Mapping[str, Any]) -> None:
    for key, value in upper.items():
        if isinstance(value, Mapping):
            below = layers.setdefault(key, {})
            if isinstance(below, dict):
                _merge(below, value)
                continue
        layers[key] = value


def _refuse_run_folder(model: str) -> None:
    folder = Path(model)
    if (folder / "config.toml").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"{model} is the folder of a run, not a model; write its model with `laser-fast export "
            f"{model} OUT` and measure OUT with --config {folder / 'config.toml'}"
        )
