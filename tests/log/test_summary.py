"""summary.json and the table at the end of a run."""

import io

from rich.console import Console

from laser_fast.log.console import print_summary, summarize_run


def _report(**changes):
    report = {
        "num_prompts": 400,
        "samples_per_prompt": 8,
        "accuracy": 0.5,
        "f1": 0.1,
        "tpr": 0.2,
        "tnr": 0.9,
        "auroc": 0.45,
        "ece": 0.3,
        "ece_corrected": 0.25,
        "majority": 0.83,
        "weighted_majority": 0.82,
        "best_of": 0.6,
        "uses_scores": False,
    }
    return report | changes


def test_summary_has_the_promised_keys():
    after = _report(accuracy=0.84, f1=0.76, auroc=0.85, majority=0.93, weighted_majority=0.94)
    summary = summarize_run(_report(), after, steps=120, wall_seconds=77.5)
    expected = {
        "accuracy_before": 0.5,
        "accuracy_after": 0.84,
        "self_verification_f1_before": 0.1,
        "self_verification_f1_after": 0.76,
        "auroc_after": 0.85,
        "majority_at_8": 0.93,
        "weighted_majority_at_8": 0.94,
        "wall_seconds": 77.5,
    }
    assert expected.items() <= summary.items()


def test_votes_are_named_after_their_number():
    summary = summarize_run({}, _report(samples_per_prompt=4), steps=1, wall_seconds=1.0)
    assert summary["majority_at_4"] == 0.83 and "majority_at_8" not in summary
    assert summary["accuracy_before"] is None


def test_run_without_evaluation():
    summary = summarize_run({}, {}, steps=3, wall_seconds=1.0)
    assert summary["steps"] == 3 and summary["accuracy_after"] is None
    assert not any(key.startswith("majority") for key in summary)


def _printed(before, after) -> str:
    stream = io.StringIO()
    print_summary(before, after, steps=120, seconds=77.4, console=Console(file=stream, width=100))
    return stream.getvalue()


def test_table_shows_both_sides():
    shown = _printed(_report(f1=None), _report(accuracy=0.84, uses_scores=True))
    rows = {
        line.split("\u2502")[1].strip(): [cell.strip() for cell in line.split("\u2502")[2:4]]
        for line in shown.splitlines()
        if line.count("\u2502") == 4
    }
    assert rows["accuracy"] == ["0.500", "0.840"]
    assert rows["self-verification F1"] == ["-", "0.100"]
    assert rows["AUROC"] == ["0.450", "0.450"]
    assert rows["maj@8"] == ["0.830", "0.830"]
    assert rows["weighted maj@8"] == ["0.820", "0.820"]
    assert rows["best@8 by score"] == ["0.600", "0.600"]
    assert rows["ECE, prior corrected"] == ["0.250", "0.250"]
    assert "400 held-out problems, 8 completions each" in shown
    assert "the weighted vote is the plain one" in shown
    assert "120 steps, 77 s" in shown


def test_no_table_without_evaluation():
    shown = _printed({}, {})
    assert "held-out" not in shown and "120 steps" in shown
