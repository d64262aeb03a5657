"""Prompts that a curriculum passes over, against the plain stream of a small data set."""

import json
from collections import Counter

from laser_fast.config import DataConfig
from laser_fast.data.curriculum import Curriculum
from laser_fast.records import Completion, Group, Prompt

ROWS, PER_STEP = 5, 3


class Stream:
    """The order of the rows of a source: each epoch turned by one."""

    def __init__(self, rows=ROWS):
        self.rows = rows

    def prompts(self, step, *, attempt=0, rounds=0):
        assert attempt == rounds <= 1
        places = [divmod(i, self.rows) for i in range(step * PER_STEP, (step + 1) * PER_STEP)]
        name = "spare" if attempt else ""
        return [make_prompt(f"train-{(i + e) % self.rows}@{name}{e}") for e, i in places]


def make_prompt(name):
    return Prompt(prompt_id=name, text="", prompt_ids=(1,), answer="")


def make(rows=ROWS):
    config = DataConfig(train="t", prompts_per_step=PER_STEP, pass_rate=(0.25, 0.75))
    return Curriculum(Stream(rows), config)


def graded(prompt, *rewards):
    completion = Completion(completion_ids=(1,), rollout_logprobs=(0.0,), finish_reason="stop")
    return Group(prompt=prompt, completions=(completion,) * len(rewards), rewards=rewards)


def ids(prompts):
    return [prompt.prompt_id.removeprefix("train-") for prompt in prompts]


def step(curriculum, rates, *attempts):
    """The prompts of one step, whose rows have these pass rates; .5 are all others."""
    found = []
    for attempt in (0, *attempts):
        prompts = curriculum.take(attempt)
        found += ids(prompts)
        correct = [int(4 * rates.get(prompt.prompt_id[6], 0.5)) for prompt in prompts]
        rewards = [[0.6] * n + [0.4] * (4 - n) for n in correct]
        groups = [graded(p, *row) for p, row in zip(prompts, rewards, strict=True)]
        curriculum.record(groups, list)
    curriculum.commit()
    return found


def test_a_prompt_outside_is_left_out_of_its_next_epoch_only():
    curriculum, rates = make(), {"1": 1.0, "3": 0.0, "0": 0.25, "2": 0.75}
    assert step(curriculum, rates) == ["0@0", "1@0", "2@0"]
    assert curriculum.state == {"places": (3, 0), "outside": ["train-1"]}
    assert step(curriculum, rates) == ["3@0", "4@0", "2@1"]  # 1@1 is passed over
    assert step(curriculum, rates) == ["4@1", "0@1", "2@2"]  # and 3@1
    assert step(curriculum, rates) == ["3@2", "4@2", "0@2"]
    assert step(curriculum, rates) == ["1@2", "4@3", "0@3"]  # without 3@3
    assert step(curriculum, rates)[:2] == ["2@3", "4@4"]  # without 1@3


def test_where_every_prompt_is_outside_every_second_epoch_is():
    curriculum, rates = make(rows=6), dict.fromkeys("012345", 1.0)
    found = [name for _ in range(10) for name in step(curriculum, rates)]
    assert Counter(name[2:] for name in found) == dict.fromkeys("02468", 6)


def test_without_any_outside_the_stream_is_the_plain_one():
    curriculum = make()
    for number in range(5):
        assert step(curriculum, {}) == ids(Stream().prompts(number))


def test_resampled_prompts_have_a_stream_of_their_own_with_the_same_rows():
    curriculum = make()
    assert step(curriculum, {"1": 1.0}, 1) == ["0@0", "1@0", "2@0", "0@spare0", "2@spare0"] + [
        "3@spare0"
    ]
    assert step(curriculum, {}, 1, 2)[:3] == ["3@0", "4@0", "1@1"]
    assert curriculum.state == {"places": (6, 10), "outside": []}


def test_what_an_interrupted_step_took_comes_again_and_a_state_goes_on_exactly():
    curriculum, rates = make(), {"1": 1.0, "2": 0.0}
    step(curriculum, rates, 1)
    saved = json.dumps(curriculum.state)
    prompts = curriculum.take(0)
    curriculum.record([graded(prompts[0], 1.0)], list)
    curriculum.take(1)
    assert json.dumps(curriculum.state) == saved
    resumed = make()
    resumed.state = json.loads(saved)
    for _ in range(4):
        assert step(curriculum, rates, 1) == step(resumed, rates, 1)
        assert curriculum.state == resumed.state


def test_a_pass_rate_is_that_of_the_graded_completions_of_all_ranks():
    curriculum = make()
    curriculum.take(0)
    rewards = {"a@0": (1.0, None, 0.0), "b@1": (None, None), "c@0": (1.0, None)}
    groups = [graded(make_prompt(name), *row) for name, row in rewards.items()]
    curriculum.record(groups, lambda own: [*own, ("d", [0.0, 0.0])])
    curriculum.commit()
    assert curriculum.state["outside"] == ["c", "d"]


def test_only_a_range_that_leaves_something_out_skips():
    assert not DataConfig(train="t").skips_prompts
    assert DataConfig(train="t", pass_rate=(0.0, 0.9)).skips_prompts
