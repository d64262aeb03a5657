"""laser-fast init: what it finds out, that plan says it fits, and that its file runs as it is."""

import json
import tomllib
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from small_runs import make_model, read_lines, run_cli
from tiny_models import make_config
from transformers import Qwen2Config

from laser_fast import init
from laser_fast.config import ConfigError, load_config

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
# No prompt of the sandbox says how to answer, and its tokenizer cannot say it.
TINY = ["data.prompt_suffix=", "reward.kind=sandbox", "rollout.max_new_tokens=30"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model that chats, and its problems as verl writes them."""
    folder = make_model(tmp_path_factory.mktemp("init") / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    for split in ("train", "eval"):
        rows = [
            {
                "data_source": "sandbox",
                "prompt": [{"role": "user", "content": row["problem"]}],
                "reward_model": {"style": "rule", "ground_truth": row["answer"]},
                "extra_info": {"index": index},
            }
            for index, row in enumerate(read_lines(folder / f"{split}.jsonl")[:80])
        ]
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
    return folder


@pytest.fixture
def one_core(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)


def _write(model, data, out, *, measures=True, typed=()):
    init.write_config(str(model), str(data), out, (False, 1, 8.0), measures=measures, typed=typed)


def _options(model, out, *more):
    data = ["--data", model / "train.parquet", "--eval", model / "eval.parquet"]
    return ["init", "--model", model, *data, "--output", out, *more]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_its_file_runs_as_it_is(lora, model, one_core, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "mine.toml"
    options = _options(model, out, *["--lora"] * lora, *TINY, "optim.steps=1", "data.eval_limit=2")
    code, err = run_cli(monkeypatch, capsys, *options)
    assert code == 0, err
    assert out.read_text().splitlines()[1].endswith(f"-m laser_fast train {out}")
    code, err = run_cli(monkeypatch, capsys, "train", out)
    assert code == 0, err
    run = tmp_path / "runs" / "mine"
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [0]
    assert json.loads((run / "summary.json").read_text())["steps"] == 1
    assert load_config(run / "config.toml").model.lora_rank == 32 * lora


def test_what_it_finds(model, one_core, tmp_path, monkeypatch, capsys):
    out = tmp_path / "found.toml"
    code, err = run_cli(monkeypatch, capsys, *_options(model, out, *TINY))
    assert code == 0, err
    text, values = out.read_text(), tomllib.loads(out.read_text())
    assert values["data"]["answer_field"] == "reward_model.ground_truth"
    assert values["data"]["template"] == "chat"
    assert values["data"]["max_prompt_tokens"] == 16  # sandbox problems have up to 13 characters
    assert values["data"]["prompts_per_step"] == 8 and values["optim"]["steps"] == 30
    assert values["rollout"] == {"max_new_tokens": 30, "engine": "hf"}
    score = values["score"]
    assert score["token"].startswith("<|reserved_") and score["ref_logprob"] < -3
    assert score["ref_logprob"] + 1 / score["beta"] <= -3 + 1e-3
    assert "# calibrate: " in text and "# typed\nmax_new_tokens = 30" in text
    code, err = run_cli(monkeypatch, capsys, *_options(model, out, *TINY))
    assert code == 2 and "is there already" in err and out.read_text() == text


def test_without_a_measurement_the_run_measures(model, one_core, tmp_path, monkeypatch):
    monkeypatch.setattr(init, "calibrate", lambda *a, **k: pytest.fail("it measured"))
    out, train = tmp_path / "a.toml", str(model / "train.parquet")
    _write(model, train, out, measures=False)
    assert load_config(out).score.ref_logprob == "auto"
    (model / "model.safetensors").rename(tmp_path / "elsewhere")
    try:
        _write(model, train, tmp_path / "b.toml")
    finally:
        (tmp_path / "elsewhere").rename(model / "model.safetensors")
    assert load_config(tmp_path / "b.toml").score == load_config(out).score


def test_gsm8k_and_suffix_by_the_rows(model, one_core, tmp_path):
    def written(name, rows, **options):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        _write(model, data, tmp_path / name, measures=False, **options)
        return load_config(tmp_path / name)

    gsm8k = written("gsm8k", [{"question": "1+1=", "answer": "a\n#### 2"}] * 9)
    assert (gsm8k.data.prompt_field, gsm8k.reward.kind) == ("question", "gsm8k")
    assert gsm8k.data.prompt_suffix == init.PROMPT_SUFFIX
    told = written("told", [{"problem": "1+1 in \\boxed{}", "answer": "2"}] * 9)
    assert (told.data.prompt_suffix, told.reward.kind) == ("", "math")
    where = written(
        "where", [{"problem": "1", "answer": "1", "level": 4}], typed=["data.where.level=[4]"]
    )
    assert where.data.where == {"level": [4]}


def test_held_out_rows_beside_those_of_training_are_found(model, one_core, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    row = json.dumps({"problem": "1+1=", "answer": "2"}) + "\n"
    train, out = folder / "my_train.jsonl", tmp_path / "out"

    def written(data, *typed):
        out.unlink(missing_ok=True)
        _write(model, data, out, measures=False, typed=[*TINY, *typed])
        return load_config(out).data

    train.write_text(row * 9)
    assert written(train).eval == written(folder).eval == ""
    for name in ("val", "test"):  # the latter is preferred
        (folder / f"my_{name}.jsonl").write_text(row)
        assert written(train).eval == str(folder / f"my_{name}.jsonl")
        assert "# found: a file beside my_train.jsonl\neval = " in out.read_text()
        split = "validation" if name == "val" else "test"
        found = written(folder)
        assert (found.eval, found.eval_split) == (str(folder), split)
        assert f'# found: it has a split "{split}"\neval = ' in out.read_text()
        assert found.eval_every == 6 and found.eval_limit == found.prompts_per_step
    assert written(train, "data.eval=").eval == ""
    assert written(folder, f"data.eval={train}").eval == str(train)
    assert written(folder, "data.train_split=test").eval_split == "validation"
    assert written(folder, "data.train_split=test[:1]").eval_split == "validation"
    hidden = json.dumps({"problem": "1+1=", "answer": None}) + "\n"  # as of a contest
    (folder / "my_test.jsonl").write_text(hidden)
    assert written(folder).eval_split == "validation"
    assert written(train).eval == str(folder / "my_val.jsonl")
    for file in folder.iterdir():
        file.write_text(file.read_text().replace("problem", "task"))
    found = written(train, "data.prompt_field=task")
    assert found.eval == str(folder / "my_val.jsonl") and found.eval_prompt_field == ""


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("rollout.max_new_tokens=100000", "= 100017 exceeds the 128 positions of the model"),
        ("data.max_prompt_tokens=2", "no prompt is left"),
        ("data.eval=nope.jsonl", "nope.jsonl: no such data file"),
        ("data.train=nope.jsonl", "nope.jsonl: no such data file"),
    ],
)
def test_what_a_run_would_refuse_is_not_written(typed, said, model, tmp_path):
    data, out = model / "train.parquet", tmp_path / "of mine" / "a.toml"
    with pytest.raises(ConfigError, match=said):
        _write(model, data, out, measures=False, typed=[*TINY, typed])
    assert not out.exists()
    _write(model, data, out, measures=False, typed=TINY)  # into the folder that it makes
    assert load_config(out).output_dir == "runs/a"


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """The configuration of a run of 7B, of which there is a config.json."""
    folder = tmp_path_factory.mktemp("7b")
    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}
    Qwen2Config(**sizes, **heads, tie_word_embeddings=False).save_pretrained(folder)
    return make_config(
        model={"path": str(folder), "attention": "varlen"},
        data={"max_prompt_tokens": 256, "prompts_per_step": 128},
        rollout={"max_new_tokens": 1024},
        optim={"tokens_per_microbatch": 4096},
    )


def test_the_mildest_change_that_fits(big):
    roomy = init.fit(big, num_gpus=8, memory_gb=141)
    assert roomy.config == big
    less = init.fit(big, num_gpus=8, memory_gb=40)
    assert not less.misfits() and not less.config.model.lora_rank
    assert less.config != big and not less.config.model.cpu_offload
    one = init.fit(big, num_gpus=1, memory_gb=48)
    assert not one.misfits() and one.num_gpus == 1
    assert one.config.model.lora_rank == 32 and not one.config.model.cpu_offload
    assert not one.config.model.lora_4bit
    assert init.fit(big, num_gpus=1, memory_gb=16).config.model.lora_4bit
    with pytest.raises(ConfigError, match="does not fit"):
        init.fit(big, num_gpus=1, memory_gb=8)
    assert init.fit(big, num_gpus=1, memory_gb=30).config.model.cpu_offload
    with pytest.raises(ConfigError, match="too large for 30 GB a rank of this CPU"):
        init.fit(big, num_gpus=1, memory_gb=30, is_gpu=False)  # the memory is the host's


def test_devices(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert init.find_devices(4, 80.0) == (True, 4, 80.0)
    assert init.find_devices(None, 24.0) == (True, 1, 24.0)
    with pytest.raises(ConfigError, match="--memory"):
        init.find_devices(4, None)
    is_gpu, num_ranks, memory = init.find_devices(None, None)
    assert not is_gpu and num_ranks in (1, 2) and memory > 0
    sizes = [SimpleNamespace(total_memory=80e9), SimpleNamespace(total_memory=24e9)]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: sizes[device])
    assert init.find_devices(None, None) == (True, 2, 24.0)
    assert init.find_devices(1, None) == (True, 1, 24.0)


def test_a_value_in_place_of_a_section_is_refused(model, tmp_path):
    with pytest.raises(ConfigError, match='"model": a section'):
        _write(model, "rows.jsonl", tmp_path / "x", typed=["model=3"])
