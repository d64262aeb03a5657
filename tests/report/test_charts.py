"""Diagrams of runs and evaluations: which numbers are drawn, where, and in what form."""

import re
import struct
from functools import partial
from xml.etree import ElementTree

import matplotlib.figure
import numpy as np
import pytest
from report_runs import make_evaluation, make_run

from laser_fast.log.metrics import (
    BLUE,
    GREEN,
    METRICS,
    ORANGE,
    PANELS,
    RED,
    RUN,
    STAGES,
    VOTES,
    Metric,
    Panel,
)
from laser_fast.report import charts
from laser_fast.report.charts import (
    draw_panel,
    draw_reliability,
    draw_scores,
    draw_stages,
    draw_stopping,
    draw_votes,
    evaluation_diagrams,
    figure,
    panel_curves,
    run_diagrams,
    smooth,
    stage_times,
    svg,
)
from laser_fast.report.page import write_evaluation_plots
from laser_fast.report.runs import Run, read_run


def _run(steps, evaluations=()):
    return Run(name="run", config={}, config_text="", steps=steps, evaluations=evaluations)


def _axes():
    return matplotlib.figure.Figure().add_subplot()


def _size(path) -> tuple[int, int]:
    """Width and height from the PNG's header."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def _drawn(diagram):
    """The axes of a figure that holds one diagram."""
    return figure([diagram], columns=1).axes[0]


def _legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_smoothing_by_hand():
    short = np.array([1.0, 5.0, 2.0])
    np.testing.assert_allclose(smooth(short), short)
    values = np.arange(40.0) ** 2
    smoothed = smooth(values)
    np.testing.assert_allclose(smoothed[:3], [1 / 2, 5 / 3, 14 / 3])
    np.testing.assert_allclose(smoothed[-2:], [(37**2 + 38**2 + 39**2) / 3, (38**2 + 39**2) / 2])


def test_only_panels_with_data_are_drawn(tmp_path):
    keys = [metric.key for metric in METRICS if metric.panel]
    full = [{"step": s} | dict.fromkeys(keys, 0.1 * s) for s in range(5)]
    full[2]["score/f1"] = None
    evaluations = [{"step": 0, "accuracy": 0.5, "f1": None}, {"step": 5, "accuracy": 0.8}]
    one = _run([{"step": 0, "reward/mean": 0.5}])
    drawn = [run_diagrams([run]) for run in (_run(full, evaluations), one)]
    assert [title for title, _ in drawn[0]] == [panel.title for panel in PANELS]
    assert len(PANELS) == 17 and [title for title, _ in drawn[1]] == ["reward"]
    for name, diagrams in zip(("full.png", "one.png"), drawn, strict=True):
        figure(diagrams, columns=4).savefig(tmp_path / name)
    width, height = _size(tmp_path / "full.png")
    assert _size(tmp_path / "one.png") == (width, height // 5)


def test_every_panel_reads_a_documented_stage():
    stages = {"reward", "score", "advantage", "pack", "loss", "rollout", "step", "throughput"}
    stages |= {"memory"}
    known = {metric.stage for metric in METRICS if metric.panel}
    assert known - {"vote"} == stages


def test_lines_come_from_steps_and_marks_from_evaluations(monkeypatch):
    panel = Panel("p", is_log=True)
    metric = Metric("a/b", "label", RUN, panel, GREEN)
    monkeypatch.setattr(charts, "METRICS", (metric,))
    values = (0.1, 0.0, None, "x", True, 0.2)
    steps = [{"step": step, "a/b": value} for step, value in enumerate(values)]
    first, second = _run(steps, [{"step": 6, "b": 0.5}]), _run([{"step": 0}])
    assert panel_curves(panel, [second, first]) == [
        ("label", GREEN, [(0, 0.1), (5, 0.2)], False, 1),
        ("held out: label", GREEN, [(6, 0.5)], True, 1),
    ]


def test_raw_values_are_drawn_below_the_smoothed_ones():
    values = np.random.default_rng(0).random(100)
    axes = _axes()
    panel = Panel("p", guide=0.5, limits=(0.0, None))
    draw_panel(axes, panel=panel, curves=[("up", BLUE, list(enumerate(values)), False, 0)])
    guide, raw, line = axes.lines
    assert list(guide.get_ydata()) == [0.5, 0.5]
    np.testing.assert_array_equal(raw.get_ydata(), values)
    np.testing.assert_array_equal(line.get_ydata(), smooth(values))
    assert raw.get_alpha() < 0.5 and line.get_alpha() is None
    assert axes.get_ylim()[0] == 0.0 and axes.get_xlabel() == "step"


def test_second_run_is_dashed_and_hollow_and_named_once():
    curves = [("reward", BLUE, [(0, 0.0), (1, 1.0)], False, run) for run in (0, 1)]
    curves.append(("held out", RED, [(1, 0.5)], True, 1))
    axes = _drawn(("reward", partial(draw_panel, panel=Panel("reward"), curves=curves)))
    solid, dashed, hollow = axes.lines
    assert not solid.is_dashed() and dashed.is_dashed() and solid.get_color() == dashed.get_color()
    assert (hollow.get_marker(), hollow.get_fillstyle()) == ("o", "none")
    assert _legend(axes) == ["reward", "held out"] and axes.get_title(loc="left") == "reward"


@pytest.mark.parametrize(
    ("values", "scale", "labels"),
    [
        ((1e-2, 1.0, 1e2), "log", {"0.01", "0.1", "1", "10", "100"}),
        ((2e-7, 4e-6), "log", {"2e-07", "5e-07", "1e-06", "2e-06"}),
        ((2e-7, 4e-7), "linear", {"2e-07", "2.5e-07", "3e-07", "3.5e-07", "4e-07"}),
    ],
)
def test_logarithmic_axis(values, scale, labels):
    curves = [("norm", BLUE, list(enumerate(values)), False, 0)]
    diagram = ("norm", partial(draw_panel, panel=Panel("norm", is_log=True), curves=curves))
    texts = set(re.findall(r"<text[^>]*>([^<]*)<", svg(diagram)[1].replace("\u2212", "-")))
    assert _drawn(diagram).get_yscale() == scale and labels <= texts


def test_figure_is_svg_as_it_comes_and_repeats_itself():
    curves = [("up & on", GREEN, [(0, 0.0), (10, 0.123456)], False, 0)]
    diagrams = [
        (title, partial(draw_panel, panel=Panel(title), curves=curves)) for title in ("a < b", "c")
    ]
    (title, first), (_, second) = map(svg, diagrams)
    root = ElementTree.fromstring(first)
    assert title == "a < b" and root.tag.endswith("svg") and "<metadata" not in first
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"a < b", "up & on", "step"} <= set(texts)
    path = next(e.get("d") for e in root.iter() if GREEN in (e.get("style") or ""))
    (x0, y0), (x1, y1) = [map(float, p.split()) for p in re.findall(r"[ML] ([\d.]+ [\d.]+)", path)]
    width, height = map(float, root.get("viewBox").split()[2:])
    assert 0 < x0 < x1 < width and 0 < y1 < y0 < height
    assert svg(diagrams[0]) == (title, first)
    # What is referred to by its id is not shared by the figures of a page.
    ids, others = (set(re.findall(r"url\(#(\w+)\)", text)) for text in (first, second))
    assert ids and not ids & others


def test_flat_and_single_values_have_an_axis():
    axes = _axes()
    draw_panel(axes, panel=Panel(""), curves=[("one", BLUE, [(5, 3.0)], False, 0)])
    assert axes.lines[0].get_marker() == "o"
    low, high = axes.get_ylim()
    assert low < 3.0 < high
    for values in ((0.0, 0.0), (5.0, 4.0)):
        axes = _axes()
        curves = [("flat", BLUE, list(enumerate(values)), False, 0)]
        draw_panel(axes, panel=Panel("", limits=(0.0, None)), curves=curves)
        low, high = axes.get_ylim()
        assert low == 0.0 and high > max(values)


def test_long_curve_keeps_its_ends(tmp_path):
    run = read_run(make_run(tmp_path / "run", steps=3000))
    for title, draw in run_diagrams([run]):
        axes = _drawn((title, draw))
        for line in axes.lines:
            steps = line.get_xdata()
            is_short = len(steps) <= 2  # guides and marks
            assert is_short or len(steps) == 400 and steps[-1] == 2999, title
        assert all(len(area.get_paths()[0].vertices) < 900 for area in axes.collections)


def test_stages_stand_on_each_other(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    run.steps[3]["time/late"] = 0.03
    times = stage_times(run)
    assert list(times) == ["rollout", "loss", "other"]  # pack takes less than a hundredth
    axes = _drawn(("t", partial(draw_stages, run=run, times=times, top=2.0)))
    assert _legend(axes) == ["rollout 0.25 s, 26%", "loss 0.725 s, 74%", "other 0.0011 s, 0%"]
    lower, upper = (area.get_paths()[0].vertices for area in axes.collections[:2])
    assert lower[:, 1].max() == 0.25 and upper[:, 1].max() == 1.0
    assert axes.get_ylim() == (0.0, 2.08)
    colors = [area.get_facecolor()[0] for area in axes.collections]
    assert matplotlib.colors.to_hex(colors[1]) == STAGES["loss"] == ORANGE
    assert stage_times(_run([{"step": 0, "time/loss": 0.0}])) == stage_times(_run([])) == {}


def test_runs_share_the_scale_of_their_stages(tmp_path):
    runs = [_run([{"step": 0, "time/loss": seconds}]) for seconds in (1.0, 3.0)]
    (first, draw), (second, draw_second) = run_diagrams(runs)
    assert (first, second) == ("seconds per stage (A)", "seconds per stage (B)")
    limits = [_drawn(("", one)).get_ylim() for one in (draw, draw_second)]
    assert limits == [(0.0, pytest.approx(3.12))] * 2


def _votes(**metrics):
    entries = {
        key: dict(zip(("low", "value", "high"), values, strict=True))
        for key, values in metrics.items()
    }
    return {"ks": [1, 4], "uses_scores": True, "metrics": entries}


def test_votes_have_bands_and_leave_out_what_does_not_vote():
    report = _votes(
        **{"majority@1": (0.4, 0.5, 0.6), "majority@4": (0.6, 0.7, 0.8)},
        **{"weighted_majority@1": (0.4, 0.5, 0.6), "weighted_majority@4": (None, 0.75, None)},
        **{"best_of@1": (None, None, None)},
    )
    axes = _drawn(("votes", partial(draw_votes, report=report, limits=(0.3, 0.9))))
    majority, weighted = axes.lines
    labels = {metric.name: metric.label for metric in VOTES}
    assert _legend(axes) == [labels["majority"], labels["weighted_majority"]]
    assert list(zip(*majority.get_data(), strict=True)) == [(1, 0.5), (4, 0.7)]
    assert list(zip(*weighted.get_data(), strict=True)) == [(1, 0.5), (4, 0.75)]
    band = axes.collections[0].get_paths()[0].vertices
    assert {(1.0, 0.4), (1.0, 0.6), (4.0, 0.6), (4.0, 0.8)} <= set(map(tuple, band))
    assert axes.get_ylim() == (0.3, 0.9)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "4"]
    axes = _axes()
    draw_votes(axes, report=report | {"uses_scores": False}, limits=(0, 1))
    assert len(axes.lines) == 1


def test_votes_that_stop_early_name_what_they_need():
    curves = {
        "posterior": {"stop": [0.0, None], "samples": [1.0, 4.0], "accuracy": [0.5, 0.75]},
        "fixed": {"stop": [0, 4], "samples": [1.0, 4.0], "accuracy": [0.5, 0.7]},
    }
    needed = {"samples_posterior": {"value": 2.5}, "samples_fixed": {"value": None}}
    report = {"stopping": curves, "metrics": needed}
    axes = _drawn(("stopping", partial(draw_stopping, report=report)))
    labels = {metric.name: metric.label for metric in METRICS}
    assert _legend(axes) == [
        f"{labels['samples_posterior']}: 2.50",
        f"{labels['samples_fixed']}: -",
    ]
    drawn = [list(zip(*line.get_data(), strict=True)) for line in axes.lines]
    assert drawn == [[(1.0, 0.5), (4.0, 0.75)], [(1.0, 0.5), (4.0, 0.7)]]


def test_reliability_marks_grow_with_their_share():
    bins = [
        {"count": 30, "confidence": 0.2, "accuracy": 0.1},
        {"count": 10, "confidence": 0.8, "accuracy": 0.9},
    ]
    report = {
        "reliability": {"raw": bins, "corrected": bins[:1]},
        "metrics": {"ece": {"value": 0.1}, "ece_corrected": {"value": None}},
    }
    axes = _drawn(("reliability", partial(draw_reliability, report=report)))
    _, raw, corrected = axes.lines
    assert list(zip(*raw.get_data(), strict=True)) == [(0.2, 0.1), (0.8, 0.9)]
    assert list(zip(*corrected.get_data(), strict=True)) == [(0.2, 0.1)]
    assert [text[-9:] for text in _legend(axes)] == ["ECE 0.100", "on, ECE -"]
    np.testing.assert_allclose(axes.collections[0].get_sizes(), [12 + 375, 12 + 125])


def test_evaluation_as_png(tmp_path):
    folders = [
        make_evaluation(tmp_path / str(is_scored), {"one": 0.7, "two": 0.5}, is_scored=is_scored)
        for is_scored in (True, False)
    ]
    for folder in folders:
        write_evaluation_plots(folder)
    four, two = (_size(folder / "two" / "plots.png") for folder in folders)
    assert (folders[0] / "one" / "plots.png").is_file()
    assert four == (2 * two[0], two[1]) == (1900, 360)


def test_diagrams_of_an_evaluation():
    report = _votes(**{"majority@1": (0.4, 0.5, 0.6)}) | {"reliability": {"raw": [{}]}}
    sample = {"score": 0.9, "reward": 1.0, "finish_reason": "stop"}

    def drawn(report, samples):
        return [draw.func for _, draw in evaluation_diagrams(report, samples)]

    assert drawn(report, [sample]) == [draw_votes, draw_reliability, draw_scores]
    assert drawn(report, []) == [draw_votes, draw_reliability]
    assert drawn(report | {"reliability": {}}, [sample]) == [draw_votes]


def test_score_histogram_has_finished_graded_completions():
    def sample(score, reward, finish_reason="stop"):
        return {"score": score, "reward": reward, "finish_reason": finish_reason}

    samples = [sample(0.9, 1.0)] * 3 + [sample(0.1, 0.0)] * 2
    samples += [sample(0.0, 0.0, "length"), sample(None, 1.0), sample(0.5, None)]
    axes = _drawn(("scores", partial(draw_scores, samples=samples)))
    assert _legend(axes) == ["correct (3)", "incorrect (2)"]
    for stairs, score in zip(axes.patches, (0.9, 0.1), strict=True):
        heights, edges, _ = stairs.get_data()
        width = edges[1] - edges[0]
        assert heights.sum() * width == pytest.approx(1.0)
        assert abs(edges[heights.argmax()] + width / 2 - score) < width
    axes = _axes()
    draw_scores(axes, samples=[])
    assert not axes.patches
