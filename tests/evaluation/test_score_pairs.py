"""`score`: the same numbers as generation and as full logits, and a reason where there is none."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from laser_fast.config import ConfigError
from laser_fast.evaluation.score_pairs import _read, score_pairs
from laser_fast.evaluation.settings import build_config
from laser_fast.model.vocabulary import Vocabulary
from laser_fast.records import SpecialTokens

EOS, SCORE = 1, 2  # <eos> and <|reserved_0|> of the sandbox's tokenizer


@pytest.fixture
def build(sandbox_model):
    overrides = ["score.token=<|reserved_0|>", "score.beta=0.2", "score.ref_logprob=-9"]
    overrides.append("data.template={prompt}")
    return lambda *changes: build_config(str(sandbox_model), overrides=[*overrides, *changes])


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _score(config, tmp_path, rows, **given):
    out = tmp_path / "out.jsonl"
    totals = score_pairs(config, _write(tmp_path / "in.jsonl", rows), out, **given)
    return totals, [json.loads(line) for line in out.read_text().splitlines()]


def test_text_and_ids_against_full_logits(build, tmp_path, sandbox_model):
    tokenizer = AutoTokenizer.from_pretrained(sandbox_model)
    prompt, response = "7a*3b+4=", r"a7*3=1b1+4=5\boxed{5}"
    prompt_ids = tokenizer(prompt)["input_ids"]
    completion_ids = [*tokenizer(response)["input_ids"], EOS]
    rows = [
        {"prompt": prompt, "response": response, "id": 7, "note": "torn \ud83d"},
        {"prompt_ids": prompt_ids, "completion_ids": completion_ids},
        {"prompt": prompt, "response": response + "<eos>", "score": "old"},
        {"prompt": "1a+1=", "completion_ids": [completion_ids[-2], EOS], "finish_reason": "stop"},
    ]
    moves = []
    totals, lines = _score(build(), tmp_path, rows, on_progress=lambda *move: moves.append(move))
    reference = AutoModelForCausalLM.from_pretrained(sandbox_model).double()

    @torch.no_grad()
    def exact(ids):
        return float(reference(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[SCORE])

    expected = [exact(prompt_ids + completion_ids)] * 3
    expected.append(exact(tokenizer("1a+1=")["input_ids"] + [completion_ids[-2], EOS]))
    for row, line, logprob in zip(rows, lines, expected, strict=True):
        assert line["score_logprob"] == pytest.approx(logprob, abs=2e-5)
        assert line["score"] == pytest.approx(0.2 * (logprob + 9), abs=1e-5)
        assert line["reason"] is None
        # Everything else comes through as it was.
        assert {key: line[key] for key in row if key != "score"} == {
            key: value for key, value in row.items() if key != "score"
        }
    [line] = _score(build("score.position=last"), tmp_path, rows[1:2], overwrite=True)[1]
    logprob = exact(prompt_ids + completion_ids[:-1])  # of the row that predicts the EOS
    assert line["score_logprob"] == pytest.approx(logprob, abs=2e-5) != expected[1]
    assert totals == {"scored": 4}
    assert moves[-1] == ("in.jsonl", 4, 4)


def test_what_cannot_be_read_gets_a_reason(build, tmp_path):
    ids = [10, 11]
    rows = [
        {"prompt_ids": ids, "completion_ids": [12, 13]},
        {"prompt_ids": ids, "completion_ids": []},
        {"prompt_ids": ids, "completion_ids": [EOS]},
        {"prompt": "1a+1=", "response": ""},
        {"prompt": "1a+1=", "response": "2", "finish_reason": "length"},
        {"prompt_ids": ids, "completion_ids": [12] * 126 + [EOS]},
        {"prompt_ids": ids, "completion_ids": [12] * 125 + [EOS]},
    ]
    totals, lines = _score(build(), tmp_path, rows)
    reasons = ["truncated", "empty", "empty", "empty", "truncated", "too long", None]
    assert [line["reason"] for line in lines] == reasons
    for line in lines[:-1]:
        assert line["score"] is None and line["score_logprob"] is None
    # 128 tokens fill the model's positions exactly.
    assert lines[-1]["score"] is not None
    assert totals == {"scored": 1, "truncated": 2, "empty": 3, "too long": 1}


def test_a_log_prob_that_is_no_number_is_no_score(build, tmp_path, monkeypatch):
    rows = [{"prompt_ids": [9], "completion_ids": [9, EOS]}] * 2
    found = torch.tensor([[-8.0], [-torch.inf]])
    monkeypatch.setattr(f"{score_pairs.__module__}.last_token_logprobs", lambda *_, **__: found)
    totals, lines = _score(build(), tmp_path, rows)
    assert totals == {"scored": 1, "no number": 1}
    assert [line["score_logprob"] for line in lines] == [-8.0, None]
    assert [line["reason"] for line in lines] == [None, "no number"]


def test_text_ends_with_an_id_that_ends_completions(build, sandbox_model):
    tokenizer = AutoTokenizer.from_pretrained(sandbox_model)
    special = SpecialTokens(score_token_id=SCORE, eos_token_ids=(5,), pad_token_id=0, vocab_size=33)
    end, vocabulary = tokenizer.convert_ids_to_tokens(5), Vocabulary(tokenizer, special)
    assert tokenizer.eos_token_id == EOS
    for response in ("2", f"2{end}", f"2{end}2{end}"):  # as cut out of a chat
        row = "in.jsonl:1", {"prompt": "1a+1=", "response": response}
        pair = _read(row, build().data, vocabulary, (33, 128))
        assert pair.reason is None
        assert pair.ids[1] == (*tokenizer("2", add_special_tokens=False)["input_ids"], 5)


def test_nothing_readable_still_gives_every_line(build, tmp_path):
    totals, lines = _score(build(), tmp_path, [{"prompt_ids": [9], "completion_ids": []}] * 3)
    assert totals == {"scored": 0, "empty": 3}
    assert [line["reason"] for line in lines] == ["empty"] * 3


def test_an_output_is_not_overwritten_unasked(build, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine")
    row = {"prompt_ids": [9], "completion_ids": [9, EOS]}
    with pytest.raises(ConfigError, match="exists; choose another file or --overwrite"):
        _score(build(), tmp_path, [row])
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    _, lines = _score(build(), tmp_path, [row], overwrite=True)
    assert lines[0]["score"] is not None
    with pytest.raises(ConfigError, match="is a folder; name a file"):
        score_pairs(build(), tmp_path / "in.jsonl", tmp_path, overwrite=True)
    # A broken input leaves the earlier output as it was, and no partial one.
    with pytest.raises(ConfigError, match='in.jsonl:1: no field "prompt"'):
        _score(build(), tmp_path, [{}], overwrite=True)
    assert json.loads((tmp_path / "out.jsonl").read_text()) == lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no pairs to score"),
        (
            '{"prompt": "1"}\n',
            'in.jsonl:1: expected a text "response" or "completion_ids", got None',
        ),
        (
            '{"prompt": 1, "response": "2"}\n',
            "(or prompt_ids): expected text or a list of messages",
        ),
        ('{"prompt": "x", "response": "2"}\n', "the prompt has no token"),
        (
            '{"prompt": "1", "response": 2}\n',
            'expected a text "response" or "completion_ids", got 2',
        ),
        ('{"prompt": "1", "response": "\\ud83d"}\n', 'in.jsonl:1: field "response": '),
        ('{"prompt": "1", "completion_ids": "12"}\n', "expected a list of ids below"),
        (
            '{"prompt": "1", "completion_ids": [99]}\n',
            "expected a list of ids below the 33 of this model, got [99]",
        ),
        ('{"prompt": "1", "response": "2"}\n{"pro\n', "in.jsonl:2: not valid JSON"),
        ("[1]\n3\n", "in.jsonl:1: expected an object, got list"),
    ],
)
def test_broken_input_names_the_place(build, tmp_path, content, message):
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        score_pairs(build(), tmp_path / "in.jsonl", tmp_path / "out.jsonl")


def test_options_that_do_not_fit(build, sandbox_model, tmp_path):
    row = {"prompt": "1a+1=", "response": "2"}
    with pytest.raises(ConfigError, match="--ref-logprob auto: given answers cannot measure"):
        _score(build("score.ref_logprob=auto"), tmp_path, [row])
    with pytest.raises(ConfigError, match=r"measures it on the base model\)$"):
        _score(build_config(str(sandbox_model)), tmp_path, [row])
    with pytest.raises(ConfigError, match="no chat template; set data.template to a text"):
        _score(build("data.template=chat"), tmp_path, [row])
    with pytest.raises(ConfigError, match="expected a .jsonl or .json file"):
        score_pairs(build(), tmp_path / "in.csv", tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match="none: no such folder; make it"):
        score_pairs(build(), tmp_path / "in.jsonl", tmp_path / "none" / "out")
