"""Graded groups as records, their scores, and the file that holds them."""

import dataclasses
import json

import pytest

from laser_fast.config import ConfigError
from laser_fast.log.jsonl import read_lines
from laser_fast.log.samples import SampleRecord, read_samples, scored, to_records, write_samples
from laser_fast.records import Completion, Group, Prompt


def _group(prompt_id, logprobs, rewards) -> Group:
    """Completions that end where they have a log-prob of the score."""
    return Group(
        prompt=Prompt(prompt_id=prompt_id, text="?", prompt_ids=(1,), answer="1"),
        completions=tuple(
            Completion(
                completion_ids=(g, 0),
                rollout_logprobs=(-1.0, -1.0),
                finish_reason="length" if logprob is None else "stop",
                score_logprob=logprob,
            )
            for g, logprob in enumerate(logprobs)
        ),
        rewards=rewards,
        totals=rewards,
        extras=({},) * len(rewards),
    )


GROUPS = [_group("a", (-15.0, -11.0), (1.0, 0.0)), _group("b", (-14.0, None), (None, 0.0))]


def _records(ref_logprob=-20.0, **options) -> list[SampleRecord]:
    decode, extract = (lambda ids: f"is {ids[0]}"), (lambda text: text[-1])
    records = to_records(GROUPS, decode=decode, extract=extract, **options)
    return scored(records, beta=0.1, ref_logprob=ref_logprob)


def test_records_of_graded_groups():
    records = _records()
    assert records[1] == SampleRecord(
        prompt_id="a",
        sample=1,
        prompt="?",
        gold="1",
        text="is 1",
        answer="1",
        reward=0.0,
        score=pytest.approx(0.9),
        score_logprob=-11.0,
        finish_reason="stop",
        num_tokens=2,
    )
    assert [record.reward for record in records] == [1.0, 0.0, None, 0.0]
    assert [record.score for record in records] == [pytest.approx(s) for s in (0.5, 0.9, 0.6, 0.0)]
    assert [record.is_correct for record in records] == [True, False, False, False]
    assert [record.is_finished for record in records] == [True, True, True, False]


def test_without_a_reference_no_score_is_defined():
    assert [record.score for record in _records(float("nan"))] == [None, None, None, 0.0]


def test_rescoring_offline_equals_scoring_online():
    assert scored(_records(), beta=0.1, ref_logprob=-15.0) == _records(-15.0) != _records()


def test_limited_records_are_spread_over_the_groups():
    whole = _records()
    assert [_records(limit=limit) for limit in (0, 2, 3, 4, 9)] == [
        [],
        [whole[0], whole[2]],
        [whole[0], whole[1], whole[2]],
        whole,
        whole,
    ]
    assert {record.step for record in _records(step=7, limit=2)} == {7}


@pytest.mark.parametrize("step", [None, 3])
def test_samples_round_trip(tmp_path, step):
    records = _records(step=step)
    records[0] = dataclasses.replace(records[0], text='line\nbreak "quote" \u2028 \u00e9')
    path = tmp_path / "samples.jsonl"
    write_samples(path, records)
    assert read_samples(path) == records
    assert len(path.read_text().split("\n")) == len(records) + 1
    # An evaluation has no steps, and its file says nothing of them.
    assert {line.get("step", "none") for line in read_lines(path)} == {step or "none"}


def test_broken_sample_file_names_the_line(tmp_path):
    path = tmp_path / "samples.jsonl"
    write_samples(path, _records())
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + '{"prompt_id": \n' + lines[1])
    with pytest.raises(ConfigError, match=r"samples.jsonl, line 2: not valid JSON"):
        read_samples(path)
    path.write_text(lines[0] + lines[1].replace('"gold"', '"golden"'))
    with pytest.raises(ConfigError, match="line 2: gold: Field required"):
        read_samples(path)
    path.write_text(json.dumps(json.loads(lines[0]) | {"other": 1}) + "\n")
    with pytest.raises(ConfigError, match="line 1: other: Unexpected"):
        read_samples(path)


def test_further_functions_are_written_beside_the_reward(tmp_path):
    extras = {"m:style": 0.5}, {"m:style": None}
    group = dataclasses.replace(GROUPS[0], totals=(1.25, 0.0), extras=extras)
    records = to_records([group], decode=lambda ids: "", extract=lambda text: None)
    assert [record.reward for record in records] == [1.0, 0.0]
    assert [record.total for record in records] == [1.25, 0.0]
    write_samples(tmp_path / "samples.jsonl", records)
    lines = read_lines(tmp_path / "samples.jsonl")
    assert [line["extras"] for line in lines] == [*extras]
    assert read_samples(tmp_path / "samples.jsonl") == records
    write_samples(tmp_path / "plain.jsonl", _records())
    assert not {"total", "extras", "step"} & read_lines(tmp_path / "plain.jsonl")[0].keys()
