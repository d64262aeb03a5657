import json
import re
from itertools import islice, product

import pytest
from tiny_models import make_model_config
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from laser_fast.config import load_config
from laser_fast.rewards.boxed import sandbox as reward
from laser_fast.sandbox.task import (
    EOS_TOKEN,
    PAD_TOKEN,
    RESERVED_TOKENS,
    SPECIAL_TOKENS,
    TASKS,
    TOKENS,
    is_held_out,
    make_tokenizer,
    rows,
    solve,
    warm_up_rows,
    write_tokenizer,
)

PROBLEM, SOLUTION, BOXED = "7a*3b+4c^2=", r"a7*3=1b1+4=5c5^2=5\boxed{5}", r"\boxed{5}"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """The tokenizer beside a Qwen2 config: AutoTokenizer then insists on Qwen2's own class."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    make_model_config("qwen2").save_pretrained(folder)
    return folder


def answer_of(problem):
    """An independent solver that reads the problem's text."""
    value = int(re.match(r"\d+", problem)[0])
    for operator, operand in re.findall(r"[a-h]([-+*^])(\d)", problem):
        value = eval(f"{value}{operator.replace('^', '**')}{operand}") % 10
    return str(value)


def test_the_example_of_the_docstring():
    assert solve(PROBLEM) == (SOLUTION.removesuffix(BOXED), "5")


@pytest.mark.parametrize(("split", "num_rows"), [("train", 8192), ("eval", 400)])
def test_rows_are_distinct_well_formed_and_right(split, num_rows):
    found = rows(split, seed=3)
    assert len(found) == len({row["problem"] for row in found}) == num_rows
    for row in found:
        assert set(row) == {"problem", "answer"}
        assert re.fullmatch(
            r"[1-9]a[+*^][1-9]b[+*^][1-9]c[+*^][1-9](d[+*^][1-9])?=", row["problem"]
        )
        assert row["problem"].count("^") <= 1
        assert row["answer"] == answer_of(row["problem"])
    share = sum("^" in row["problem"] for row in found) / num_rows
    assert 0.34 < share < 0.46
    assert 0.4 < sum(len(row["problem"]) == 14 for row in found) / num_rows < 0.6


def test_rows_are_a_function_of_the_seed():
    assert rows("train", seed=0) == rows("train", seed=0)
    assert rows("train", seed=0) != rows("train", seed=1)
    assert rows("eval", seed=0) != rows("eval", seed=1)


def test_held_out_problems_are_never_trained_on():
    held_out = {row["problem"] for seed in range(3) for row in rows("eval", seed=seed)}
    train = {row["problem"] for seed in range(3) for row in rows("train", seed=seed)}
    warm_up = {problem for problem, _ in islice(warm_up_rows(seed=0), 20000)}
    assert not held_out & (train | warm_up)
    problems = [f"{a}a*{b}b+{c}c+{d}=" for a, b, c, d in product(range(1, 10), repeat=4)]
    assert 0.08 < sum(map(is_held_out, problems)) / len(problems) < 0.12


def test_warm_up_responses_are_correct_solutions_or_bare_answers():
    drawn = list(islice(warm_up_rows(seed=1), 4000))
    assert drawn == list(islice(warm_up_rows(seed=1), 4000))
    assert all(reward(response, answer_of(problem)) == 1.0 for problem, response in drawn)
    bare = [response.startswith(r"\boxed{") for _, response in drawn]
    assert 0.42 < sum(bare) / 4000 < 0.48
    assert 0.045 < sum("^" in problem for problem, _ in drawn) / 4000 < 0.075
    for (problem, response), is_bare in zip(drawn, bare, strict=True):
        if not is_bare:
            steps = re.findall(r"([a-d])(\d)([+*^])(\d)=(\d)", response)
            assert problem[1:-1] == "".join(label + op + b for label, _, op, b, _ in steps)
            assert [problem[0], *(y for *_, y in steps)][:-1] == [x for _, x, *_ in steps]


def test_the_hard_task_asks_for_more_steps_and_fits_its_configuration():
    config = load_config("sandbox_hard")
    task, encode = TASKS["sandbox-hard"], make_tokenizer().encode
    found = rows("eval", seed=0, task="sandbox-hard")
    assert len(found) == len({row["problem"] for row in found}) == 400
    for row in found:
        operations = re.findall(r"[a-h]([-+*])[1-9]", row["problem"])
        assert re.fullmatch(r"\d+([a-h][-+*][1-9])+=", row["problem"])
        assert len(operations) in task.lengths and set(operations) <= set(task.symbols)
        assert row["answer"] == answer_of(row["problem"])
        assert is_held_out(row["problem"])
        assert len(encode(row["problem"]).ids) <= config.data.max_prompt_tokens
    off = []
    for problem, response in islice(warm_up_rows(seed=0, task="sandbox-hard"), 27_800, 29_800):
        assert not is_held_out(problem)
        assert len(encode(response + EOS_TOKEN).ids) <= config.rollout.max_new_tokens
        steps = re.findall(r"([a-h])(\d)([-+*])(\d)=(\d)", response)
        assert problem[1:-1] == "".join(label + op + b for label, _, op, b, _ in steps)
        results = [int(result) for *_, result in steps]
        assert [int(problem[0]), *results][:-1] == [int(before) for _, before, *_ in steps]
        assert response.endswith(f"{results[-1]}\\boxed{{{results[-1]}}}")
        off += [(int(y) - int(answer_of(f"{x}a{op}{b}="))) % 10 for _, x, op, b, y in steps]
    # Only the second half of these rows slips.
    middle = len(off) // 2
    assert not any(off[: middle - 100]) and set(off) == {0, 1, 9}
    for error in (1, 9):
        assert off[middle:].count(error) / middle == pytest.approx(task.slips / 2, abs=0.02)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"a7*3=1\boxed{5}", 1.0),
        (r"\boxed{5}", 1.0),
        (r"\boxed{4}", 0.0),
        (r"\boxed{5}5", 0.0),
        (r"\boxed{5}\boxed{5}", 0.0),
        (r"\boxed{\boxed{5}", 0.0),
        (r"\boxed{5", 0.0),
        (r"\boxed{}", 0.0),
        (r"\boxed{55}", 0.0),
        ("5", 0.0),
        ("", 0.0),
    ],
)
def test_reward_wants_exactly_one_box_at_the_end(text, expected):
    assert reward(text, "5") == expected


def test_tokenizer_is_one_character_a_token(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    raw = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    assert len(tokenizer) == len(TOKENS) == 33
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(TOKENS)}
    for text in (PROBLEM, SOLUTION, BOXED):
        ids = tokenizer(text)["input_ids"]
        expected = re.findall(r"\\boxed\{|.", text)
        assert [TOKENS[i] for i in ids] == expected
        assert tokenizer.decode(ids) == text
        # Only the file, as engines without transformers read it.
        assert raw.encode(text).ids == ids
        assert raw.decode(ids) == text


def test_special_tokens_are_distinct_and_skipped_when_decoding(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD_TOKEN, EOS_TOKEN)
    assert set(tokenizer.all_special_tokens) == set(SPECIAL_TOKENS)
    assert tokenizer.bos_token is None and tokenizer.unk_token is None
    assert len(RESERVED_TOKENS) == 5
    special = (EOS_TOKEN, RESERVED_TOKENS[0], PAD_TOKEN, RESERVED_TOKENS[4])
    ids = tokenizer("1a" + "".join(special))["input_ids"]
    assert [TOKENS[i] for i in ids] == ["1", "a", *special]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "1a"


def test_tokenizer_survives_saving_again(tokenizer_folder, tmp_path):
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path)
    make_model_config("qwen2").save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == {token: i for i, token in enumerate(TOKENS)}
    assert again(SOLUTION)["input_ids"][-3:] == [32, 12, 31]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["pad_token"] == PAD_TOKEN
