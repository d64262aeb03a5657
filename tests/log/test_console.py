"""The step line, on a terminal and elsewhere."""

import io
import logging

from rich.console import Console

from laser_fast.log.console import StepConsole, evaluation_line, step_line

METRICS = {
    "reward/mean": 0.5312,
    "score/mean_correct": 0.62,
    "score/mean_incorrect": None,
    "score/f1": 0.744,
    "step/grad_norm": 0.518,
    "time/rollout": 1.25,
    "time/loss": 0.62,
    "advantage/zero_std_groups": 0.1,
}


def test_line_has_what_the_step_has():
    assert step_line(12, 120, METRICS) == (
        "step  12/120  reward 0.531  score +0.62/-  F1 0.74  grad 0.52  1.9 s"
    )
    assert step_line(0, 5, {}) == "step 0/5"


def test_line_of_an_evaluation():
    report = {"accuracy": 0.8, "f1": None, "auroc": 0.91, "mean_correct": 0.62, "ece": 0.1}
    assert evaluation_line(5, report) == (
        "evaluation after 5 steps: accuracy 0.800  score +0.62/-  AUROC 0.91"
    )


def test_plain_lines_without_a_terminal(caplog):
    caplog.set_level(logging.INFO)
    stream = io.StringIO()
    console = StepConsole(120, console=Console(file=stream))
    console.show_step(12, METRICS)
    console.show("saved")
    console.close()
    line = step_line(12, 120, METRICS)
    assert step_line(12, 120, METRICS, seconds_left=200.1) == f"{line}  0:03:20 left"
    assert [record.message for record in caplog.records] == [line, "saved"]
    assert stream.getvalue() == ""


def test_bar_below_the_lines_on_a_terminal():
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, width=60, color_system=None)
    console = StepConsole(120, first_step=7, console=terminal)
    console.show_step(12, METRICS)
    console.close()
    shown = stream.getvalue()
    # The line is longer than the terminal and keeps its brackets and its one line.
    assert step_line(12, 120, METRICS) + "\n" in shown
    assert "7/120" in shown and "13/120" in shown


def test_time_left_of_a_resumed_run(monkeypatch):
    now, lines = [100.0], []
    console = StepConsole(7, first_step=3, console=Console(file=io.StringIO()))
    console._bar.get_time = lambda: now[0]
    monkeypatch.setattr(console, "show", lines.append)
    for step, seconds in zip(range(3, 7), (90.0, 20.0, 20.0, 20.0), strict=True):
        now[0] += seconds
        console.show_step(step, {"time/loss": seconds})
        now[0] += 10.0 if step == 4 else 0.0  # an evaluation, say
    found = [line.partition("s  ")[2].removesuffix(" left") for line in lines]
    assert found == ["", "0:00:40", "0:00:25", ""]  # 2 x 20, 1 x (20 + 10 + 20) / 2
