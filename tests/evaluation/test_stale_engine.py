"""No number comes from an engine that does not hold the model's weights."""

import pytest

from laser_fast.evaluation.calibrate import calibrate
from laser_fast.evaluation.evaluate import run_evaluation
from laser_fast.evaluation.settings import build_config
from laser_fast.evaluation.statistics import ReportOptions
from laser_fast.rollout.engine import CopyingEngine, DisagreementError

SCORE = ["score.token=<|reserved_0|>", "score.beta=0.2", "score.ref_logprob=-9.5"]


class Stale(CopyingEngine):
    """Takes weights and goes on with its own."""

    def token_logprobs(self, groups, *, temperature):
        return [[-99.0] * len(c.completion_ids) for group in groups for c in group.completions]


@pytest.mark.parametrize("verb", ["evaluate", "calibrate"])
def test_an_engine_that_kept_other_weights_stops_every_measurement(
    verb, sandbox_model, sandbox, tmp_path, monkeypatch
):
    monkeypatch.setattr(f"laser_fast.evaluation.{verb}.make_engine", lambda *_: Stale())
    config = build_config(str(sandbox_model), sandbox, overrides=SCORE)
    with pytest.raises(DisagreementError, match="the engine's weights are stale"):
        if verb == "evaluate":
            run_evaluation([(sandbox, config)], tmp_path, ReportOptions(), samples=2, limit=3)
        else:
            calibrate(config, sandbox, prompts=3, samples=2)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_how_far_an_engine_may_be_off_is_the_runs_or_typed(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("rollout.max_disagreement = 0.3\n")
    for is_calibration in (False, True):
        for typed, expected in (([], 0.3), (["rollout.max_disagreement=0.5"], 0.5)):
            config = build_config("m", config=file, overrides=typed, is_calibration=is_calibration)
            assert config.rollout.max_disagreement == expected
