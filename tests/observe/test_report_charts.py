"""Diagrams of the report: where the ink goes, by hand."""

import json
import re

import pytest

from laser_fast.observe.report_charts import Series, embed_json, line_chart, stacked_chart, ticks


def _paths(html, name):
    return re.findall(rf'class="{name}[^"]*" d="([^"]*)"', html)


def test_ticks_are_round_and_inside():
    assert ticks(0, 1) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0, 119) == [0, 20, 40, 60, 80, 100]
    assert ticks(-0.031, 0.052) == [-0.02, 0.0, 0.02, 0.04]
    assert ticks(9_000, 31_000) == [10_000, 15_000, 20_000, 25_000, 30_000]


def test_line_runs_from_corner_to_corner():
    series = Series(label="up", color=2, points=[(0, 0.0), (10, 1.0)])
    html = line_chart("a < b", [series], limits=(0.0, 1.0), guide=0.5)
    # The frame: x from 50 to 430, y from 208 up to 8.
    assert _paths(html, "line c2") == ["M50.0 208.0L430.0 8.0"]
    assert _paths(html, "guide") == ["M50.0 108.0L430.0 108.0"]
    assert "<h3>a &lt; b</h3>" in html and "up</span>" in html
    data = json.loads(re.search(r"json\">(.*?)</script>", html)[1])
    assert data == {
        "x": [50.0, 430.0, 0, 10],
        "series": [{"label": "up", "color": 2, "points": [[0, 0.0], [10, 1.0]]}],
    }


def test_logarithmic_axis():
    series = Series(label="norm", color=0, points=[(0, 1e-2), (1, 1.0), (2, 1e2)])
    html = line_chart("norm", [series], is_log=True)
    (first, middle, last) = [
        float(point.split(" ")[1]) for point in _paths(html, "line")[0][1:].split("L")
    ]
    # Equal factors are equal heights.
    assert first - middle == pytest.approx(middle - last, abs=0.11)
    labels = re.findall(r'text-anchor="end">([^<]*)<', html)
    assert labels == ["0.01", "0.1", "1", "10", "100"]
    narrow = Series(label="gap", color=0, points=[(0, 2.1e-7), (1, 2.9e-7)])
    labels = re.findall(r'text-anchor="end">([^<]*)<', line_chart("g", [narrow], is_log=True))
    assert len(labels) >= 3 and all(1.8e-7 < float(label) < 3.4e-7 for label in labels)


def test_second_run_is_dashed_and_hollow_and_named_once():
    runs = [Series(label="reward", color=0, points=[(0, 0.0), (1, 1.0)], run=run) for run in (0, 1)]
    marks = Series(label="held out", color=1, points=[(1, 0.5)], run=1, kind="marks")
    html = line_chart("reward", [*runs, marks], is_comparison=True)
    assert len(_paths(html, "line c0")) == 2 and html.count('class="line c0 dashed"') == 1
    assert html.count('class="mark hollow c1"') == 1 and not _paths(html, "raw")
    assert html.count("reward</span>") == 1
    assert '"A: reward"' in html and '"B: reward"' in html


def test_flat_and_single_values_have_an_axis():
    flat = Series(label="zero", color=0, points=[(0, 0.0), (1, 0.0)])
    assert _paths(line_chart("flat", [flat], limits=(0.0, None)), "line") == [
        "M50.0 208.0L430.0 208.0"
    ]
    single = Series(label="one", color=0, points=[(5, 3.0)])
    html = line_chart("single", [single])
    assert 'cx="240.0" cy="108.0"' in html and not _paths(html, "line")
    assert line_chart("none", [Series(label="none", color=0, points=[])]) == ""


def test_areas_stand_on_each_other():
    layers = [
        Series(label="loss", color=1, points=[(0, 1.0), (1, 1.0)]),
        Series(label="rollout", color=0, points=[(0, 3.0), (1, 0.0)]),
    ]
    html = stacked_chart("time", layers, top=4 / 1.04)
    # 4 units fill 200: one second is 50 high.
    assert _paths(html, "area c1") == ["M50.0 158.0L430.0 158.0L430.0 208.0L50.0 208.0Z"]
    assert _paths(html, "area c0") == ["M50.0 8.0L430.0 158.0L430.0 158.0L50.0 158.0Z"]
    assert stacked_chart("time", []) == ""


def test_json_cannot_close_its_element():
    text = "</script><b>"
    assert "<" not in embed_json({"label": text})
    assert json.loads(embed_json({"label": text})) == {"label": text}
