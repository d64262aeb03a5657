"""Diagrams of runs and evaluations: which numbers are drawn, where, and in what form."""

import re
import struct
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from report_runs import make_run

from laser_fast.log.metrics import BLUE, GREEN, GREY, ORANGE, PANELS, RED, Panel
from laser_fast.log.run_folder import Run, read_run
from laser_fast.report.charts import (
    Curve,
    draw_curves,
    draw_panel,
    draw_reliability,
    draw_scores,
    draw_stages,
    draw_votes,
    evaluation_diagrams,
    panel_curves,
    save_png,
    smooth,
    stage_curves,
    svg_figure,
)


def _run(steps, evaluations=()):
    return Run(name="run", config={}, config_text="", steps=steps, evaluations=evaluations)


def _axes():
    return Figure().add_subplot()


def _size(path) -> tuple[int, int]:
    """Width and height from the PNG's header."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_smoothing_by_hand():
    np.testing.assert_allclose(smooth([1.0, 2.0, 6.0, 3.0], 1), [1.5, 3.0, 11 / 3, 4.5])
    np.testing.assert_allclose(smooth([1.0, 5.0, 2.0], 0), [1.0, 5.0, 2.0])
    np.testing.assert_allclose(smooth([4.0], 3), [4.0])
    np.testing.assert_allclose(smooth([1.0, 3.0], 9), [2.0, 2.0])


def test_only_panels_with_data_are_drawn(tmp_path):
    keys = [key for panel in PANELS for key in panel.lines]
    full = [{"step": s} | dict.fromkeys(keys, 0.1 * s) for s in range(5)]
    full[2]["score/f1"] = None
    evaluations = [{"step": 0, "accuracy": 0.5, "f1": None}, {"step": 5, "accuracy": 0.8}]
    draw_curves(_run(full, evaluations), tmp_path / "full.png")
    draw_curves(_run([{"step": 0, "reward/mean": 0.5}]), tmp_path / "one.png")
    width, height = _size(tmp_path / "full.png")
    assert len(PANELS) == 16 and _size(tmp_path / "one.png") == (width, height // 4)


def test_every_panel_reads_a_documented_stage():
    stages = {"reward", "score", "advantage", "loss", "rollout", "step", "throughput", "memory"}
    assert {key.split("/")[0] for panel in PANELS for key in panel.lines} <= stages


def test_lines_come_from_steps_and_marks_from_evaluations():
    panel = Panel("p", {"a/b": ("line", BLUE)}, {"c": ("mark", RED)}, is_log=True)
    steps = [
        {"step": step, "a/b": value} for step, value in enumerate((0.1, 0.0, None, "x", True, 0.2))
    ]
    first, second = _run(steps, [{"step": 6, "c": 0.5}]), _run([{"step": 0}])
    assert panel_curves(panel, [second, first]) == [
        Curve(label="line", color=BLUE, points=[(0, 0.1), (5, 0.2)], run=1),
        Curve(label="held out: mark", color=RED, points=[(6, 0.5)], kind="marks", run=1),
    ]


def test_raw_values_are_drawn_below_the_smoothed_ones():
    values = np.random.default_rng(0).random(100)
    curve = Curve(label="up", color=BLUE, points=list(enumerate(values)))
    axes = _axes()
    draw_panel(axes, Panel("p", {}, guide=0.5, limits=(0.0, None)), [curve])
    guide, raw, line = axes.lines
    assert list(guide.get_ydata()) == [0.5, 0.5]
    np.testing.assert_array_equal(raw.get_ydata(), values)
    np.testing.assert_array_equal(line.get_ydata(), smooth(values, 2))
    assert raw.get_alpha() < 0.5 and line.get_alpha() is None
    assert axes.get_ylim()[0] == 0.0 and axes.get_xlabel() == "step"


def test_second_run_is_dashed_and_hollow_and_named_once():
    runs = [Curve(label="reward", color=BLUE, points=[(0, 0.0), (1, 1.0)], run=r) for r in (0, 1)]
    marks = Curve(label="held out", color=RED, points=[(1, 0.5)], run=1, kind="marks")
    axes = _axes()
    draw_panel(axes, Panel("reward", {}), [*runs, marks])
    solid, dashed, hollow = axes.lines
    assert not solid.is_dashed() and dashed.is_dashed() and solid.get_color() == dashed.get_color()
    assert (hollow.get_marker(), hollow.get_fillstyle()) == ("o", "none")
    figure = svg_figure("reward", lambda axes: draw_panel(axes, Panel("", {}), [*runs, marks]))
    assert figure.legend == [("reward", "line", "c0"), ("held out", "marks", "c3")]
    assert [s["label"] for s in figure.data["series"]] == ["A: reward", "B: reward", "B: held out"]


@pytest.mark.parametrize(
    ("values", "scale", "labels"),
    [
        ((1e-2, 1.0, 1e2), "log", {"0.01", "0.1", "1", "10", "100"}),
        ((2e-7, 4e-6), "log", {"2e-7", "5e-7", "1e-6", "2e-6"}),
        ((2e-7, 4e-7), "linear", {"2e-7", "2.5e-7", "3e-7", "3.5e-7", "4e-7"}),
    ],
)
def test_logarithmic_axis(values, scale, labels):
    curve = Curve(label="norm", color=BLUE, points=list(enumerate(values)))
    drawn = []

    def draw(axes):
        drawn.append(axes)
        return draw_panel(axes, Panel("norm", {}, is_log=True), [curve])

    texts = set(re.findall(r"<text[^>]*>([^<]*)<", svg_figure("norm", draw).svg))
    assert drawn[0].get_yscale() == scale and labels <= texts


def test_figure_is_svg_that_follows_the_page():
    curve = Curve(label="up & on", color=GREEN, points=[(0, 0.0), (10, 0.123456)])
    figure = svg_figure("a < b", lambda axes: draw_panel(axes, Panel("", {}), [curve]))
    root = ElementTree.fromstring(figure.svg)
    assert root.tag.endswith("svg") and "var(--c2)" in figure.svg
    # No style sheet, no font, no fixed colour but black marks of length 0.
    assert "<style" not in figure.svg and "font-family" not in figure.svg
    assert set(re.findall(r"#[0-9a-f]{6}", figure.svg)) <= {"#000000"}
    path = next(e.get("d") for e in root.iter() if "c2" in (e.get("style") or ""))
    (x0, y0), (x1, y1) = [map(float, p.split()) for p in re.findall(r"[ML] ([\d.]+ [\d.]+)", path)]
    (series,) = figure.data["series"]
    assert series["points"] == [
        [pytest.approx(x0, abs=0.06), 0, 0],
        [pytest.approx(x1, abs=0.06), 10, 0.1235],
    ]
    left, top, right, bottom = figure.data["box"]
    width, height = map(float, root.get("viewBox").split()[2:])
    assert 0 < left < x0 < x1 < right < width and 0 < top < y1 < y0 < bottom < height
    assert svg_figure("a < b", lambda axes: draw_panel(axes, Panel("", {}), [curve])) == figure


def test_flat_and_single_values_have_an_axis():
    axes = _axes()
    draw_panel(axes, Panel("", {}), [Curve(label="one", color=BLUE, points=[(5, 3.0)])])
    assert axes.lines[0].get_marker() == "o"
    low, high = axes.get_ylim()
    assert low < 3.0 < high
    for values, top in (((0.0, 0.0), 1.0), ((5.0, 4.0), 5.3)):
        axes = _axes()
        curve = Curve(label="flat", color=BLUE, points=list(enumerate(values)))
        draw_panel(axes, Panel("", {}, limits=(0.0, None)), [curve])
        assert axes.get_ylim() == (0.0, pytest.approx(top))


def test_long_curve_keeps_its_ends(tmp_path):
    run = read_run(make_run(tmp_path / "run", steps=3000))
    panel = Panel("reward", {"reward/mean": ("reward", BLUE)})
    curves = panel_curves(panel, [run])
    figure = svg_figure("reward", lambda axes: draw_panel(axes, panel, curves))
    points = figure.data["series"][0]["points"]
    assert len(points) == 400 and [points[0][1], points[-1][1]] == [0, 2999]
    stages = stage_curves(run)
    assert {len(curve.points) for curve in stages} == {120}
    assert stages[0].points[0] == (12.0, pytest.approx((24 * 0.75) / 25))


def test_stages_stand_on_each_other(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    curves = stage_curves(run)
    assert [(curve.label, curve.color) for curve in curves] == [
        ("loss 0.725 s, 74%", ORANGE),
        ("rollout 0.25 s, 26%", BLUE),
        ("other 0.0001 s, 0%", GREY),
    ]
    axes = _axes()
    draw_stages(axes, curves, 2.0)
    lower, upper = (area.get_paths()[0].vertices for area in axes.collections[:2])
    assert lower[:, 1].max() == 0.75 and upper[:, 1].max() == 1.0
    assert axes.get_ylim() == (0.0, 2.08)
    assert stage_curves(_run([{"step": 0, "time/loss": 0.0}])) == stage_curves(_run([])) == []


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
    axes = _axes()
    majority, weighted = draw_votes(axes, report, (0.3, 0.9))
    assert majority == Curve(label="majority of k", color=BLUE, points=[(1, 0.5), (4, 0.7)])
    assert weighted.points == [(1, 0.5), (4, 0.75)]
    band = axes.collections[0].get_paths()[0].vertices
    assert {(1.0, 0.4), (1.0, 0.6), (4.0, 0.6), (4.0, 0.8)} <= set(map(tuple, band))
    assert axes.get_ylim() == (0.3, 0.9)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "4"]
    assert draw_votes(_axes(), report | {"uses_scores": False}, (0, 1)) == [majority]


def test_reliability_marks_grow_with_their_share():
    bins = [
        {"count": 30, "confidence": 0.2, "accuracy": 0.1},
        {"count": 10, "confidence": 0.8, "accuracy": 0.9},
    ]
    report = {
        "reliability": {"raw": bins, "corrected": bins[:1]},
        "metrics": {"ece": {"value": 0.1}, "ece_corrected": {"value": None}},
    }
    axes = _axes()
    raw, corrected = draw_reliability(axes, report)
    assert raw.points == [(0.2, 0.1), (0.8, 0.9)] and corrected.points == [(0.2, 0.1)]
    assert [raw.label[-9:], corrected.label[-5:]] == ["ECE 0.100", "ECE -"]
    np.testing.assert_allclose(axes.collections[0].get_sizes(), [12 + 375, 12 + 125])


def test_evaluation_as_png(tmp_path):
    report = _votes(**{"majority@1": (0.4, 0.5, 0.6), "majority@4": (0.6, 0.7, 0.8)})
    bins = [{"count": 30, "confidence": 0.2, "accuracy": 0.1}]
    report["metrics"] |= {"ece": {"value": 0.1}, "ece_corrected": {"value": 0.2}}
    scored = report | {"reliability": {"raw": bins, "corrected": bins}}
    sample = {"score": 0.9, "reward": 1.0, "finish_reason": "stop"}
    diagrams = evaluation_diagrams(scored, [sample])
    assert [draw for _, draw, *_ in diagrams] == [draw_votes, draw_reliability, draw_scores]
    save_png(tmp_path / "three.png", diagrams, columns=3)
    alone = evaluation_diagrams(report | {"reliability": {}}, [sample])
    save_png(tmp_path / "one.png", alone, columns=1)
    (width, height), one = _size(tmp_path / "three.png"), _size(tmp_path / "one.png")
    assert (width, height) == (3 * one[0], one[1]) == (1425, 360)


def test_score_histogram_has_finished_graded_completions():
    def sample(score, reward, finish_reason="stop"):
        return {"score": score, "reward": reward, "finish_reason": finish_reason}

    samples = [sample(0.9, 1.0)] * 3 + [sample(0.1, 0.0)] * 2
    samples += [sample(0.0, 0.0, "length"), sample(None, 1.0), sample(0.5, None)]
    correct, incorrect = draw_scores(_axes(), samples)
    assert (correct.label, incorrect.label) == ("correct (3)", "incorrect (2)")
    for curve, score in ((correct, 0.9), (incorrect, 0.1)):
        x, heights = np.array(curve.points).T
        assert heights.sum() * (x[1] - x[0]) == pytest.approx(1.0)
        assert abs(x[heights.argmax()] - score) < x[1] - x[0]
    assert draw_scores(_axes(), []) == []
