"""report.html: everything a run has logged, whatever is missing, and nothing from outside."""

import json
import re
import sys
from html.parser import HTMLParser

import pytest
from report_runs import make_run

from laser_fast.cli import main
from laser_fast.config import ConfigError, load_config
from laser_fast.observe.report import render_report, write_report
from laser_fast.observe.report_run import curve, read_run
from laser_fast.observe.report_tables import MAX_CHARACTERS, MAX_SAMPLES
from laser_fast.observe.run_log import RunLog


class Page(HTMLParser):
    """The structure of a page: titles of its charts, table cells, attributes that load things."""

    def __init__(self, html):
        super().__init__()
        self.charts, self.tables, self.loads, self.open = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "path", "circle", "input", "br"):
            self.open.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href")]
        if tag == "figure":
            self.charts.append("")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-2:] == ["figure", "h3"]:
            self.charts[-1] = data
        if self.tables and {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def _page(*folders):
    return Page(render_report([read_run(folder) for folder in folders]))


def test_report_of_a_run(tmp_path):
    run = make_run(tmp_path / "run")
    assert write_report(run) == run / "report.html"
    html = (run / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.loads == [] and "http://" not in html.replace("http://www.w3.org/2000/svg", "")
    assert page.charts == [
        "reward",
        "score by class",
        "self-verification",
        "gradient norm",
        "disagreement of sampler and policy (nats)",
        "loss",
        "entropy (nats per token)",
        "peak memory (GB)",
        "seconds per stage",
    ]
    evaluations, samples = page.tables
    assert evaluations == [
        ["after step", "accuracy", "majority vote"],
        ["0", "0.500", "0.750"],
        ["30", "0.800", "0.750"],
    ]
    assert samples[0] == ["step", "prompt", "completion", "reward", "score", "ended by"]
    assert samples[1] == ["0", "question 0", "\\boxed{0}", "0", "0.000", "stop"]
    assert samples[5][3:5] == ["-", "0.080"]
    # Rewards are 1 at odd steps, scores above 0.5 from step 26 on, and step 4 has no reward.
    assert html.count('class="agrees"') == 12 + 2 and html.count('class="differs"') == 13 + 2
    assert "LaSeR &middot; sandbox" in html and "30 of 30 steps logged" in html
    assert "loss 0.725 s, 74%" in html and "rollout 0.25 s, 26%" in html and "other" in html


def test_finished_run_writes_it_and_says_where(tmp_path, capsys):
    config = load_config(make_run(tmp_path / "template") / "config.toml")
    with RunLog(tmp_path / "run", config) as log:
        log.log_step(0, {"reward/mean": 0.5})
        log.finish(wall_seconds=7.0)
    path = tmp_path / "run" / "report.html"
    assert f"report: {path}\n" in capsys.readouterr().out
    html = path.read_text()
    assert Page(html).charts == ["reward"] and "7 s" in html


def test_run_without_scores(tmp_path):
    page = _page(make_run(tmp_path / "run", loss_coef=0.0, score_coef=0.0))
    assert "score by class" not in page.charts and "reward" in page.charts
    assert page.tables[1][1][4] == "-"
    assert read_run(tmp_path / "run").method == "GRPO"
    assert (
        read_run(make_run(tmp_path / "other", score_coef=0.0)).method
        == "LaSeR without advantage mixing"
    )


def test_run_that_has_just_begun(tmp_path):
    run = make_run(tmp_path / "run", metrics=None, evaluations=None, samples=None)
    html = render_report([read_run(run)])
    page = Page(html)
    assert page.charts == [] and page.tables == []
    for sentence in ("No step has been logged", "No evaluation so far", "No samples were written"):
        assert sentence in html
    # One step draws dots instead of lines.
    make_run(run, metrics=[{"step": 0, "reward/mean": 0.5}], samples=None, evaluations=None)
    assert _page(run).charts == ["reward"]


def test_resumed_run_counts_no_step_twice(tmp_path):
    metrics = [
        {"step": step, "reward/mean": value} for step, value in ((0, 0.1), (1, 9.0), (2, 9.0))
    ]
    metrics += [{"step": step, "reward/mean": value} for step, value in ((1, 0.2), (2, None))]
    metrics.append({"reward/mean": 0.3})
    run = read_run(make_run(tmp_path / "run", metrics=metrics))
    assert curve(run.steps, "reward/mean") == [(0, 0.1), (1, 0.2)]
    assert [record["step"] for record in run.steps] == [0, 1, 2]


def test_text_of_the_model_stays_text(tmp_path):
    evil = "<script>alert(1)</script></pre><img src=x onerror=alert(2)>"
    samples = [
        {"step": 0, "prompt": evil, "completion": evil + "\ud800", "finish_reason": evil},
        {"prompt": None},
    ]
    metrics = [{"step": 0, f"time/{evil}": 1.0}]
    run = make_run(tmp_path / evil.replace("/", "|"), metrics=metrics)
    # json escapes the lone surrogate, which a file in UTF-8 could not hold.
    (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    html = write_report(run).read_text(encoding="utf-8")
    assert "<script>alert" not in html and "<img" not in html
    page = Page(html)
    assert page.tables[-1][1][1] == evil and page.tables[-1][1][2] == evil + "?"
    for data in re.findall(r'<script type="application/json">(.*?)</script>', html):
        json.loads(data)


def test_two_runs_in_comparison(tmp_path):
    first = make_run(tmp_path / "a")
    second = make_run(tmp_path / "b", steps=20, loss_coef=0.0, score_coef=0.0)
    html = write_report(first, second).read_text()
    page = Page(html)
    assert not (second / "report.html").exists()
    assert page.charts[-2:] == ["seconds per stage (A)", "seconds per stage (B)"]
    evaluations, samples, differences = page.tables
    assert [row[0] for row in evaluations[1:]] == ["A 0", "A 30", "B 0", "B 20"]
    assert [row[0][0] for row in samples[1:]] == ["A"] * 30 + ["B"] * 20
    assert ["score.loss_coef", "0.1", "0.0"] in differences
    assert ["optim.steps", "30", "20"] in differences
    assert "seed" not in [row[0] for row in differences]
    assert html.count('class="line c0 dashed"') > 0 and 'class="raw' not in html


def test_long_run_stays_small(tmp_path):
    long = "x" * (MAX_CHARACTERS * 3) + "\\boxed{7}"
    samples = [{"step": step, "prompt": "q", "completion": long} for step in range(3 * MAX_SAMPLES)]
    page = _page(make_run(tmp_path / "run", steps=3000, samples=samples))
    rows = page.tables[1][1:]
    assert len(rows) == MAX_SAMPLES
    assert [rows[0][0], rows[-1][0]] == ["0", str(3 * MAX_SAMPLES - 1)]
    assert len(rows[0][2]) < MAX_CHARACTERS + 100
    assert rows[0][2].endswith("\\boxed{7}") and "characters left out" in rows[0][2]
    html = render_report([read_run(tmp_path / "run")])
    paths = re.findall(r'class="(?:raw|line) [^"]*" d="([^"]*)"', html)
    assert max(path.count("L") for path in paths) == 399
    assert re.findall(r'class="area [^"]*" d="([^"]*)"', html)[0].count("L") == 2 * 120 - 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.toml", None, "holds no run"),
        ("config.toml", "a = = 1", "not valid TOML"),
        ("metrics.jsonl", '{"step": 0}\nhello\n', "metrics.jsonl, line 2: not valid JSON"),
        ("summary.json", "{", "summary.json: not valid JSON"),
    ],
)
def test_broken_folder_is_refused(tmp_path, capsys, monkeypatch, name, text, message):
    run = make_run(tmp_path / "run")
    (run / name).unlink(missing_ok=True)
    if text is not None:
        (run / name).write_text(text)
    monkeypatch.setattr(sys, "argv", ["laser-fast", "report", str(run)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (run / "report.html").exists()


def test_command_line_says_where(tmp_path, capsys, monkeypatch):
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    monkeypatch.setattr(sys, "argv", ["laser-fast", "report", str(first), str(second)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == str(first / "report.html")
    with pytest.raises(ConfigError, match="same run"):
        write_report(first, first)
