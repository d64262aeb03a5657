"""Layers of a measurement's configuration, and what is refused."""

import json

import pytest

from laser_fast.algorithm.vote import Calibrated
from laser_fast.config import ConfigError, ScoreConfig
from laser_fast.evaluation import calibrate, evaluate, score_pairs
from laser_fast.evaluation.benchmarks import PROMPT_SUFFIX, find_benchmark
from laser_fast.evaluation.settings import (
    NOT_SCORED,
    build_config,
    known_ref_logprob,
    read_calibrated,
    read_score_settings,
    store_calibrated,
    write_score_settings,
)
from laser_fast.evaluation.statistics import ReportOptions


def build(benchmark=None, *overrides, model="owner/model", config=None):
    return build_config(model, benchmark, config=config, overrides=overrides)


def test_defaults_are_the_papers_protocol():
    config = build(find_benchmark("aime24"))
    assert (config.rollout.temperature, config.rollout.max_new_tokens) == (1.0, 8192)
    assert config.data.prompt_suffix == PROMPT_SUFFIX
    assert config.data.eval_split == "train" and config.data.max_prompt_tokens == 2048


def test_later_layers_win(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        '[data]\ntrain = "mine.jsonl"\nprompt_field = "q"\nprompt_suffix = " Go."\n'
        'eval_prompt_field = "task"\neval_answer_field = "key"\ntemplate = "{prompt}!"\n'
        '[reward]\nkind = "exact"\n[rollout]\nengine = "vllm"\n'
        'score = "off"\n[score]\nbeta = 0.2\nref_logprob = "auto"\n'
    )
    config = build(find_benchmark("gsm8k"), config=file)
    # Wording is the run's; source, fields and grading are the benchmark's.
    assert config.data.prompt_suffix == " Go." and config.data.template == "{prompt}!"
    assert config.data.prompt_field == "question" and config.reward.kind == "gsm8k"
    assert config.rollout.engine == "hf" and config.rollout.score == "auto"
    # The benchmark's fields also replace those of the run's own evaluation set.
    own = build(find_benchmark("x/y"), config=file)
    assert (own.data.prompt_field, own.data.answer_field) == ("task", "key")
    assert own.reward.kind == "exact"
    typed = build(find_benchmark("x/y"), "data.prompt_field=p", config=file)
    assert (typed.data.prompt_field, typed.data.answer_field) == ("p", "key")
    like_training = build_config("m", find_benchmark("x/y"), config=file, is_calibration=True)
    assert (like_training.data.prompt_field, like_training.data.answer_field) == ("q", "auto")
    typed = ["score.beta=0.3", "data.prompt_field=p", "reward.kind=math"]
    changed = build(find_benchmark("gsm8k"), *typed, config=file)
    assert changed.score.beta == 0.3
    assert changed.data.prompt_field == "p" and changed.reward.kind == "math"


@pytest.mark.parametrize(
    ("override", "advice"),
    [
        ("data.eval_limit=3", "eval --limit"),
        ("data.eval_samples=2", "eval --samples"),
        ("rollout.score=off", "eval gets --no-score"),
        ("score.loss_coef=0.1", "only training"),
        ("advantage.score_coef=0.1", "only training"),
        ("output_dir=runs", "only training"),
        ("reward.extra={}", "only training"),
        ("rollout.group_size=4", "--samples"),
        ("data.train_split=test", "data.eval_split"),
        ("data.eval_prompt_field=q", "data.prompt_field"),
    ],
)
def test_overrides_without_effect_are_refused(override, advice, tmp_path):
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"{key}.* has no effect here; .*{advice}"):
        build(None, override)
    # A run's file may hold it.
    value = override.partition("=")[2]
    line = override if value[0].isdigit() else f'{key}="{value}"'
    (tmp_path / "run.toml").write_text(f"{line}\n")
    build(config=tmp_path / "run.toml")


def test_adapters_of_a_run_are_merged_in_what_is_measured(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[model]\nlora_rank = 4\nlora_4bit = true\ncompile = true\n")
    model = build(config=file).model
    assert (model.lora_rank, model.lora_4bit, model.compile) == (0, False, True)
    base = build_config("base", config=file, is_calibration=True).model
    assert base.lora_4bit  # whose c_ref is that of the weights that are trained
    assert build(None, "model.lora_rank=2", config=file).model.lora_rank == 2


def test_sections_as_overrides_are_read_key_by_key():
    config = build(None, "data={template = '{prompt}', prompt_suffix = '!'}", "rollout={}")
    assert (config.data.template, config.data.prompt_suffix) == ("{prompt}", "!")
    with pytest.raises(ConfigError, match="rollout.group_size has no effect here"):
        build(None, "rollout={group_size = 2}")


def test_ways_to_read_a_score_may_be_typed():
    config = build(None, "rollout.engine=vllm", "rollout.score=inline")
    assert config.rollout.score == "inline"
    with pytest.raises(ConfigError, match="'auto', 'inline' or 'off', got 'request'"):
        build(None, "rollout.engine=vllm", "rollout.score=request")


def test_an_empty_section_keeps_the_defaults(tmp_path):
    (tmp_path / "run.toml").write_text("[optim]\n[data]\n")
    assert build(config=tmp_path / "run.toml") == build()


def test_tensor_parallel_is_a_runs_or_typed(tmp_path):
    (tmp_path / "run.toml").write_text('[rollout]\nengine = "vllm"\ntensor_parallel = 2\n')
    file = tmp_path / "run.toml"
    assert build(config=file).rollout.tensor_parallel == 1
    assert build(None, "rollout.engine=vllm", config=file).rollout.tensor_parallel == 2
    with pytest.raises(ConfigError, match="tensor_parallel = 2"):
        build(None, "rollout.tensor_parallel=2")


def test_the_sandbox_brings_its_wording():
    config = build(find_benchmark("sandbox"))
    assert config.data.template == "{prompt}" and config.data.prompt_suffix == ""
    assert (config.data.max_prompt_tokens, config.rollout.max_new_tokens) == (24, 48)
    assert config.reward.kind == "sandbox"


def test_an_exported_model_knows_its_score(tmp_path):
    trained = ScoreConfig(token="<z>", position="last", beta=0.15, ref_logprob=-11.5)
    write_score_settings(tmp_path, trained)
    score = build(model=str(tmp_path)).score
    assert known_ref_logprob(score) == -11.5
    assert score == trained
    # These words in a run's file mean that training measured it: the exported number stands.
    file = tmp_path / "run.toml"
    for word in ("auto", "floating"):
        file.write_text(f'[score]\nref_logprob = "{word}"\nbeta = 0.2\n')
        score = build(model=str(tmp_path), config=file).score
        assert (score.beta, score.ref_logprob) == (0.2, -11.5)


def test_a_model_of_an_older_version_was_read_at_the_eos(tmp_path):
    settings = {"score": {"token": "<z>", "beta": 0.15, "ref_logprob": -11.5}}
    (tmp_path / "laser_fast.json").write_text(json.dumps(settings))
    assert build(model=str(tmp_path)).score.position == "eos"


@pytest.mark.parametrize(
    "key", ["rollout.temperature=0.3", "reward.kind=math", "rollout.score=off", "data.eval_split=x"]
)
def test_given_answers_are_neither_sampled_nor_graded(key):
    with pytest.raises(ConfigError, match="has no effect here; given answers are neither"):
        build_config("m", overrides=[key], unread=NOT_SCORED)
    build_config("m", overrides=["rollout.timeout_s=60"], unread=NOT_SCORED)


def test_a_file_of_another_engine_scores_given_answers(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[rollout]\nengine = "vllm"\nseeded = false\ntensor_parallel = 2\n')
    assert build_config("m", config=file, unread=NOT_SCORED).rollout.seeded
    with pytest.raises(ConfigError, match="rollout.seeded = False is for vLLM"):
        build_config("m", overrides=["rollout.seeded=false"])


def test_only_training_moves_c_ref():
    score = build(None, "score.ref_logprob=floating").score
    with pytest.raises(ConfigError, match="only training moves c_ref"):
        known_ref_logprob(score)


def test_c_ref_must_be_known_or_asked_for():
    with pytest.raises(ConfigError, match="needs c_ref.*calibrate.*--ref-logprob auto"):
        known_ref_logprob(build().score)
    with pytest.raises(ConfigError, match=r"on the base model\)$"):
        known_ref_logprob(build().score, may_measure=False)
    for given in ("score.ref_logprob=auto", 'score.ref_logprob="auto"'):
        assert known_ref_logprob(build(None, given).score) == "auto"
    assert known_ref_logprob(build(None, "score.ref_logprob=-23.1").score) == -23.1
    with pytest.raises(ConfigError, match="expected a number or 'auto' or 'floating', got 'x'"):
        build(None, "score.ref_logprob=x")
    with pytest.raises(ConfigError, match="expected a number less than or equal to 0 or 'auto'"):
        build(None, "score.ref_logprob=23")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"score": {"token": "<z>"}}', '{"score": 3}'])
def test_a_broken_score_file_is_refused(tmp_path, text):
    (tmp_path / "laser_fast.json").write_text(text)
    with pytest.raises(ConfigError, match="expected a score with token, beta and ref_logprob"):
        read_score_settings(tmp_path)


def test_how_a_score_is_read_stands_beside_it(tmp_path):
    found = Calibrated(threshold=0.6, base_rate=0.7, num_wrong=3.5)
    score = {"token": None, "position": "last", "beta": 0.15, "ref_logprob": -11.5}
    assert read_calibrated(tmp_path, score) is None
    with pytest.raises(
        ConfigError, match="its laser_fast.json says nothing, these scores have {'t"
    ):
        store_calibrated(tmp_path, score, found, "train")
    own = ScoreConfig(token="<z>", position="last", beta=0.15, ref_logprob=-11.5)
    write_score_settings(tmp_path, own)
    assert read_calibrated(tmp_path, score) is None
    store_calibrated(tmp_path, score, found, "train")
    known = {"threshold": 0.6, "base_rate": 0.7, "num_wrong": 3.5}
    assert read_calibrated(tmp_path, score) == known | {"by": "train"}
    assert read_score_settings(tmp_path) == score | {"token": "<z>"}
    moved = score | {"ref_logprob": -11.0}
    for other in (moved, score | {"position": "eos"}, {"beta": 0.15, "ref_logprob": -11.5}):
        assert read_calibrated(tmp_path, other) is None
    with pytest.raises(ConfigError, match="its laser_fast.json says"):
        store_calibrated(tmp_path, moved, found, "train")
    file = tmp_path / "laser_fast.json"
    file.write_text(file.read_text().replace("base_rate", "rate"))
    with pytest.raises(ConfigError, match='threshold, base_rate, num_wrong, by under "calibrated"'):
        read_calibrated(tmp_path, score)


def test_run_folders_unknown_keys_and_values_in_place_of_sections(tmp_path):
    with pytest.raises(ConfigError, match='unknown key "rollout.temprature"'):
        build(None, "rollout.temprature=0.6")
    with pytest.raises(ConfigError, match='"data" is a section'):
        build(None, "data=3")
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        build(config=tmp_path / "none.toml")
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(ConfigError, match="is the folder of a run.*laser-fast export"):
        build(model=str(tmp_path))


@pytest.mark.parametrize("module", [calibrate, evaluate, score_pairs])
def test_ranks_wait_for_one_another_as_long_as_in_training(module, tmp_path, monkeypatch):
    waits = []

    def open_world(timeout_s=None):
        waits.append(timeout_s)
        raise InterruptedError

    monkeypatch.setattr(module, "open_world", open_world)
    benchmark = find_benchmark("x/y")
    config = build(benchmark, "rollout.timeout_s=7.5", "score.ref_logprob=-9")
    pairs, out = tmp_path / "in.jsonl", tmp_path / "out"
    pairs.touch()
    with pytest.raises(InterruptedError):
        if module is calibrate:
            calibrate.calibrate(config, benchmark)
        elif module is evaluate:
            evaluate.run_evaluation([(benchmark, config)], out, ReportOptions())
        else:
            score_pairs.score_pairs(config, pairs, out)
    assert waits == [7.5]
