"""report.html in a real browser: it has ink, sorts, searches and fits."""

import json
import re

import numpy as np
import pytest
from matplotlib.image import imread
from report_runs import CHROMIUM, browse, make_evaluation, make_run

from laser_fast.report.page import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

EVIL = "<script>document.title = 'broken in'</script><img src=x onerror=document.title='in'>"

# Added to a copy of the page: what the browser has laid out.
PROBE = """<script>
const found = [...document.querySelectorAll("figure")].map(chart => {
  const svg = chart.querySelector("svg");
  const ink = [...svg.querySelectorAll("path, use")].filter(
    one => getComputedStyle(one).stroke !== "none" || getComputedStyle(one).fill !== "none");
  const texts = [...svg.querySelectorAll("text")].map(text => text.getBoundingClientRect());
  const overlaps = texts.filter((a, i) => texts.some((b, j) => i < j && a.left < b.right
    && b.left < a.right && a.top < b.bottom - 2 && b.top < a.bottom - 2)).length;
  return {title: chart.getAttribute("aria-label"), overlaps,
    width: svg.getBoundingClientRect().width,
    lengths: ink.map(one => one.getTotalLength?.() ?? 0)};
});
document.body.dataset.found = JSON.stringify({charts: found, scroll: document.body.scrollWidth,
  window: innerWidth, errors: window.errors, injected: document.querySelectorAll("img").length});
</script>"""
ERRORS = (
    "<script>window.errors = []; onerror = message => { window.errors.push(message); };</script>"
)


def _probe(report, folder, *options):
    """What the probe found in the page, and the page after its script has run."""
    html = report.read_text(encoding="utf-8")
    report.write_text(
        html.replace("<body>", f"<body>{ERRORS}", 1).replace("</body>", f"{PROBE}</body>"),
        encoding="utf-8",
    )
    dom = browse(report, folder, "--dump-dom", *options)
    text = re.search(r'data-found="([^"]*)"', dom)[1]
    return json.loads(text.replace("&quot;", '"').replace("&amp;", "&")), dom


def _visible(dom):
    """Prompts of the sample rows that are not hidden, in their order."""
    body = re.search(r'<table class="samples">.*?<tbody>(.*?)</tbody>', dom, re.DOTALL)[1]
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    return [re.search(r"<pre>(.*?)</pre>", row, re.DOTALL)[1] for row in rows]


def test_every_chart_has_ink(tmp_path):
    samples = [{"step": 0, "prompt": EVIL, "text": "</td></table>", "score": 0.5}]
    run = make_run(tmp_path / "run", samples=samples)
    make_evaluation(run / "eval", {"chains": 0.7})
    found, dom = _probe(write_report(run), tmp_path / "profile", "--window-size=1400,900")
    assert found["errors"] == [] and found["injected"] == 0
    assert 'data-ready="yes"' in dom and "<title>run</title>" in dom and "1 of 1 shown" in dom
    charts = {chart["title"]: chart for chart in found["charts"]}
    assert len(charts) == 9 + 3
    for title, chart in charts.items():
        # Axes and grid aside, at least one path runs across a good part of the chart.
        assert max(chart["lengths"]) > 100, title
        assert chart["overlaps"] == 0 and chart["width"] > 300, title


def test_two_runs_side_by_side_on_a_phone(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", loss_coef=0.2)]
    for run in runs:
        make_evaluation(run / "eval", {"chains": 0.7})
    found, dom = _probe(write_report(*runs), tmp_path / "profile", "--window-size=500,900")
    assert found["errors"] == [] and found["scroll"] <= found["window"] == 500
    charts = {chart["title"]: chart for chart in found["charts"]}
    assert {"seconds per stage (A)", "seconds per stage (B)"} <= charts.keys()
    assert [chart["title"] for chart in found["charts"] if chart["overlaps"]] == []
    assert re.search(r'<b class="run">B</b> eval</th>', dom)


def test_search_and_sort_by_address(tmp_path):
    report = write_report(make_run(tmp_path / "a"), make_run(tmp_path / "b", loss_coef=0.2))
    dom = browse(report, tmp_path / "profile", "--dump-dom", fragment="#q=QUESTION+1&sort=score")
    # Questions 1 and 10 to 19 of both runs; sorted by score, so the twins stand together.
    assert "22 of 60 shown" in dom
    assert _visible(dom) == [f"question {i}" for i in (1, *range(10, 20)) for _ in "AB"]
    assert re.search(r'aria-sort="ascending"><button[^>]*>score<', dom)


def test_page_is_drawn_in_light_and_dark(tmp_path):
    report = write_report(make_run(tmp_path / "run"))
    pixels = {}
    for scheme, number in (("dark", 0), ("light", 1)):
        shot = tmp_path / f"{scheme}.png"
        options = (f"--screenshot={shot}", "--window-size=1400,900", "--hide-scrollbars")
        settings = f"--blink-settings=preferredColorScheme={number}"
        browse(report, tmp_path / f"profile-{scheme}", *options, settings)
        pixels[scheme] = (imread(shot)[..., :3] * 255).round().astype(int)
    ground = {scheme: image[-1, 0].tolist() for scheme, image in pixels.items()}
    assert ground == {"dark": [17, 21, 26], "light": [255, 255, 255]}
    for image in pixels.values():
        is_curve = np.all(np.abs(image - [0x00, 0x72, 0xB2]) <= 2, axis=-1)
        # The curves of the first rows of panels: lines across most of the page.
        assert is_curve.any(axis=0).mean() > 0.3
