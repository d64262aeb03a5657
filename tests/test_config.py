"""Configuration: what is refused and in which words, overrides, round trip, a reader per key."""

import copy
import sys
import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from laser_fast import cli
from laser_fast.config import Config, ConfigError, DataConfig, all_keys, dump_config, load_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
SMALLEST = {
    "output_dir": "runs/a",
    "model": {"path": "m"},
    "data": {"train": "t.jsonl"},
    "optim": {"steps": 1},
}


def smallest(**keys):
    """The smallest valid configuration, with dotted keys set ("a__b" for a.b)."""
    data = copy.deepcopy(SMALLEST)
    for key, value in keys.items():
        *sections, last = key.split("__")
        section = data
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    return data


def refusal(data):
    """The message of a refused configuration, which is one sentence opened by the source."""
    with pytest.raises(ConfigError) as caught:
        Config.parse(data, source="run.toml")
    source, _, message = str(caught.value).partition(": ")
    assert source == "run.toml"
    assert "\n" not in message and not message.endswith(".")
    assert ". " not in message.replace("...", "")
    return message


def write(folder, text):
    path = folder / "run.toml"
    path.write_text(text)
    return path


@pytest.fixture
def path(tmp_path):
    return write(
        tmp_path,
        'output_dir = "o"\nmodel.path = "m"\ndata.train = "t"\n[optim]\nsteps = 2\nlr = 1e-5\n',
    )


def test_frozen():
    config = Config.parse(smallest(), source="")
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.lr = 1.0
    with pytest.raises(TypeError):
        config.optim.betas[0] = 0.5


# Refusals.


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        # A slip in the section's own names, a name of another section, a key without its section.
        (
            {"rollout__group_sise": 4},
            'unknown key "rollout.group_sise": rename it to "rollout.group_size" or remove it',
        ),
        ({"optim__learning_rte": 1.0}, None),
        ({"loss__beta": 0.1}, 'unknown key "loss.beta": rename it to "score.beta" or remove it'),
        (
            {"advantage__warmup_steps": 1},
            'unknown key "advantage.warmup_steps": rename it to "advantage.score_warmup_steps" or '
            "remove it",
        ),
        (
            {"group_size": 4},
            'unknown key "group_size": rename it to "rollout.group_size" or remove it',
        ),
        ({"sed": 4}, 'unknown key "sed": rename it to "seed" or remove it'),
        (
            {"rollout__top_p": 0.9},
            '"rollout.top_p" is refused: training samples the whole distribution, whose log-probs',
        ),
        # No name is near: those that there are.
        (
            {"checkpoint__qqq": 1},
            'unknown key "checkpoint.qqq": remove it or choose one of these, nearest first: '
            "checkpoint.every, checkpoint.keep",
        ),
        ({"rolout": {"score": "off"}}, "unknown section [rolout]: rename it to [rollout] or"),
        (
            {"zzz": {"a": 1}},
            "unknown section [zzz]: remove it; the sections are model, data, rollout, reward,",
        ),
    ],
)
def test_unknown_key_names_the_nearest(keys, message):
    said = refusal(smallest(**keys))
    if message is None:
        assert said.startswith('unknown key "optim.learning_rte": remove it or choose one of these')
        assert "optim.lr" in said and "optim.steps" in said
    else:
        assert said.startswith(message)


def test_misspelt_required_key_is_named_before_the_missing_one():
    data = smallest()
    data["optim"] = {"step": 5}
    assert refusal(data) == 'unknown key "optim.step": rename it to "optim.steps" or remove it'


def test_missing_keys_and_sections():
    data = smallest()
    del data["model"]["path"]
    assert refusal(data).startswith('"model.path" is missing; set it (Hugging Face id or folder')
    del data["model"]
    assert refusal(data) == "the section [model] is missing; add it"
    data = smallest()
    del data["output_dir"]
    assert refusal(data).startswith('"output_dir" is missing; set it (The run folder')


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"optim__lr": "1e-3"}, "\"optim.lr\": expected a number, got '1e-3' (Peak learning rate"),
        ({"optim__lr": True}, '"optim.lr": expected a number, got True ('),
        ({"optim__lr": float("nan")}, '"optim.lr": expected a finite number, got nan ('),
        ({"optim__lr": -1.0}, '"optim.lr": expected a number greater than 0, got -1.0 ('),
        ({"optim__steps": 2.0}, '"optim.steps": expected an integer, got 2.0 ('),
        ({"optim__steps": "2"}, "\"optim.steps\": expected an integer, got '2' ("),
        ({"seed": -1}, '"seed": expected a number greater than or equal to 0, got -1 ('),
        ({"model__compile": 1}, '"model.compile": expected a boolean, got 1 ('),
        ({"log__wandb": True}, '"log.wandb": expected a string, got True (Weights'),
        ({"rollout__group_size": 1}, '"rollout.group_size": expected a number greater than or eq'),
        (
            {"rollout__engine": "sglang"},
            "\"rollout.engine\": expected 'hf', 'vllm' or 'vllm_server', got 'sglang' (",
        ),
        (
            {"score__ref_logprob": "measure"},
            "\"score.ref_logprob\": expected a number or 'auto' or 'floating', got 'measure' (",
        ),
        ({"optim__betas": 0.9}, '"optim.betas": expected a list, got 0.9 ('),
        ({"optim__betas": [0.9]}, '"optim.betas": expected one more value, got [0.9] ('),
        ({"optim__betas": [0.9, "x"]}, "\"optim.betas\": expected a number, got 'x' ("),
        ({"optim__betas": [0.9, 1.0]}, '"optim.betas": expected a number less than 1, got 1.0 ('),
        ({"model__path": ""}, "\"model.path\": expected at least 1 character, got '' ("),
        ({"data__train": {"a": "b"}}, "\"data.train\": expected a number for 'a', got 'b'"),
        ({"model": "m"}, "\"model\" is a section, got 'm'; set its keys instead, such as model.pa"),
        ({"score__token": ["x" * 90]}, '"score.token": expected a string, got [\'xxxxxxx'),
    ],
)
def test_wrong_type_names_path_expected_and_got(keys, message):
    said = refusal(smallest(**keys))
    assert said.startswith(message)
    assert len(said) < 260


def test_every_section_is_strict():
    for key in all_keys(Config):
        if "." in key and key != "data.chat_template_kwargs":  # which holds what a template names
            assert f'"{key}"' in refusal(smallest(**{key.replace(".", "__"): {"not": "this"}}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"optim__tokens_per_microbatch": 2000},
            "optim.tokens_per_microbatch = 2000 is less than data.max_prompt_tokens + "
            "rollout.max_new_tokens = 2048; raise it to that",
        ),
        ({"score__loss_coef": 0.0}, "advantage.score_coef > 0 mixes in a score that"),
        (
            {"score__ref_logprob": -10.5},
            "score.beta = 0.1: the target log-prob of a correct answer, ref_logprob + 1/beta = "
            "-10.5 + 1/0.1 = -0.5, must stay well below 0; choose beta >= 0.134",
        ),
        ({"rollout__seeded": False}, "rollout.seeded = False is for vLLM, and rollout.engine is"),
        ({"loss__clip_dual": 0.5}, "loss.clip_dual = 0.5 would cut the gradient"),
        ({"loss__clip_dual": 1.0}, "loss.clip_dual = 1 would cut the gradient"),
        *(
            (
                {"rollout__engine": "vllm_server", "rollout__server_url": url},
                f'rollout.server_url: engine "vllm_server" needs http://HOST:PORT, got "{url}"',
            )
            for url in ("", "localhost:8000", "ftp://h")
        ),
        (
            {"rollout__tensor_parallel": 2},
            'rollout.tensor_parallel = 2 splits only the engine "vllm", and rollout.engine is "hf"'
            "; set it to 1",
        ),
        ({"data__eval_every": 5}, "data.eval_every = 5 has nothing to evaluate; name held-out"),
        ({"data__template": "Q:"}, "data.template = 'Q:' has no place for the question; put {pr"),
        (
            {"data__template": "Q: {prompt}", "data__chat_template_kwargs": {"thinking": False}},
            'data.chat_template_kwargs are read by data.template = "chat" only; remove them',
        ),
        (
            {"reward__overlong": "penalty"},
            'reward.overlong = "penalty" needs overlong_buffer from 1 to '
            "rollout.max_new_tokens = 1024, got 0",
        ),
        (
            {"reward__overlong": "penalty", "reward__overlong_buffer": 1025},
            'reward.overlong = "penalty" needs',
        ),
        (
            {"optim__minibatches": 129},
            "optim.minibatches = 129 exceeds data.prompts_per_step = 128",
        ),
        ({"optim__warmup_steps": 2}, "optim.warmup_steps = 2 exceeds optim.steps = 1; lower it"),
    ],
)
def test_impossible_combinations(keys, message):
    assert refusal(smallest(**keys)).startswith(message)


@pytest.mark.parametrize(
    "keys",
    [
        {"optim__tokens_per_microbatch": 2048},
        {"score__loss_coef": 0.0, "advantage__score_coef": 0.0, "score__ref_logprob": -1.0},
        {"score__ref_logprob": -13.0},
        {"loss__clip_dual": 1.5},
        {"loss__clip_dual": 0.0},
        {"rollout__engine": "vllm_server", "rollout__server_url": "http://h:8000"},
        {"rollout__tensor_parallel": 2, "rollout__engine": "vllm"},
        {"data__eval_every": 5, "data__eval": "e.jsonl"},
        {"data__template": "Q: {prompt}"},
        {"reward__overlong": "penalty", "reward__overlong_buffer": 1024},
        {"optim__minibatches": 128},
        {"optim__warmup_steps": 1},
        {"optim__betas": [0.0, 0.5]},
        {"optim__lr": 1},
    ],
)
def test_combinations_at_the_edge_are_possible(keys):
    Config.parse(smallest(**keys), source="")


def test_a_measured_target_is_checked_like_a_configured_one():
    score = Config.parse(smallest(), source="").score
    score.check_target(-13.0)
    with pytest.raises(ConfigError, match="score.beta = 0.1: the target .* choose beta >= 0.134"):
        score.check_target(-10.5)
    # A score that is not trained may have any target.
    keys = {"score__loss_coef": 0.0, "advantage__score_coef": 0.0}
    Config.parse(smallest(**keys), source="").score.check_target(-10.5)


def test_target_near_zero_warns():
    with pytest.warns(UserWarning, match="must stay well below 0"):
        Config.parse(smallest(score__ref_logprob=-12.0), source="")


# Files and overrides.


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optim.lr=2e-6", "optim.lr", 2e-6),
        ("seed=7", "seed", 7),
        ("output_dir=runs/b", "output_dir", "runs/b"),
        ("model.path=Qwen/Qwen2.5-7B", "model.path", "Qwen/Qwen2.5-7B"),
        ('model.path="8"', "model.path", "8"),
        ("score.token=<|vision_start|>", "score.token", "<|vision_start|>"),
        ("data.template=Q: {prompt}=", "data.template", "Q: {prompt}="),
        ("data.prompt_suffix=", "data.prompt_suffix", ""),
        ("log.tensorboard=false", "log.tensorboard", False),
        ("optim.betas=[0.8, 0.9]", "optim.betas", (0.8, 0.9)),
        ("score.ref_logprob=-23", "score.ref_logprob", -23.0),
        ("score.ref_logprob=auto", "score.ref_logprob", "auto"),
        ("rollout={group_size = 2, max_new_tokens = 9}", "rollout.max_new_tokens", 9),
    ],
)
def test_override(path, override, key, value):
    config = load_config(path, [override])
    for name in key.split("."):
        config = getattr(config, name)
    assert config == value and type(config) is type(value)


def test_overrides_leave_the_rest_and_the_last_one_wins(path):
    config = load_config(path, ["optim.steps=3", "optim.steps=4"])
    assert (config.optim.steps, config.optim.lr) == (4, 1e-5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr", r'override "optim.lr": expected section.key=value'),
        ("=3", r'override "=3": expected section.key=value'),
        ("optim.lr.x=3", r"optim.lr is a value, not a section; write optim.lr=value"),
        ("optim.lrr=3", r'run.toml: unknown key "optim.lrr": rename it to "optim.lr"'),
        ("optim=3", r'"optim" is a section, got 3; set its keys instead, such as optim.tok'),
        ("seed=abc", r""""seed": expected an integer, got 'abc'"""),
        ("log.wandb=true", r'"log.wandb": expected a string, got True'),
    ],
)
def test_bad_override(path, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(path, [override])


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="none.toml: cannot read the configuration: No such file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot read the configuration: Is a directory"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match=r"run.toml: not valid TOML: .*line 2"):
        load_config(write(tmp_path, "seed = 1\nnot toml"))
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="bytes.toml: not valid TOML"):
        load_config(tmp_path / "bytes.toml")


def test_dump_and_load_round_trip(tmp_path):
    config = Config.parse(
        smallest(
            data__template='Q: {prompt}\n"A" \\boxed{}: \t',
            optim__betas=[0.8, 0.95],
            score__ref_logprob=-23.5,
            optim__lr=1e-7,
            log__tensorboard=False,
        ),
        source="",
    )
    text = dump_config(config)
    assert load_config(write(tmp_path, text)) == config
    # Every key is written, defaults too, but for those that are left out to mean those of training.
    sections, unset = (
        tomllib.loads(text),
        {"rollout.eval_temperature", "rollout.eval_max_new_tokens"},
    )
    for key in all_keys(Config).keys() - unset:
        section, _, name = key.rpartition(".")
        assert name in (sections[section] if section else sections), key


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_validate_and_open_with_their_purpose(path):
    load_config(path)
    first, second = path.read_text().splitlines()[:2]
    assert first.startswith("# ") and f"configs/{path.name}" in second


# The command line.


def test_print_config_shows_the_resolved_toml(path, tmp_path, monkeypatch, capsys):
    arguments = ["laser-fast", "train", str(path), "seed=5", "--print-config"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code in (0, None)
    shown = capsys.readouterr().out
    assert load_config(write(tmp_path, shown)) == load_config(path, ["seed=5"])


def test_a_mistake_is_one_line_and_exit_code_2(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["laser-fast", "train", str(path), "optim.lrr=1"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error == (
        f'error: {path}: unknown key "optim.lrr": rename it to "optim.lr" or remove it\n'
    )


def test_parts_of_the_configuration_check_themselves():
    with pytest.raises(ValidationError, match="max_prompt_tokens"):
        DataConfig(train="t", max_prompt_tokens=0)


def test_a_path_may_begin_at_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths = {"path": "~/model"}, {"train": "~/a.jsonl", "eval": "~/b.jsonl"}
    sections = {"output_dir": "~/run", "model": paths[0], "data": paths[1], "optim": {"steps": 1}}
    config = Config.parse(sections, source="test")
    assert (config.output_dir, config.model.path) == ("/home/me/run", "/home/me/model")
    assert (config.data.train, config.data.eval) == ("/home/me/a.jsonl", "/home/me/b.jsonl")
