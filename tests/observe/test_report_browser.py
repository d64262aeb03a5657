"""report.html in a real browser: the script runs, samples sort and search, something is drawn."""

import re

import numpy as np
import pytest
from matplotlib.image import imread
from report_runs import CHROMIUM, browse, make_run

from laser_fast.observe.report import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


def _visible(dom):
    """Prompts of the sample rows that are not hidden, in their order."""
    body = re.search(r'<table class="samples">.*?<tbody>(.*?)</tbody>', dom, re.DOTALL)[1]
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    return [re.search(r"<pre>(.*?)</pre>", row, re.DOTALL)[1] for row in rows]


def test_script_runs_and_samples_are_listed(tmp_path):
    evil = "<script>document.title = 'broken in'</script>"
    samples = [{"step": 0, "prompt": evil, "completion": "</td></table>", "score": 0.5}]
    report = write_report(make_run(tmp_path / "run", samples=samples))
    dom = browse(report, tmp_path / "profile", "--dump-dom")
    assert 'data-ready="yes"' in dom
    assert "<title>run</title>" in dom and "1 of 1 shown" in dom
    assert dom.count('<path class="cursor"') == dom.count('class="chart"') == 9


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
    for scheme, blue in (("dark", [0x4A, 0xA8, 0xE0]), ("light", [0x00, 0x72, 0xB2])):
        is_curve = np.all(np.abs(pixels[scheme] - blue) <= 2, axis=-1)
        # The curves of the first rows of panels: lines across most of the page.
        assert is_curve.any(axis=0).mean() > 0.3
