"""Answers that vote, by reward kind, and the check of gold answers."""

import pytest
from text_groups import text_group

from laser_fast.config import RewardConfig
from laser_fast.data.fields import answer_text
from laser_fast.data.rows import open_rows
from laser_fast.evaluation.benchmarks import answer_of, check_golds, find_benchmark
from laser_fast.records import Prompt
from laser_fast.rewards import Grader, grade_groups

NUM_ROWS = {
    "math500": 500,
    "amc23": 40,
    "aime24": 30,
    "aime25": 30,
    "olympiadbench": 675,
    "gsm8k": 1319,
}


@pytest.mark.parametrize(
    ("kind", "text", "answer"),
    [
        ("math", r"so \boxed{1}, no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("math", "the answer is 5", None),
        ("math", r"\boxed{}", None),
        ("module:function", r"\boxed{7}", "7"),
        ("exact", r"\boxed{ a b }", "a b"),
        ("exact", " yes\n", "yes"),
        ("exact", "  ", None),
        ("gsm8k", "6 * 3 = 18, so $18.00", "18"),
        ("gsm8k", "...\n#### 1,000", "1000"),
        ("gsm8k", r"\boxed{0.5} of 9", "1/2"),
        ("gsm8k", "none", None),
    ],
)
def test_answer_by_reward_kind(kind, text, answer):
    assert answer_of(kind)(text) == answer


class ScriptedGrader:
    """Rewards 1 for the gold in a box, None for golds with a question mark."""

    def grade(self, texts, answers):
        return [
            None if "?" in answer else float(text == rf"\boxed{{{answer}}}" and answer != "bad")
            for text, answer in zip(texts, answers, strict=True)
        ]


def _prompts(*golds):
    return [
        Prompt(prompt_id=str(i), text="?", prompt_ids=(1,), answer=gold)
        for i, gold in enumerate(golds)
    ]


def test_golds_that_cannot_be_right_are_found():
    found = check_golds(_prompts("1", "bad", "?", "2"), kind="math", grader=ScriptedGrader())
    assert found == {"golds_rejected": ["1", "2"], "golds_unreadable": ["2"]}
    found = check_golds(_prompts("1", "bad"), kind="my_rewards:tags", grader=None)
    assert found == {"golds_rejected": [], "golds_unreadable": []}  # it may read no box


def test_groups_are_graded_in_one_call():
    class LengthGrader:
        def grade(self, texts, answers, *, prompts, fields, ids):
            assert ["".join(map(chr, own)) for own in ids] == texts
            assert (texts, answers, prompts) == (["a", "ab", "c"], ["1", "1", "2"], ["p", "p", "q"])
            return [1.0, None, 3.0]

    groups = [text_group("p", ["a", "ab"], "1"), text_group("q", ["c"], "2")]
    graded = grade_groups(LengthGrader(), groups, lambda ids: "".join(map(chr, ids)))
    assert [one.rewards for one in graded] == [(1.0, None), (3.0,)]
    assert [one.completions for one in graded] == [one.completions for one in groups]


@pytest.mark.parametrize("name", NUM_ROWS)
def test_every_real_gold_verifies_itself(name, data_dir):
    benchmark = find_benchmark(name, data_dir=data_dir)
    fields = {benchmark.prompt_field: "prompt", benchmark.answer_field: "answer"}
    golds = [
        answer_text(row, fields, benchmark.answer_field, place)
        for place, row in open_rows(benchmark.source, split=benchmark.eval_split).read(fields)
    ]
    assert len(golds) == NUM_ROWS[name]
    with Grader(RewardConfig(kind=benchmark.kind, timeout_s=30.0, workers=1)) as grader:
        found = check_golds(_prompts(*golds), kind=benchmark.kind, grader=grader)
    assert found == {"golds_rejected": [], "golds_unreadable": []}
