"""report.html in a real browser: it has ink, sorts, searches and fits."""

import html
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from matplotlib.image import imread
from report_runs import CHROMIUM, browse, make_evaluation, make_run

from laser_fast.report.page import MAX_CHARACTERS, write_report

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
    assert len(charts) == 9 + 4
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


# What hostile texts do if they are not text: each would set window.hacked or ask the server at URL.
HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "</pre></td></tr></table><img src=URL/img onerror=window.hacked=1>",
    "<!-- <script>window.hacked = 1",
    "--><svg onload=window.hacked=1><use href=URL/use></use></svg><!--",
    "]]><iframe src=URL/frame srcdoc='<script>parent.hacked=1</script>'></iframe>",
    "\"' onmouseover='window.hacked=1' autofocus onfocus='window.hacked=1' x=\"",
    "<base href=URL/><link rel=stylesheet href=URL/css><link rel=preload as=image href=URL/pre>",
    "<meta http-equiv=refresh content='0;url=URL/refresh'>",
    "<style>@import url(URL/import); body { background: url(URL/background) }</style>",
    "</title><script src=URL/js></script><title>",
    "</textarea></style></noscript><object data=URL/object></object><embed src=URL/embed>",
    "<form action=URL/form><input name=q><video src=URL/video autoplay></video></form>",
    "<a href='javascript:window.hacked=1'>click</a> {{ 7 * 7 }} {% raise %} ${7*7}",
    "&lt;script&gt;window.hacked=1&lt;/script&gt; &#60;img&#62; &amp;amp;",
    "+ADw-script+AD4-window.hacked+AD0-1+ADw-/script+AD4-",
    "nul \0 bell \a escape \x1b[31m form feed \f line separator \u2028 \u2029",
    "right to left \u202e <b>txt</b> \u2066 isolate, zero width \u200b\u200d, bom \ufeff",
    "lone surrogates \ud800 and \udfff, noncharacter \uffff, combining " + "e\u0301" * 99,
    "x" * 1_000_000 + "<script>window.hacked=1</script>",
    "<" * 3000 + '"' * 3000,
]
LOADED = """<script>
const own = document.currentScript;
const tags = "img, iframe, base, link, object, embed, form, video, audio, a, textarea, noscript";
document.body.dataset.found = JSON.stringify({
  hacked: window.hacked ?? null, errors: window.errors, title: document.title,
  injected: [...document.querySelectorAll(tags)].map(one => one.outerHTML.slice(0, 80)),
  scripts: [...document.scripts].filter(one => one !== own).length,
  handlers: [...document.querySelectorAll("*")].filter(one => [...one.attributes]
    .some(attribute => attribute.name.startsWith("on"))).length,
  metas: document.querySelectorAll("meta").length,
  styles: document.querySelectorAll("style").length,
  texts: [...document.querySelectorAll("table.samples tbody tr")].map(row =>
    [1, 2, 5].map(cell => row.cells[cell].textContent)),
  height: document.querySelector("table.samples").getBoundingClientRect().height});
</script>"""


@pytest.fixture
def server():
    """A server on this machine, and the paths that were asked of it."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802 (its name in the library)
            asked.append(self.path)
            self.send_error(404)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *args):
            pass

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{listening.server_port}", asked
    listening.shutdown()
    thread.join()
    listening.server_close()


def _shown(text):
    """What a browser shows of a text, the middle of a long one left out by the page."""
    text = re.sub("[\ud800-\udfff]", "?", text).replace("\0", "")
    return text if len(text) <= MAX_CHARACTERS else None


def test_hostile_texts_stay_texts(tmp_path, server):
    url, asked = server
    hostile = [text.replace("URL", url) for text in HOSTILE]
    samples = [
        {"step": i, "prompt": text, "text": text, "finish_reason": text, "reward": text}
        for i, text in enumerate(hostile)
    ]
    metrics = [{"step": 0, "reward/mean": 0.5, **{f"time/{text[:99]}": 1.0 for text in hostile}}]
    run = make_run(tmp_path / "<script>window.hacked=1<|script>", metrics=metrics, samples=[])
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    config = (run / "config.toml").read_text()
    evil = json.dumps(hostile[0])
    (run / "config.toml").write_text(f"# {hostile[1]}\n{config}\n[{evil}]\n{evil} = {evil}\n")
    report = write_report(run)
    page = report.read_text(encoding="utf-8")
    page = page.replace("<body>", f"<body>{ERRORS}", 1)
    end = page.rindex("</body>")
    report.write_text(page[:end] + LOADED + page[end:], encoding="utf-8")
    dom = browse(report, tmp_path / "profile", "--dump-dom", "--virtual-time-budget=3000")
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom)[1]))
    assert found["hacked"] is None and found["errors"] == [] and asked == []
    assert found["injected"] == [] and found["handlers"] == 0
    assert (found["scripts"], found["metas"], found["styles"]) == (2, 3, 1 + page.count("<style "))
    assert found["title"] == run.name and 'data-ready="yes"' in dom and found["height"] > 500
    assert len(found["texts"]) == len(hostile)
    for text, cells in zip(hostile, found["texts"], strict=True):
        for shown in cells[:2]:
            if (expected := _shown(text)) is not None:
                assert shown == expected
            else:
                assert len(shown) < MAX_CHARACTERS + 100 and shown.endswith(text[-100:])


def test_the_server_of_the_test_would_notice(tmp_path, server):
    url, asked = server
    bad = tmp_path / "bad.html"
    bad.write_text(f"<!DOCTYPE html><body><img src={url}/img onerror='document.title = 1'>")
    dom = browse(bad, tmp_path / "profile", "--dump-dom", "--virtual-time-budget=3000")
    assert asked == ["/img"] and "<title>1</title>" in dom
