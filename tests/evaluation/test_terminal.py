"""What a person sees: tables in 80 columns, and a configuration that stands alone on stdout."""

import io
import tomllib

import pytest
from rich.console import Console

from laser_fast.config import ConfigError
from laser_fast.evaluation.calibrate import Reading, rank_candidates
from laser_fast.evaluation.statistics import ReportOptions, average, build_report, summarize
from laser_fast.evaluation.terminal import print_calibration, print_report
from laser_fast.log.metrics import BENCHMARK, RUN, shown_at


@pytest.fixture(scope="module")
def content(random_records):
    parts = [
        build_report(random_records(12, n), options=ReportOptions(num_resamples=20)) for n in (2, 8)
    ]
    reports = {"one": parts[0][0], "two": parts[1][0]}
    score = {"token": "<z>", "beta": 0.1, "ref_logprob": -20.0, "ref_logprob_is_measured": True}
    draws = [part[1] for part in parts]
    return {
        "score": score,
        "benchmarks": reports,
        "average": average(list(reports.values()), draws),
    }


def test_tables_hold_every_number_within_80_columns(content):
    console = Console(width=80, record=True, file=io.StringIO())
    print_report(content, console)
    text = console.export_text()
    assert "c_ref -20.000, measured on these completions" in text
    for benchmark in content["benchmarks"].values():
        for name in ("weighted_majority@2", "f1", "auroc_within", "ece_corrected", "brier"):
            entry = benchmark["metrics"][name]
            shown = [f"{entry[part]:.3f}".lstrip("0") for part in ("value", "low", "high")]
            assert f"{shown[0]} ({shown[1]}, {shown[2]})" in text
    mean = text[text.index("mean over benchmarks") :]
    entry = content["average"]["metrics"]["weighted_majority@2"]
    assert f"{entry['value']:.3f}".lstrip("0") in mean and "weighted maj@k" in mean
    assert "..." not in text and "\u2026" not in text


def test_labels_are_of_metrics_that_there_are(content, random_records):
    metrics = content["benchmarks"]["two"]["metrics"]
    suffix = {"vote": "@8", "gain": "@8"}
    shown = {metric.name + suffix.get(metric.stage, "") for metric in shown_at(BENCHMARK)}
    assert shown <= metrics.keys()
    assert {key for key in metrics if key.endswith("_corrected")} <= shown
    assert {metric.name for metric in shown_at(RUN)} <= summarize(random_records(2, 2)).keys()


def test_without_scores_only_votes_are_shown(make_record):
    records = [make_record("a", i, score=None, score_logprob=None) for i in range(2)]
    report, _ = build_report(records, options=ReportOptions(num_resamples=2))
    console = Console(width=80, record=True, file=io.StringIO())
    print_report({"benchmarks": {"plain": report}}, console)
    text = console.export_text()
    assert "pass@k" in text and "maj@k" in text and "1 problems, 2 completions" in text
    assert "weighted" not in text and "self-verification" not in text


def test_a_best_score_below_the_mean_is_a_warning(make_record):
    def shown(best):
        """Of each problem's four completions three are right; `best` says what the fourth has."""
        records = [
            make_record(
                f"p{p}", i, reward=float(i > 0), answer=str(i > 0), score=0.8 if i else best
            )
            for p in range(30)
            for i in range(4)
        ]
        report, _ = build_report(records, options=ReportOptions(num_resamples=20))
        console = Console(width=80, record=True, file=io.StringIO())
        print_report({"benchmarks": {"one": report}}, console)
        return console.export_text()

    assert "warning: best of 4 by score is -.750 (-.750, -.750) off the mean accuracy" in shown(0.9)
    text = shown(0.2)
    assert "warning" not in text and "at the threshold of the other half: F1 1.00" in text
    assert "posterior maj@k" in text and "samples, stopping by posterior" in text


def _calibration(*logprobs):
    rows = [
        Reading(
            template="chat", prompt_id=f"p{i}", eos="<eos>", completion_ids=(1,), logprobs=[value]
        )
        for i, value in enumerate(logprobs)
    ]
    return rank_candidates(rows, {"<|z|>": 40})


def test_calibration_prints_a_configuration(capsys):
    print_calibration(_calibration(-23.0, -23.2))
    captured = capsys.readouterr()
    assert tomllib.loads(captured.out) == {
        "score": {"token": "<|z|>", "beta": 0.1, "ref_logprob": -23.1, "position": "eos"}
    }
    assert "<|z|>" in captured.err and "warning" not in captured.err


def test_calibration_warns_of_a_blurred_constant(capsys):
    print_calibration(_calibration(-22.0, -24.0))
    assert "beta * std = 0.100 > 0.05" in capsys.readouterr().err


def test_calibration_refuses_a_beta_that_no_target_survives(capsys):
    with pytest.raises(ConfigError, match=r"must stay well below 0; choose beta >= 0.115"):
        print_calibration(_calibration(-11.7, -11.7), beta=0.05)
    with pytest.raises(ConfigError, match="even .* has c_ref = -2.00; the score needs a token"):
        print_calibration(_calibration(-2.0, -2.0))
