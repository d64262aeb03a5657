"""The configuration of a measurement: one vocabulary for training and measuring.

Later layers win:

    defaults of the paper's protocol, laser_fast.json of the model
    --config, such as the config.toml of a training run
    source, fields, split and reward of a named benchmark
    options of the command line, which are section.key=value overrides as well

laser_fast.json lies beside a model's weights and holds the score that it was trained to give: a
score means something only with the token, beta and c_ref of its training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laser_fast.config import Config, ConfigError, apply_override, parse_config, read_toml
from laser_fast.evaluation.benchmarks import (
    MAX_NEW_TOKENS,
    MAX_PROMPT_TOKENS,
    PROMPT_SUFFIX,
    SANDBOX,
    Benchmark,
)
from laser_fast.log.jsonl import replace_text, to_text

_SCORE_FILE = "laser_fast.json"
_SCORE_KEYS = {"token": str, "beta": float, "ref_logprob": float}
# Keys that no measurement reads, and what to use instead.
_NOT_MEASURED = {
    "data.eval_limit": "that is eval --limit",
    "data.eval_samples": "that is eval --samples",
    "score.loss_coef": "only training reads it",
    "advantage.score_coef": "only training reads it",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """How score log-probs become scores.

    `ref_logprob` "auto" takes the mean score log-prob of all finished samples: right for a model
    that never trained a score.
    """

    token: str | None
    beta: float
    ref_logprob: float | str


def build_config(
    model: str,
    benchmark: Benchmark | None = None,
    *,
    config: Path | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """The configuration of one benchmark's measurement, sampled by the hf engine by default.

    `data.eval` and `data.train` both name the problems. What only training reads is neutral, and
    `optim.tokens_per_microbatch` holds the longest sequence.

    Raises:
        ConfigError: an option or key that does not fit.
    """
    _refuse_run_folder(model)
    refuse_overrides(overrides, _NOT_MEASURED)
    score = read_score_settings(model)
    values = _defaults(benchmark) | {f"score.{key}": value for key, value in score.items()}
    values |= _of_file(config)
    if benchmark is not None:
        values |= _of_benchmark(benchmark)
    values |= {"model.path": model, "rollout.engine": "hf"}
    layers: dict[str, Any] = {}
    # Whole sections first: an empty one in the file leaves the defaults of its keys alone.
    for key, value in sorted(values.items(), key=lambda item: "." in item[0]):
        section, _, name = key.rpartition(".")
        (_section(layers, section) if section else layers)[name] = value
    for override in overrides:
        apply_override(layers, override)
    _neutralize(layers, typed=_typed_keys(overrides))
    return parse_config(layers, source=str(config or "options"))


def refuse_overrides(overrides: Sequence[str], advice: Mapping[str, str]) -> None:
    """Raise a ConfigError for an override that would have no effect, with what to use instead."""
    for key in _typed_keys(overrides):
        if key in advice:
            raise ConfigError(f"{key} has no effect here; {advice[key]}")


def score_of(config: Config, *, may_measure: bool = True) -> Score:
    """The score that the options and the model's own file ask for.

    Raises:
        ConfigError: nobody said c_ref; "auto" will do only where it `may_measure`.
    """
    score = config.score
    if "ref_logprob" not in score.model_fields_set:
        measure = ", or --ref-logprob auto if this model never trained a score"
        raise ConfigError(
            "a score needs c_ref, the log-prob that the untrained model gave its token: pass "
            "--ref-logprob (`laser-fast calibrate` measures it on the base model)"
            f"{measure if may_measure else ''}"
        )
    if score.ref_logprob == "auto" and not may_measure:
        raise ConfigError("--ref-logprob auto: pairs of unknown origin cannot measure c_ref")
    return Score(token=score.token, beta=score.beta, ref_logprob=score.ref_logprob)


def write_score_settings(
    folder: str | Path, *, token: str, beta: float, ref_logprob: float
) -> None:
    """Write laser_fast.json into a model folder."""
    score = {"token": token, "beta": float(beta), "ref_logprob": float(ref_logprob)}
    replace_text(Path(folder) / _SCORE_FILE, to_text({"score": score}))


def read_score_settings(model: str | Path) -> dict[str, Any]:
    """Return `token`, `beta` and `ref_logprob` of a model folder; empty where it has no such file.

    Raises:
        ConfigError: a file that is not what `write_score_settings` writes.
    """
    path = Path(model) / _SCORE_FILE
    if not path.is_file():
        return {}
    try:
        score = json.loads(path.read_text(encoding="utf-8"))["score"]
        return {key: kind(score[key]) for key, kind in _SCORE_KEYS.items()}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{path}: expected a score with token, beta and ref_logprob; restore the file, or "
            "remove it and give the three yourself"
        ) from None


def _defaults(benchmark: Benchmark | None) -> dict[str, Any]:
    values = {
        "output_dir": "",
        "data.train": "none",
        "data.max_prompt_tokens": MAX_PROMPT_TOKENS,
        "rollout.max_new_tokens": MAX_NEW_TOKENS,
        "optim.steps": 1,
    }
    if benchmark == SANDBOX:
        values |= {"data.template": "{prompt}", "data.max_prompt_tokens": 24}
        values |= {"data.prompt_suffix": "", "rollout.max_new_tokens": 48}
    elif benchmark is not None:
        values["data.prompt_suffix"] = PROMPT_SUFFIX
    return values


def _of_file(path: Path | None) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in ({} if path is None else read_toml(path)).items():
        if isinstance(value, dict) and value:
            values |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            values[name] = value
    if values.get("score.ref_logprob") == "auto":
        # It was measured in training, and the exported model knows it.
        del values["score.ref_logprob"]
    return values


def _of_benchmark(benchmark: Benchmark) -> dict[str, Any]:
    values = {
        "data.train": benchmark.source,
        "data.eval": benchmark.source,
        "data.prompt_field": benchmark.prompt_field,
        "data.answer_field": benchmark.answer_field,
        "data.train_split": benchmark.split,
        "data.eval_split": benchmark.split,
        "reward.kind": benchmark.reward_kind,
    }
    values = {key: value for key, value in values.items() if value}
    if benchmark.prompt_field:
        # Fields of the file's own evaluation set; empty ones follow prompt_field and answer_field.
        values |= {"data.eval_prompt_field": "", "data.eval_answer_field": ""}
    return values


def _typed_keys(overrides: Sequence[str]) -> set[str]:
    return {override.partition("=")[0] for override in overrides}


def _neutralize(layers: dict[str, Any], *, typed: Set[str]) -> None:
    """Let nothing that only training reads stand in the way of a measurement."""
    data, rollout, optim = (_section(layers, name) for name in ("data", "rollout", "optim"))
    _section(layers, "score")["loss_coef"] = _section(layers, "advantage")["score_coef"] = 0.0
    if rollout.get("score") == "off":
        if "rollout.score" in typed:
            raise ConfigError(
                "rollout.score=off has no effect here; scores are read unless eval gets --no-score"
            )
        rollout["score"] = "auto"  # scores come from generation here
    if rollout["engine"] == "hf" and "rollout.tensor_parallel" not in typed:
        rollout["tensor_parallel"] = 1
    # Wrong types are left to the validation, which names them.
    lengths = (data.get("max_prompt_tokens"), rollout.get("max_new_tokens"))
    budget = optim.get("tokens_per_microbatch", 16384)
    if all(isinstance(number, int) for number in (*lengths, budget)):
        optim["tokens_per_microbatch"] = max(budget, sum(lengths) + 1)


def _section(layers: dict[str, Any], name: str) -> dict[str, Any]:
    section = layers.setdefault(name, {})
    if not isinstance(section, dict):
        raise ConfigError(f'"{name}" is a section, not a value; set its keys, {name}.key=value')
    return section


def _refuse_run_folder(model: str) -> None:
    folder = Path(model)
    if (folder / "config.toml").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"{model} is the folder of a run, not a model; write its model with `laser-fast export "
            f"{model} OUT` and measure OUT with --config {folder / 'config.toml'}"
        )
