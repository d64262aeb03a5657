"""`rescore --store`: a threshold goes into a model's folder, and reads other problems only."""

import json
import shutil
import sys
from dataclasses import replace

import pytest

from laser_fast.cli import main
from laser_fast.config import ConfigError, ScoreConfig
from laser_fast.evaluation.evaluate import run_evaluation
from laser_fast.evaluation.rescore import rescore_evaluation
from laser_fast.evaluation.settings import build_config, read_calibrated, write_score_settings
from laser_fast.evaluation.statistics import ReportOptions

FEW = ReportOptions(num_resamples=5)
BY_FILE, BY_HALF = "the model's file", "the other half"


def _readers(folder):
    reports = folder.read_report()["benchmarks"]
    return {name: report["calibrated_by"] for name, report in reports.items()}


@pytest.mark.slow
def test_a_stored_threshold_reads_other_problems_only(
    sandbox_model, sandbox, tmp_path, monkeypatch
):
    model = tmp_path / "model"
    shutil.copytree(sandbox_model, model)
    other = replace(sandbox, name="other")

    def evaluate(out, *benchmarks, ref_logprob=-9.5):
        overrides = ["score.token=<|reserved_0|>", "score.beta=0.2", "rollout.max_num_seqs=64"]
        overrides.append(f"score.ref_logprob={ref_logprob}")
        measured = [(b, build_config(str(model), b, overrides=overrides)) for b in benchmarks]
        return run_evaluation(measured, tmp_path / out, samples=4, limit=6, report=FEW)

    evaluate("first", sandbox)
    write_score_settings(model, ScoreConfig(token="<|reserved_0|>", beta=0.2, ref_logprob=-9.5))
    command = ["laser-fast", "rescore", str(tmp_path / "first"), str(tmp_path / "half")]
    monkeypatch.setattr(sys, "argv", [*command, "--store", str(model)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    report = json.loads((tmp_path / "half" / "report.json").read_text())["benchmarks"]["sandbox"]
    assert report["calibrated_by"] == BY_HALF
    stored = read_calibrated(model, {"beta": 0.2, "ref_logprob": -9.5})
    assert stored == report["calibrated"] | {"by": "sandbox"}

    both = evaluate("both", sandbox, other)
    assert _readers(both) == {"sandbox": BY_HALF, "other": BY_FILE}
    assert both.read_report()["benchmarks"]["other"]["base_rate"] == stored["base_rate"]
    # Another beta or c_ref makes other scores, of which the stored threshold says nothing.
    assert _readers(evaluate("moved", other, ref_logprob=-9.0)) == {"other": BY_HALF}
    again = rescore_evaluation(both.path, tmp_path / "beta", FEW, beta=0.3)
    assert _readers(again)["other"] == BY_HALF
    again = rescore_evaluation(both.path, tmp_path / "reward", FEW, reward="gsm8k")
    assert _readers(again)["other"] == BY_HALF
    with pytest.raises(ConfigError, match="only training moves c_ref"):
        rescore_evaluation(both.path, tmp_path / "x", FEW, ref_logprob="floating")
    with pytest.raises(ConfigError, match="expected the exported model that gave the samples"):
        rescore_evaluation(tmp_path / "first", tmp_path / "x", FEW, store=tmp_path / "nowhere")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ConfigError, match="name the samples.jsonl of one benchmark"):
        rescore_evaluation(both.path, tmp_path / "x", FEW, store=model)
