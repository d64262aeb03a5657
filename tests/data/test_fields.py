"""Rows as verl and TRL have them: messages, nested fields, names that nobody has to give."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from laser_fast.config import ConfigError, DataConfig
from laser_fast.data.prompts import held_out_prompts, train_prompts
from laser_fast.sandbox.task import write_tokenizer

TEMPLATE = (
    "{%- for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{%- endfor %}"
    "{%- if add_generation_prompt %}a{%- if think %}b{%- endif %}{%- endif %}"
)
USER = {"role": "user", "content": "1+2="}
VERL = {
    "data_source": "sandbox",
    "prompt": [{"role": "system", "content": "3"}, USER],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "3"},
    "extra_info": {"index": 0},
}
TRL = {"prompt": [USER], "ground_truth": "3"}
PLAIN = {"question": "1+2=", "answer": 3}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path, tokenizer, **keys):
    config = DataConfig(train=path, prompts_per_step=1, **keys)
    return train_prompts(config, tokenizer, seed=0).all()


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(("row", "text"), [(VERL, "s3u1+2=a"), (TRL, "u1+2=a"), (PLAIN, "u1+2=a")])
def test_rows_are_read_as_they_are(tmp_path, tokenizer, suffix, row, text, caplog):
    caplog.set_level("INFO")
    [prompt] = load(write(tmp_path / f"rows.{suffix}", [row]), tokenizer)
    assert (prompt.text, prompt.answer) == (text, "3")
    assert prompt.prompt_ids
    assert "questions from" in caplog.text


def test_fields_that_are_given_are_taken(tmp_path, tokenizer):
    row = {**VERL, "question": "7", "answer": "9", "a.b": "4"}
    path = write(tmp_path / "rows.jsonl", [row])
    [prompt] = load(path, tokenizer, prompt_field="question", answer_field="extra_info.index")
    assert (prompt.text, prompt.answer) == ("u7a", "0")
    [prompt] = load(path, tokenizer, answer_field="a.b")  # a name with a dot in it
    assert (prompt.text, prompt.answer) == ("s3u1+2=a", "4")


def test_the_suffix_goes_to_the_last_message(tmp_path, tokenizer):
    history = [USER, {"role": "assistant", "content": "3"}, {"role": "user", "content": "2+2="}]
    path = write(tmp_path / "rows.jsonl", [{"messages": history, "answer": "4"}])
    [prompt] = load(path, tokenizer, prompt_suffix="+")
    assert prompt.text == "u1+2=a3u2+2=+a"


def test_the_template_is_told_what_the_configuration_says(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", [PLAIN])
    assert load(path, tokenizer)[0].text == "u1+2=a"
    [prompt] = load(path, tokenizer, chat_template_kwargs={"think": True})
    assert prompt.text == "u1+2=ab"  # and not the one that the cache has
    with pytest.raises(ConfigError, match="the chat template reads no thinking; leave it out"):
        load(path, tokenizer, chat_template_kwargs={"thinking": True})


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_are_kept_by_their_fields(tmp_path, tokenizer, suffix):
    rows = [
        {"problem": f"{level}+{n}=", "answer": n, "level": level, "of": {"kind": kind}}
        for n, (level, kind) in enumerate([(1, "a"), (2, "a"), (3, "b"), (2, "b")])
    ]
    path = write(tmp_path / f"rows.{suffix}", rows)
    found = load(path, tokenizer, where={"level": [2, 3]})
    assert [prompt.answer for prompt in found] == ["1", "2", "3"]
    found = load(path, tokenizer, where={"level": [2, 3], "of.kind": ["b"]})
    assert [prompt.answer for prompt in found] == ["2", "3"]
    assert len(load(path, tokenizer)) == 4
    assert len(load(path, tokenizer, where={"level": [2.0]})) == 2  # as pandas writes numbers
    assert len(load(path, tokenizer, where={"level": [3]})) == 1
    with pytest.raises(ConfigError, match=r'no field "leval" \(data.where\)'):
        load(path, tokenizer, where={"leval": [2]})
    with pytest.raises(ConfigError, match=r"where \{.*has no rows"):
        load(path, tokenizer, where={"level": [9]})


def test_fields_that_a_reward_asks_for_come_with_the_prompt(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", [{**PLAIN, "level": 4, "tags": ["a"]}])
    config = DataConfig(train=path, eval=path, prompts_per_step=1)
    assert train_prompts(config, tokenizer, seed=0).all()[0].fields == "{}"
    for read in (
        train_prompts(config, tokenizer, seed=0, asked=("level", "tags")),
        held_out_prompts(config, tokenizer, asked=("level", "tags")),
    ):
        assert json.loads(read.all()[0].fields) == {"level": 4, "tags": ["a"]}
    with pytest.raises(ConfigError, match=r'no field "hint" \(which the reward function asks for'):
        train_prompts(config, tokenizer, seed=0, asked=("hint",))


def test_held_out_rows_have_fields_of_their_own(tmp_path, tokenizer):
    train, held_out = (
        write(tmp_path / f"{n}.jsonl", [row]) for n, row in (("a", VERL), ("b", PLAIN))
    )
    config = DataConfig(train=train, eval=held_out)
    assert held_out_prompts(config, tokenizer).all()[0].text == "u1+2=a"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1, 2], "rows.jsonl:1: expected an object with fields, got list"),
        ({"text": "1", "answer": "1"}, "no field among problem, prompt, .*; set data.prompt_field"),
        ({"problem": "1", "gold": "1"}, "no field among answer, .*the fields are problem, gold"),
        (
            {"problem": [USER, {"role": "assistant", "content": "3"}], "answer": "3"},
            "ends with the",
        ),
        ({"problem": [{"role": "user"}], "answer": "3"}, "message 0: expected role and content"),
        ({"problem": [{"role": "user", "content": " "}], "answer": "3"}, "message 0 is empty"),
        ({"problem": [dict(USER, content="\ud800")], "answer": "3"}, "message 0 is not valid"),
        ({"problem": [], "answer": "3"}, "expected text or a list of messages"),
    ],
)
def test_what_is_no_question_is_named(tmp_path, tokenizer, row, message):
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path / "rows.jsonl", [row]), tokenizer)


def test_messages_need_a_chat_template(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match=r"prompt holds messages; set .*, with a model that has"):
        load(write(tmp_path / "rows.jsonl", [TRL]), tokenizer, template="{prompt}")
