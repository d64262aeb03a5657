"""Several data sets as one stream: shares, epochs, names; and what is refused."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from byte_tokenizer import make_tokenizer

from laser_fast.config import Config, ConfigError, DataConfig
from laser_fast.config_errors import apply_override
from laser_fast.data.mix import PromptMix, short_names
from laser_fast.data.prompts import train_prompts
from laser_fast.log.jsonl import write_lines

SIZES = {"a.jsonl": 5, "b.jsonl": 7, "c.jsonl": 3}
WEIGHTS = {"a.jsonl": 0.5, "b.jsonl": 0.3, "c.jsonl": 0.2}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mix")
    for name, size in SIZES.items():
        rows = [{"problem": f"{name} {i}", "answer": i, "level": i % 2} for i in range(size)]
        write_lines(folder / name, rows)
    return folder


def mix(folder, tokenizer, weights=WEIGHTS, *, seed=0, **keys):
    train = {str(folder / name): weight for name, weight in weights.items()}
    keys = {"template": "{prompt}", "prompts_per_step": 6} | keys
    return train_prompts(DataConfig(train=train, **keys), tokenizer, seed=seed)


def ids(prompts):
    return [prompt.prompt_id for prompt in prompts]


class Part:
    digest, num_dropped = "d", 0


def test_every_turn_has_each_share_rounded_and_the_roundings_cancel():
    generator = np.random.default_rng(0)
    mixes = [([0.7, 0.3], 6), ([0.1, 0.9], 1), ([3, 1e-3, 3], 8), ([1.0], 4)]
    mixes += [
        (generator.dirichlet(np.ones(size)).tolist(), int(generator.integers(1, 200)))
        for size in (2, 3, 4, 5, 6) * 4
    ]
    for weights, per_step in mixes:
        parts = {f"{i:02}": (Part, weight) for i, weight in enumerate(weights)}
        counts = PromptMix(parts, seed=0, per_step=per_step)._counts(3000)
        exact = [Fraction(w) / sum(map(Fraction, weights)) * per_step for w in weights]
        for i, share in enumerate(exact):
            assert set(counts[:, i].tolist()) <= {math.floor(share), math.ceil(share)}
        assert (counts.sum(axis=1) == per_step).all()
        due = np.outer(np.arange(1, 3001), np.array(exact, dtype=float))
        assert np.abs(counts.cumsum(axis=0) - due).max() < 4.1, weights
    # The first step is rounded to the nearest.
    parts = {"a": (Part, 0.7), "b": (Part, 0.3)}
    assert PromptMix(parts, seed=0, per_step=6)._counts(1).tolist() == [[4, 2]]


@pytest.mark.parametrize("attempt", [0, 1, 2])
def test_each_data_set_walks_its_own_shuffled_epochs(folder, tokenizer, attempt):
    source = mix(folder, tokenizer)
    found = [p for s in range(30) for p in source.prompts(s, attempt=attempt, rounds=2)]
    assert len(set(ids(found))) == len(found) == 180
    orders = set()
    for name, size in SIZES.items():
        rows = [p.prompt_id.removeprefix(f"{name}-") for p in found if p.source == name]
        assert len(rows) == pytest.approx(180 * WEIGHTS[name], abs=3)
        # The rounds of resampling share a stream, so that of a round alone is a part of it.
        epochs = {}
        for row in rows:
            number, _, epoch = row.partition("@")
            assert epoch.startswith("spare") == (attempt > 0)
            epochs.setdefault(epoch, []).append(int(number))
        assert len(epochs) > 2
        if attempt == 0:
            assert all(sorted(e) == list(range(size)) for e in [*epochs.values()][:-1])
            orders.add(tuple(map(tuple, epochs.values())))
            assert len(set(map(tuple, [*epochs.values()][:-1]))) > 1
    texts = {p.text for p in found if p.source == "c.jsonl"}
    assert texts <= {"c.jsonl 0", "c.jsonl 1", "c.jsonl 2"}


def test_both_rounds_of_resampling_take_each_prompt_once(folder, tokenizer):
    source = mix(folder, tokenizer)
    spare = [p for s in range(9) for a in (1, 2) for p in source.prompts(s, attempt=a, rounds=2)]
    rows = Counter(p.prompt_id for p in spare)
    assert len(rows) == len(spare)
    first = Counter(i.partition("@")[0] for i in rows if i.endswith("@spare0"))
    assert first == {f"{name}-{i}": 1 for name, size in SIZES.items() for i in range(size)}


def test_a_step_depends_on_neither_world_size_nor_past_nor_the_order_of_the_table(
    folder, tokenizer
):
    source = mix(folder, tokenizer)
    steps = [ids(source.prompts(step)) for step in range(8)]
    other = mix(folder, tokenizer, dict(reversed(WEIGHTS.items())))
    assert ids(other.prompts(7)) == steps[7]
    assert other.digest == source.digest
    for size in (2, 3, 6):
        shares = [ids(other.prompts(5, rank=rank, world_size=size)) for rank in range(size)]
        assert sum(shares, []) == steps[5]
    assert ids(mix(folder, tokenizer, seed=1).prompts(7)) != steps[7]
    # The places of a data set change from step to step: no rank or minibatch has it for itself.
    places = {tuple(i.partition("-")[0] for i in step) for step in steps}
    assert len(places) > 4


def test_fields_are_found_in_every_file_and_the_other_keys_are_for_all(folder, tokenizer, tmp_path):
    own = [{"question": f"q{i}", "reward_model": {"ground_truth": i}, "level": i} for i in range(4)]
    write_lines(tmp_path / "verl.jsonl", own)
    train = {str(folder / "a.jsonl"): 1, str(tmp_path / "verl.jsonl"): 1}
    keys = {"template": "{prompt}", "prompt_suffix": "!", "where": {"level": [1]}}
    source = train_prompts(DataConfig(train=train, prompts_per_step=6, **keys), tokenizer, seed=0)
    found = {(p.source, p.text, p.answer) for p in source.prompts(0)}
    assert found == {
        ("a.jsonl", "a.jsonl 1!", "1"),
        ("a.jsonl", "a.jsonl 3!", "3"),
        ("verl.jsonl", "q1!", "1"),
    }


def test_lengths_are_counted_and_ids_checked_over_all(folder, tokenizer, tmp_path):
    write_lines(tmp_path / "long.jsonl", [{"problem": "x" * n, "answer": 1} for n in (2, 40, 50)])
    train = {str(folder / "a.jsonl"): 1, str(tmp_path / "long.jsonl"): 1}
    config = DataConfig(train=train, template="{prompt}", max_prompt_tokens=20)
    source = train_prompts(config, tokenizer, seed=0)
    assert source.num_dropped == 2
    source.check_ids(len(tokenizer))
    with pytest.raises(ConfigError, match=r"the a\.jsonl prompts have tokens up to id"):
        source.check_ids(40)


def test_the_digest_covers_every_file_and_weight(folder, tokenizer, tmp_path):
    digest = mix(folder, tokenizer).digest
    assert mix(folder, tokenizer, seed=1).digest == digest
    assert mix(folder, tokenizer, WEIGHTS | {"c.jsonl": 0.21}).digest != digest
    for name in SIZES:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert mix(tmp_path, tokenizer).digest == digest
    write_lines(tmp_path / "c.jsonl", [{"problem": "new", "answer": 1, "level": 0}])
    assert mix(tmp_path, tokenizer).digest != digest


def test_names_are_as_long_as_they_must_be():
    assert short_names(["/x/a.jsonl", "openai/gsm8k:main"]) == ["a.jsonl", "gsm8k:main"]
    found = short_names(["/x/math/train.parquet", "/x/gsm8k/train.parquet", "b.csv"])
    assert found == ["math/train.parquet", "gsm8k/train.parquet", "b.csv"]
    with pytest.raises(ConfigError, match="different data sets, got a/b.csv, a//b.csv"):
        short_names(["a/b.csv", "a//b.csv"])
    with pytest.raises(ConfigError, match="data.train: expected different data sets, got none"):
        short_names([])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a.jsonl" = 0.7, "b.jsonl" = 0}', r"a number greater than 0 for 'b.jsonl', got 0 \(Hub"),
        ('{"a.jsonl" = 0.7, "b.jsonl" = -1.5}', "a number greater than 0 for 'b.jsonl', got -1.5"),
        ('{"a.jsonl" = nan}', '"data.train": expected'),
        ('{"a.jsonl" = "much"}', '"data.train": expected'),
        ("7", '"data.train": expected'),
    ],
)
def test_what_is_no_mix_is_refused_in_one_sentence(text, message):
    data = {"output_dir": "o", "model": {"path": "m"}, "optim": {"steps": 1}}
    apply_override(data, f"data.train={text}")
    with pytest.raises(ConfigError, match=message) as error:
        Config.parse(data, source="test")
    assert "\n" not in str(error.value)


def test_an_override_names_the_data_sets(monkeypatch):
    data = {"output_dir": "o", "model": {"path": "m"}, "optim": {"steps": 1}}
    monkeypatch.setenv("HOME", "/home/me")
    apply_override(data, 'data.train={"~/math.parquet" = 0.7, "gsm8k.jsonl" = 3}')
    config = Config.parse(data, source="test")
    assert config.data.train == {"/home/me/math.parquet": 0.7, "gsm8k.jsonl": 3.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "other.jsonl: no such data file"),
        ("", "other.jsonl: the data set has no rows"),
        ('{"problem": "p", "answer": ', "other.jsonl:1: not valid JSON"),
        ('{"text": "p"}', "other.jsonl:1: no field among problem"),
        ('{"problem": "p", "answer": "1"}', 'other.jsonl:1: no field "level" .data.where'),
    ],
)
def test_an_unreadable_member_is_named(folder, tokenizer, tmp_path, content, message):
    if content is not None:
        (tmp_path / "other.jsonl").write_text(content)
    train = {str(folder / "a.jsonl"): 1.0, str(tmp_path / "other.jsonl"): 1.0}
    where = {"level": [1]} if content and '"answer": "1"' in content else {}
    config = DataConfig(train=train, template="{prompt}", where=where)
    with pytest.raises(ConfigError, match=message):
        train_prompts(config, tokenizer, seed=0)
