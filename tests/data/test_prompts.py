import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from byte_tokenizer import make_tokenizer
from tokenizers import processors

from laser_fast.config import ConfigError, DataConfig
from laser_fast.data.prompts import held_out_prompts, train_prompts

DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(path, num_rows):
    return write_jsonl(path, [{"problem": f"{i}+1=", "answer": i + 1} for i in range(num_rows)])


def source(train, tokenizer, *, seed=0, **keys):
    config = DataConfig(train=train, **({"template": "{prompt}", "prompts_per_step": 4} | keys))
    return train_prompts(config, tokenizer, seed=seed)


def row_of(prompt):
    return int(prompt.prompt_id.removeprefix("train-").partition("@")[0])


# Wording and tokens


def test_a_plain_template_takes_the_suffix_and_the_tokenizers_special_tokens(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"problem": "What is {x}?", "answer": "5"}])
    prompts = source(path, tokenizer, template="Q: {prompt}\nA:", prompt_suffix=" Think!")
    [prompt] = prompts.all()
    assert prompt.text == "Q: What is {x}? Think!\nA:"
    assert prompt.prompt_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(prompt.prompt_ids[1:]) == prompt.text
    assert (prompt.prompt_id, prompt.answer) == ("train-0", "5")


def test_the_chat_template_opens_the_answer_and_adds_no_second_bos(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"problem": "2+3?", "answer": "5"}])
    [prompt] = source(path, tokenizer, template="chat", prompt_suffix=" Box it.").all()
    assert prompt.text == "<user>2+3? Box it.<assistant>"
    assert tokenizer.decode(prompt.prompt_ids) == prompt.text


def test_the_cache_follows_everything_that_shapes_a_prompt(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"problem": "2+3?", "other": "7?", "answer": "5", "gold": "6"}])

    def one(tokenizer=tokenizer, **keys):
        [prompt] = source(str(path), tokenizer, **keys).all()
        return prompt.text, prompt.answer, prompt.prompt_ids[0]

    bos = tokenizer.bos_token_id
    assert one() == ("2+3?", "5", bos)
    assert one(prompt_field="other") == ("7?", "5", bos)
    assert one(answer_field="gold") == ("2+3?", "6", bos)
    assert one(prompt_suffix="!") == ("2+3?!", "5", bos)
    assert one(template="<{prompt}>") == ("<2+3?>", "5", bos)
    assert one(template="chat")[0] == "<user>2+3?<assistant>"
    other = make_tokenizer()
    other.chat_template = "[{{ messages[0].content }}]"
    assert one(tokenizer=other, template="chat")[0] == "[2+3?]"
    other.backend_tokenizer.post_processor = processors.ByteLevel()
    assert one(tokenizer=other)[2] != bos
    write_jsonl(path, [{"problem": "changed", "answer": "5"}])
    assert one() == ("changed", "5", bos)


def test_the_cache_follows_special_tokens_and_a_file_that_hides_its_change(tmp_path):
    path, tokenizer = tmp_path / "a.jsonl", make_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{{ messages[0].content }}{{ pad_token }}{{ eos_token }}"
    )

    def one():
        [prompt] = source(str(path), tokenizer, template="chat").all()
        return prompt.text

    write_jsonl(path, [{"problem": "2+3?", "answer": "5"}])
    assert one() == "<bos>2+3?<eos>"
    tokenizer.pad_token = "<eos>"
    assert one() == "<bos>2+3?<eos><eos>"
    tokenizer.bos_token = "<eos>"
    assert one() == "<eos>2+3?<eos><eos>"
    status = path.stat()
    write_jsonl(path, [{"problem": "4+3?", "answer": "7"}])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert one() == "<eos>4+3?<eos><eos>"


def test_the_digest_follows_what_a_run_trains_on_and_nothing_else(tmp_path, tokenizer):
    rows = [{"problem": f"{i}+1=", "answer": i + 1} for i in range(2000)]
    digest = source(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer).digest
    moved = [{"id": i, **row} for i, row in enumerate(rows)]
    assert source(write_jsonl(tmp_path / "b.jsonl", moved), tokenizer).digest == digest
    changes = {
        "a question": [*rows[:-1], {"problem": "1+1=", "answer": 2000}],
        "an answer": [{**rows[0], "answer": 2}, *rows[1:]],
        "the order": [*rows[:-2], rows[-1], rows[-2]],
        "a row more": [*rows, rows[0]],
        "a row less": rows[:-1],
    }
    for name, changed in changes.items():
        assert source(write_jsonl(tmp_path / "c.jsonl", changed), tokenizer).digest != digest, name
    other = make_tokenizer()
    other.backend_tokenizer.post_processor = processors.ByteLevel()
    assert source(str(tmp_path / "a.jsonl"), other).digest != digest


def test_a_chat_template_is_told_one_day_for_ever(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %} "
        '{{ strftime_now( "%Y-%m-%d" ) }} {{ messages[0].content }}'
    )
    [prompt] = source(numbered(tmp_path / "a.jsonl", 1), tokenizer, template="chat").all()
    assert prompt.text == "26 Jul 2024 2024-07-26 0+1="


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for", "template fails: TemplateSyntaxError"),
        ("{{ messages[0].nothing.more }}", "template fails: UndefinedError"),
        ("{{ raise_exception('no user here') }}", "template fails: TemplateError: no user here"),
        ("{{ messages[1].content }}", "template fails: UndefinedError"),
        ("{{ 1 / 0 }}", "template fails: ZeroDivisionError"),
        ("{{ messages.append(1) }}", "template fails: SecurityError"),
        ("Hello!", "template fails: it leaves the question out"),
        ("{{ messages[0].content }}{{ strftime_now(x) }}", "the format of a date, which cannot"),
        ("{% set now = strftime_now %}{{ now('%H') }}", "the format of a date, which cannot"),
        ({"tool_use": "{{ messages[0].content }}"}, "template fails: "),
        (5, "template fails: "),
    ],
)
def test_a_broken_chat_template_is_one_sentence(tmp_path, template, message):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    path = numbered(tmp_path / "a.jsonl", 3)
    with pytest.raises(ConfigError, match=message) as caught:
        source(path, tokenizer, template="chat")
    assert "\n" not in str(caught.value)


def test_a_second_source_reads_the_cache(tmp_path, tokenizer, cache):
    path = numbered(tmp_path / "a.jsonl", 20)
    first = source(path, tokenizer)
    files = {file: file.stat().st_mtime_ns for file in cache.rglob("*.arrow")}
    assert len(files) == 1
    # Another limit, order and split share the file.
    second = source(path, tokenizer, seed=3, max_prompt_tokens=9)
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*.arrow")} == files
    assert second.all() == first.all()


def test_long_prompts_are_dropped_and_counted(tmp_path, tokenizer):
    rows = [{"problem": "x" * (i + 1), "answer": i} for i in range(10)]
    prompts = source(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer, max_prompt_tokens=6)
    assert (prompts.num_prompts, prompts.num_dropped) == (5, 5)  # BOS counts
    assert [len(prompt.prompt_ids) for prompt in prompts.all()] == [2, 3, 4, 5, 6]
    assert {row_of(p) for step in range(5) for p in prompts.prompts(step)} == {0, 1, 2, 3, 4}


def test_eval_keeps_the_order_of_the_file_and_its_limit(tmp_path, tokenizer):
    path = numbered(tmp_path / "a.jsonl", 7)
    config = DataConfig(train="x", eval=path, eval_limit=3, template="{prompt}")
    prompts = held_out_prompts(config, tokenizer)
    assert [prompt.prompt_id for prompt in prompts.all()] == ["eval-0", "eval-1", "eval-2"]
    assert [prompt.text for prompt in prompts.all()] == ["0+1=", "1+1=", "2+1="]
    assert prompts.num_prompts == 3
    with pytest.raises(ConfigError, match="is empty; set data.train or data.eval"):
        held_out_prompts(DataConfig(train=path), tokenizer)


def test_eval_may_have_fields_of_its_own(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "2+3?", "problem": "?", "gold": 5}])
    keys = {"template": "{prompt}", "answer_field": "gold", "eval_prompt_field": "q"}
    [prompt] = held_out_prompts(DataConfig(train="x", eval=path, **keys), tokenizer).all()
    assert (prompt.text, prompt.answer) == ("2+3?", "5")


# Sources


@pytest.mark.skipif(not DATA.is_dir(), reason="the evaluation sets of ../shared/data are absent")
def test_the_shared_data_is_read_as_it_is(tokenizer):
    files = {
        "eval/math500.jsonl": 500,
        "eval/amc23.jsonl": 40,
        "eval/aime24.jsonl": 30,
        "eval/aime25.jsonl": 30,
        "eval/olympiadbench.jsonl": 675,
        "gsm8k/test.jsonl": 1319,
    }
    for file, num_rows in files.items():
        field = "question" if file.startswith("gsm8k") else "problem"
        prompts = source(str(DATA / file), tokenizer, prompt_field=field, max_prompt_tokens=10**5)
        assert (prompts.num_prompts, prompts.num_dropped) == (num_rows, 0)
        rows = [json.loads(line) for line in (DATA / file).read_text().splitlines()]
        read = prompts.all()
        assert [p.answer for p in read] == [str(row["answer"]) for row in rows]
        assert [p.text for p in read] == [row[field] for row in rows]


# Order


def test_every_epoch_shows_every_row_once_in_another_order(tmp_path, tokenizer):
    prompts = source(numbered(tmp_path / "a.jsonl", 10), tokenizer, prompts_per_step=4)
    stream = [prompt for step in range(5) for prompt in prompts.prompts(step)]
    epochs = [stream[:10], stream[10:]]
    for number, epoch in enumerate(epochs):
        assert sorted(map(row_of, epoch)) == list(range(10))
        assert all(prompt.prompt_id.endswith(f"@{number}") for prompt in epoch)
    orders = [[row_of(prompt) for prompt in epoch] for epoch in epochs]
    assert orders[0] != orders[1]
    assert list(range(10)) not in orders
    assert all(prompt.text == f"{row_of(prompt)}+1=" for prompt in stream)


def test_the_order_is_a_pure_function_of_seed_and_step(tmp_path, tokenizer):
    path = numbered(tmp_path / "a.jsonl", 50)
    forward = source(path, tokenizer, seed=7)
    steps = [forward.prompts(step) for step in range(40)]
    backward = source(path, tokenizer, seed=7)
    assert [backward.prompts(step) for step in reversed(range(40))] == steps[::-1]
    assert source(path, tokenizer, seed=8).prompts(0) != steps[0]


def test_the_world_size_changes_who_gets_a_prompt_and_nothing_else(tmp_path, tokenizer):
    prompts = source(numbered(tmp_path / "a.jsonl", 10), tokenizer, prompts_per_step=8)
    for world_size in (2, 4, 8):
        for step in range(3):
            shares = [
                prompts.prompts(step, attempt=1, rounds=2, rank=rank, world_size=world_size)
                for rank in range(world_size)
            ]
            assert {len(share) for share in shares} == {8 // world_size}
            assert sum(shares, []) == prompts.prompts(step, attempt=1, rounds=2)


def test_resampling_draws_from_a_stream_of_its_own(tmp_path, tokenizer):
    prompts = source(numbered(tmp_path / "a.jsonl", 24), tokenizer, prompts_per_step=4)
    first = [prompt for step in range(6) for prompt in prompts.prompts(step, rounds=2)]
    assert sorted(map(row_of, first)) == list(range(24))  # none is skipped
    assert first == [prompt for step in range(6) for prompt in prompts.prompts(step)]
    spare = [
        prompt
        for step in range(3)
        for attempt in (1, 2)
        for prompt in prompts.prompts(step, attempt=attempt, rounds=2)
    ]
    assert sorted(map(row_of, spare)) == list(range(24))  # nothing twice
    assert list(map(row_of, spare)) != list(map(row_of, first))
    names = {prompt.prompt_id for prompt in first + spare}
    assert len(names) == 48 and f"train-{row_of(spare[0])}@spare0" in names


def test_a_step_larger_than_the_data_set_repeats_rows_under_new_names(tmp_path, tokenizer):
    prompts = source(numbered(tmp_path / "a.jsonl", 3), tokenizer, prompts_per_step=8)
    step = prompts.prompts(1)
    assert Counter(map(row_of, step)).most_common(1)[0][1] <= math.ceil(8 / 3) + 1
    assert len({prompt.prompt_id for prompt in step}) == 8


def test_wrong_shares_are_refused(tmp_path, tokenizer):
    prompts = source(numbered(tmp_path / "a.jsonl", 3), tokenizer, prompts_per_step=4)
    with pytest.raises(AssertionError, match="4 prompts do not divide over 3 ranks"):
        prompts.prompts(0, world_size=3)
    for wrong in ({"attempt": 1}, {"rank": 1}, {"attempt": -1, "rounds": 1}):
        with pytest.raises(AssertionError):
            prompts.prompts(0, **wrong)


# Bad input


def test_a_bad_row_stops_before_the_first_step_and_is_not_cached(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"problem": "a", "answer": 1}, {"problem": "b", "answer": None}])
    for _ in range(2):
        with pytest.raises(ConfigError, match='a.jsonl:2: field "answer" .* is null'):
            source(str(path), tokenizer)
    path.write_text("\n")
    with pytest.raises(ConfigError, match="a.jsonl: the data set has no rows"):
        source(str(path), tokenizer)


def test_no_prompt_left_says_how_long_the_shortest_is(tmp_path, tokenizer):
    path = numbered(tmp_path / "a.jsonl", 3)
    with pytest.raises(ConfigError, match="all 3 are longer .* = 4 .the shortest has 5 tokens"):
        source(path, tokenizer, max_prompt_tokens=4)


def test_a_chat_template_must_exist(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        source(numbered(tmp_path / "a.jsonl", 3), tokenizer, template="chat")


def test_a_prompt_without_tokens_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content | replace('b', '') }}"
    rows = [{"problem": "a", "answer": 1}, {"problem": "b", "answer": 1}]
    with pytest.raises(ConfigError, match="a.jsonl:2: the prompt '' has no token"):
        source(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer, template="chat")


# Memory

MEASURE = """
import resource, sys
sys.path[:0] = {folders!r}
import datasets
datasets.disable_progress_bars()
from test_prompts import make_tokenizer, source
tokenizer = make_tokenizer()
source({small!r}, tokenizer).prompts(0)
for path in {large!r}:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prompts = source(path, tokenizer)
    for step in range(0, 1000, 100):
        prompts.prompts(step)
    print(prompts.num_prompts, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_large_file_is_not_loaded_into_memory(tmp_path):
    num_rows, num_bytes = 8_000, 60_000_000
    solution = "x" * (num_bytes // num_rows)  # a field that nobody asked for
    rows = [
        json.dumps({"problem": f"{i}+1=", "answer": i + 1, "solution": solution})
        for i in range(num_rows)
    ]
    (tmp_path / "large.jsonl").write_text("\n".join(rows))
    script = MEASURE.format(
        folders=[str(Path(__file__).parent), str(Path(__file__).parents[1] / "helpers")],
        small=numbered(tmp_path / "small.jsonl", 10),
        large=[str(tmp_path / "large.jsonl")],
    )
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    for line in done.stdout.splitlines():
        num_prompts, grown_kib = map(int, line.split())
        assert num_prompts == num_rows
        assert grown_kib * 1024 < num_bytes / 3
