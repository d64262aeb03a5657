"""The configuration of a measurement, in layers; later ones win.

    defaults of the paper's protocol, laser_fast.json of the model
    --config, such as the config.toml of a training run, without what only training reads
    wording, fields, split and reward of a named benchmark
    options of the command line, which are section.key=value overrides as well

laser_fast.json lies beside a model's weights and holds the score that it was trained to give: a
score means something only with the token, beta and c_ref of its training. `rescore --store` adds
how that score is read: `calibrated`, a `Calibrated` and `by`, the name of the benchmark that chose
it, whose problems are therefore never read by it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from laser_fast.algorithm.vote import Calibrated
from laser_fast.config import Config, MeasureConfig, RewardConfig, ScoreConfig, all_keys
from laser_fast.config_errors import ConfigError, apply_override, read_toml, reading
from laser_fast.evaluation.benchmarks import Benchmark
from laser_fast.log.jsonl import read_json, replace_text, to_text

# What a configuration file may change of a benchmark, and what belongs to its rows.
_PROTOCOL = "data.template data.prompt_suffix data.max_prompt_tokens rollout.max_new_tokens".split()
_ROWS = ("data.eval_split", "data.prompt_field", "data.answer_field", "reward.kind")
_SCORE_FILE = "laser_fast.json"
_SCORE_KEYS = {"token": str, "position": str, "beta": float, "ref_logprob": float}
# Keys of the sections that measuring shares with training, which only training reads.
_UNREAD = """
    model.router_aux_loss_coef rollout.resample_rounds rollout.steps_ahead
    reward.extra reward.overlong reward.overlong_buffer
    score.loss_coef score.warmup_steps score.max_class_weight score.max_grad_ratio
"""
_INSTEAD = {
    **dict.fromkeys(("data.train", "data.eval"), "the problems have an option of their own"),
    "data.train_split": "say data.eval_split",
    "data.eval_prompt_field": "say data.prompt_field",
    "data.eval_answer_field": "say data.answer_field",
    "data.eval_limit": "that is eval --limit",
    "data.eval_samples": "that is eval --samples",
    "rollout.group_size": "that is --samples",
    "rollout.score=off": "scores are read unless eval gets --no-score",
}
# Every key that no measurement reads, and what to use instead.
_UNREAD_KEYS = {*_UNREAD.split(), *all_keys(Config).keys() - all_keys(MeasureConfig).keys()}
_NOT_MEASURED = dict.fromkeys(_UNREAD_KEYS, "only training reads it") | _INSTEAD
_NOT_CALIBRATED = {
    "score.token": "say --token",
    "score.beta": "say --beta",
    "score.ref_logprob": "it is what calibrate measures",
    **{f"reward.{key}": "calibrate grades nothing" for key in RewardConfig.model_fields},
    "data.prompts_per_step": "say --limit",
    **{
        f"rollout.eval_{key}": "c_ref is measured as training samples, see the keys without eval_"
        for key in ("temperature", "max_new_tokens", "top_p", "top_k", "min_p")
    },
}
_SCORED = "data.template data.prompt_suffix data.chat_template_kwargs rollout.timeout_s".split()
NOT_SCORED = {
    key: "given answers are neither sampled nor graded"
    for key in all_keys(Config)
    if key.startswith(("data.", "rollout.", "reward.")) and key not in _SCORED
}


def build_config(
    model: str,
    benchmark: Benchmark | None = None,
    *,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    unread: Mapping[str, str] = {},
    is_calibration: bool = False,
) -> MeasureConfig:
    """The configuration of one benchmark's measurement, sampled by the hf engine by default.

    A calibration reads the fields of the file's training set, others those of its evaluation set.
    An override of a key that is `unread` is refused with what is said of it.
    """
    folder = Path(model)
    if (folder / "config.toml").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"{model} is the folder of a run, not a model; write its model with `laser-fast export "
            f"{model} OUT` and measure OUT with --config {folder / 'config.toml'}"
        )
    typed: dict[str, Any] = {}
    for override in overrides:
        apply_override(typed, override)
    options = dotted_keys(typed)
    advice = {**_NOT_MEASURED, **(_NOT_CALIBRATED if is_calibration else unread)}
    for key, value in options.items():
        for given in (key, f"{key}={value}"):
            if given in advice:
                raise ConfigError(f"{given} has no effect here; {advice[given]}")
    fields = {} if benchmark is None else asdict(benchmark)
    values = {key: fields[key.partition(".")[2]] for key in _PROTOCOL if fields}
    values |= {f"score.{key}": value for key, value in read_score_settings(model).items()}
    values |= _of_file(config, is_calibration)
    values |= {key: value for key in _ROWS if (value := fields.get(key.partition(".")[2]))}
    values |= {"model.path": model} | options
    for key in ("temperature", "max_new_tokens"):  # what is typed wins against the file's
        if f"rollout.{key}" in options and f"rollout.eval_{key}" not in options:
            values.pop(f"rollout.eval_{key}", None)
    if values.get("rollout.engine", "hf") == "hf":  # while the file's run had another
        for key in {"rollout.tensor_parallel", "rollout.seeded"} - options.keys():
            values.pop(key, None)
    layers: dict[str, Any] = {}
    # Whole sections last: a value in place of one must reach the validation, which names it.
    for key, value in sorted(values.items(), key=lambda item: "." not in item[0]):
        section, _, name = key.rpartition(".")
        (layers.setdefault(section, {}) if section else layers)[name] = value
    return MeasureConfig.parse(layers, source=str(config or "options"))


def known_ref_logprob(score: ScoreConfig, *, may_measure: bool = True) -> float | Literal["auto"]:
    """The c_ref that the options or the model's own file give; "auto" only if it `may_measure`."""
    if "ref_logprob" not in score.model_fields_set:
        measure = ", or --ref-logprob auto if this model never trained a score"
        raise ConfigError(
            "a score needs c_ref, the log-prob that the untrained model gave its token, and no "
            f"{_SCORE_FILE} beside the model says it: pass --ref-logprob (`laser-fast calibrate` "
            "measures it on the base model)"
            f"{measure if may_measure else ''}"
        )
    if score.ref_logprob == "floating":  # refused as an option, left out of a file
        raise ConfigError("score.ref_logprob = floating: only training moves c_ref; give a number")
    if score.ref_logprob == "auto" and not may_measure:
        raise ConfigError("--ref-logprob auto: given answers cannot measure c_ref; give a number")
    return score.ref_logprob


def write_score_settings(folder: Path, score: ScoreConfig) -> None:
    """Write laser_fast.json into a model folder; c_ref is a number."""
    settings = {key: kind(getattr(score, key)) for key, kind in _SCORE_KEYS.items()}
    replace_text(folder / _SCORE_FILE, to_text({"score": settings}))


def read_score_settings(model: str | Path) -> dict[str, Any]:
    """Token, position, beta and c_ref of a model folder; empty where it has no such file.

    A file without a position is of a version that read all scores at the EOS.
    """
    path = Path(model) / _SCORE_FILE
    if not path.is_file():
        return {}
    with reading(
        f"{path}: expected a score with token, beta and ref_logprob; restore the file, or "
        "remove it and give the three yourself"
    ):
        score = {"position": "eos"} | json.loads(path.read_text(encoding="utf-8"))["score"]
        return {key: kind(score[key]) for key, kind in _SCORE_KEYS.items()}


def store_calibrated(
    model: Path, score: Mapping[str, Any], calibrated: Calibrated, by: str
) -> None:
    """Add what benchmark `by` said of the scores that `score` made to a model's laser_fast.json."""
    known = read_score_settings(model)
    if not _is_same(known, score):
        raise ConfigError(
            f"{model}: its {_SCORE_FILE} says {known or 'nothing'}, these scores have {score}; "
            "name the model that gave them"
        )
    content = {"score": known, "calibrated": {**asdict(calibrated), "by": by}}
    replace_text(model / _SCORE_FILE, to_text(content))


def read_calibrated(model: str | Path, score: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields of a `Calibrated` and `by`; None without any, or where `score` is another."""
    path = Path(model) / _SCORE_FILE
    if not _is_same(read_score_settings(model), score):  # nor has a folder without the file
        return None
    content = read_json(path)
    if "calibrated" not in content:
        return None
    kinds = dict.fromkeys(asdict(Calibrated()), float) | {"by": str}
    with reading(f'{path}: expected {", ".join(kinds)} under "calibrated"'):
        return {key: kind(content["calibrated"][key]) for key, kind in kinds.items()}


def _is_same(known: Mapping[str, Any], score: Mapping[str, Any]) -> bool:
    """Whether two scores have one scale, so that a threshold of one is a threshold of the other."""
    score = {"position": "eos", **score}  # as in a file of an older version
    return all(known.get(key) == score[key] for key in ("position", "beta", "ref_logprob"))


def _of_file(path: Path | None, is_calibration: bool) -> dict[str, Any]:
    """The keys of a file that a measurement reads."""
    values = {} if path is None else dotted_keys(read_toml(path))
    for field in () if is_calibration else ("prompt_field", "answer_field"):
        if own := values.get(f"data.eval_{field}"):
            values[f"data.{field}"] = own
    # A run has an engine of its own, and the c_ref that it measured is in the exported model.
    measured = {f"score.ref_logprob={word}" for word in ("auto", "floating")}
    left_out = _NOT_MEASURED.keys() | measured | {"rollout.engine"}
    if not is_calibration:  # what is measured has the adapters merged, and is in 4 bits no more
        left_out |= {key for key in values if key.startswith("model.lora_")}
    return {k: value for k, value in values.items() if not left_out & {k, f"{k}={value}"}}


def dotted_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of a file or of overrides as dotted keys; one without keys says nothing."""
    values: dict[str, Any] = {}
    for name, section in data.items():
        if isinstance(section, dict) and (section or name in Config.model_fields):
            values |= {f"{name}.{key}": value for key, value in section.items()}
        else:
            values[name] = section
    return values
