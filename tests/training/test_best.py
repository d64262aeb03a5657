"""Which checkpoint is the best, and when a run has looked for it long enough."""

from types import SimpleNamespace

import pytest

from laser_fast.config import Config, ConfigError
from laser_fast.log.jsonl import write_lines
from laser_fast.training.best import standing
from laser_fast.training.sampler import Sampler

BASE = {"model": {"path": "m"}, "optim": {"steps": 9}}


def config_of(folder, data=None, **checkpoint):
    data = {"train": "t", "eval": "e", "eval_every": 1} if data is None else data
    sections = {"output_dir": str(folder), "data": data, "checkpoint": checkpoint}
    return Config.parse(BASE | sections, source="test")


@pytest.fixture
def run(tmp_path):
    """A run that has evaluated after 0, 2, 4, 6 and 8 steps, and saved some of them."""
    numbers = {0: 0.9, 2: 0.5, 4: 0.7, 6: 0.7, 8: 0.6}
    equal = ("accuracy", "brier", "mean_length_correct")
    lines = [{"step": s, **dict.fromkeys(equal, a), "f1": None} for s, a in numbers.items()]
    write_lines(tmp_path / "evaluations.jsonl", lines)
    for name in ("step-000000", "step-000004", "step-000006", ".step-000008.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("best", "unsaved", "expected"),
    [
        ("accuracy", (), (4, 0.7, 2)),  # the first of equals, and not the untrained model's
        ("eval/accuracy", (8,), (4, 0.7, 2)),
        ("brier", (), (4, 0.7, 2)),  # of those that are saved
        ("brier", (2,), (2, 0.5, 3)),  # lower is better
        ("mean_length_correct", (2,), (2, 0.5, 3)),
        ("accuracy", (7,), (4, 0.7, 2)),  # saved, and never evaluated
    ],
)
def test_the_best_is_that_of_the_first_best_evaluation(run, best, unsaved, expected):
    assert standing(config_of(run, best=best), *unsaved)[:3] == expected


def test_patience_counts_the_evaluations_after_the_best(run):
    over = [standing(config_of(run, best="accuracy", patience=n)).is_over for n in (0, 2, 3)]
    assert over == [False, True, False]
    nothing = standing(config_of(run, best="f1", patience=4))  # undefined at every step
    assert (nothing.step, nothing.num_since, nothing.is_over) == (None, 4, True)
    assert standing(config_of(run)).step is None
    assert standing(config_of(run / "new", best="accuracy", patience=1)).num_since == 0


def test_no_step_is_sampled_ahead_across_a_checkpoint_that_may_come(tmp_path):
    for best, starts in (("", [1, 2, 3, 5, 6, 7]), ("accuracy", [1, 3, 5, 7])):
        config = config_of(
            tmp_path, {"train": "t", "eval": "e", "eval_every": 2}, every=4, best=best
        )
        sampler = SimpleNamespace(config=config)
        assert [s for s in range(1, 9) if Sampler._may_start(sampler, s)] == starts


def test_what_cannot_be_watched_is_refused(tmp_path):
    with pytest.raises(ConfigError, match='"acuracy" is no number of an evaluation; use accuracy'):
        standing(config_of(tmp_path, best="acuracy"))
    with pytest.raises(ConfigError, match="best needs evaluations; name held-out prompts"):
        config_of(tmp_path, {"train": "t"}, best="accuracy")
    for keys in ({"patience": 1}, {"patience": 1, "best": "accuracy"}):
        with pytest.raises(ConfigError, match=r"patience needs checkpoint.best and data.eval_eve"):
            config_of(tmp_path, {"train": "t", "eval": "e"}, **keys)
