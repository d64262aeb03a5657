"""report.html: everything a run has logged, whatever is missing, and nothing from outside."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser

import pytest
from report_runs import make_evaluation, make_run

from laser_fast.cli import main
from laser_fast.config import ConfigError
from laser_fast.log.metrics import PANELS
from laser_fast.report.charts import panel_curves
from laser_fast.report.page import (
    MAX_CHARACTERS,
    MAX_SAMPLES,
    draw_run,
    render_report,
    write_report,
    write_run_files,
)
from laser_fast.report.runs import read_run


class Page(HTMLParser):
    """The structure of a page: titles of its charts, table cells, attributes that load things."""

    def __init__(self, html):
        super().__init__()
        self.charts, self.tables, self.loads, self.open = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href")]
        self.loads += [
            value for name, value in attributes if name == "xlink:href" and value[0] != "#"
        ]
        if tag == "figure":
            self.charts.append(dict(attributes)["aria-label"])
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
        if self.tables and {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    return make_evaluation(tmp_path_factory.mktemp("evaluations") / "chains", {"chains": 0.7})


def _page(*folders):
    return Page(render_report([read_run(folder) for folder in folders]))


def test_report_of_a_run(tmp_path):
    run = make_run(tmp_path / "run")
    assert write_report(run) == run / "report.html"
    html = (run / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.loads == []
    assert set(re.findall("https?://[^\"']*", html)) == {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert page.charts == [
        "reward",
        "mean score by class",
        "self-verification",
        "loss",
        "gradient norm",
        "disagreement of sampler and policy (nats)",
        "entropy (nats per token)",
        "peak memory (GB)",
        "seconds per stage",
    ]
    evaluations, samples = page.tables
    assert evaluations == [
        ["after step", "accuracy", "maj@k"],
        ["0", "0.500", "0.750"],
        ["30", "0.800", "0.750"],
    ]
    assert samples[0] == ["step", "prompt", "completion", "reward", "score", "ended by"]
    assert samples[1] == ["0", "question 0", "\\boxed{0}", "0", "0.000", "stop"]
    assert samples[5][3:5] == ["-", "0.080"]
    # Rewards are 1 at odd steps, scores above 0.5 from step 26 on, and step 4 has no reward.
    assert html.count('class="agrees"') == 12 + 2 and html.count('class="differs"') == 13 + 2
    assert "LaSeR &middot; sandbox" in html and "30 of 30 steps logged" in html
    assert "loss 0.725 s, 74%" in html and "rollout 0.25 s, 26%" in html


def test_run_that_is_through_or_was_stopped(tmp_path, caplog):
    run = make_run(tmp_path / "run", evaluations=None, samples=None)
    files = {"curves": run / "curves.png", "report": run / "report.html"}
    assert write_run_files(run) == files
    assert Page(files["report"].read_text()).charts[0] == "reward"
    assert files["curves"].read_bytes()[:4] == b"\x89PNG"
    (run / "summary.json").write_text('{"wall_seconds": 7.0}')
    write_run_files(run)
    assert "7 s" in files["report"].read_text()
    early = make_run(tmp_path / "early", metrics=None)
    before = set(early.iterdir())
    assert write_run_files(early) == {} and set(early.iterdir()) == before
    draw_run(tmp_path / "none")  # it ends no run
    assert f"could not be drawn: {tmp_path / 'none'}" in caplog.text


def test_samples_of_older_runs_are_shown(tmp_path):
    old = {"step": 3, "prompt": "q", "completion": "\\boxed{1}", "reward": 1.0, "score": 0.9}
    page = _page(make_run(tmp_path / "run", samples=[old]))
    assert page.tables[1][1] == ["3", "q", "\\boxed{1}", "1", "0.900", "-"]


def test_run_without_scores(tmp_path):
    page = _page(make_run(tmp_path / "run", loss_coef=0.0, score_coef=0.0))
    assert "mean score by class" not in page.charts and "reward" in page.charts
    assert page.tables[1][1][4] == "-"
    for coefs, method in ((0.0, "GRPO"), (0.1, "LaSeR without advantage mixing")):
        run = make_run(tmp_path / f"{coefs}", loss_coef=coefs, score_coef=0.0)
        assert f"{method} &middot; sandbox &middot;" in render_report([read_run(run)])


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
    _, _, points, *_ = panel_curves(PANELS[0], [run])[0]
    assert points == [(0, 0.1), (1, 0.2)]
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
    assert "other 1 s, 100%" in html  # a stage that is not known


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
    assert "stroke-dasharray" in html and html.count(">training prompts<") == 1


def test_long_run_stays_small(tmp_path):
    long = "x" * (MAX_CHARACTERS * 3) + "\\boxed{7}"
    samples = [{"step": step, "prompt": "q", "completion": long} for step in range(3 * MAX_SAMPLES)]
    page = _page(make_run(tmp_path / "run", steps=3000, samples=samples))
    rows = page.tables[1][1:]
    assert len(rows) == MAX_SAMPLES
    assert [rows[0][0], rows[-1][0]] == ["0", str(3 * MAX_SAMPLES - 1)]
    assert len(rows[0][2]) < MAX_CHARACTERS + 100
    assert rows[0][2].endswith("\\boxed{7}") and "characters left out" in rows[0][2]


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


def test_evaluations_below_a_run_and_named_ones(tmp_path, capsys, monkeypatch):
    run, other = make_run(tmp_path / "run"), tmp_path / "elsewhere"
    make_evaluation(run / "evals" / "final", {"chains": 0.9, "powers": 0.8})
    make_evaluation(other, {"chains": 0.6})
    (run / "unfinished").mkdir()
    (run / "unfinished" / "settings.json").write_text("{}")
    (run / "report.json").write_text("not an evaluation's")
    monkeypatch.setattr(sys, "argv", ["laser-fast", "report", str(run), "--eval", str(other)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    html = (run / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    # Four figures each of: chains in both, powers in one.
    assert len(page.charts) == 9 + 3 * 4
    answers, scores = page.tables[1:3]
    assert answers[0] == ["correct answers", "evals/final", str(other)]
    report = json.loads((run / "evals" / "final" / "report.json").read_text())
    entry = report["benchmarks"]["chains"]["metrics"]["weighted_majority@4"]
    shown = "{value:.3f} {low:.3f} to {high:.3f}".format(**entry)
    row = next(row for row in answers if row[0] == "weighted maj@4")
    assert row[1].split() == shown.split() and row[2] != row[1]
    rows = {row[0]: row[1:] for row in scores[1:]}
    known = {"self-verification F1", "AUROC", "ECE", "ECE, prior corrected", "Brier"}
    assert known <= rows.keys()
    assert "chains: 20 problems, 4 completions each; 95% bootstrap intervals over" in html
    assert page.tables[3][0] == ["correct answers", "evals/final"]
    assert "mean over benchmarks" in html and page.tables[5][0] == page.tables[3][0]


def test_evaluations_of_two_runs_stand_side_by_side(tmp_path):
    runs = [make_run(tmp_path / name) for name in "ab"]
    for run, skill in zip(runs, (0.9, 0.5), strict=True):
        make_evaluation(run / "eval", {"chains": skill})
    page = Page(write_report(*runs).read_text())
    answers = page.tables[1]
    assert answers[0] == ["correct answers", "A eval", "B eval"]
    first, second = (float(cell.split()[0]) for cell in answers[1][1:])
    assert answers[1][0] == "accuracy" and first > second + 0.2


def test_evaluation_says_what_its_numbers_leave_out(tmp_path, evaluation):
    runs = [make_run(tmp_path / name) for name in "ab"]
    for run in runs:
        shutil.copytree(evaluation, run / "eval")
    path = runs[1] / "eval" / "report.json"
    report = json.loads(path.read_text())
    report["benchmarks"]["chains"] |= {"num_failed_grades": 3, "golds_rejected": ["7", "8"]}
    path.write_text(json.dumps(report))
    html = write_report(*runs).read_text()
    warning = "3 grades failed, 2 gold answers that the grader rejects"
    assert html.count(warning) == 1 and f'<b class="run">B</b> eval: {warning}' in html


def test_evaluation_without_scores_has_only_votes(tmp_path):
    run = make_run(tmp_path / "run")
    make_evaluation(run / "eval", {"chains": 0.7}, is_scored=False)
    page = Page(write_report(run).read_text())
    votes = ["share of problems answered correctly", "share right against samples, stopping early"]
    assert page.charts[9:] == votes
    assert [table[0][0] for table in page.tables] == ["after step", "correct answers", "step"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("report.json", None, r"holds no finished evaluation \(report.json is missing\)"),
        ("report.json", "{", "report.json: not valid JSON"),
        ("report.json", "[]", "report.json: expected a JSON object"),
        ("report.json", "{}", "report.json: expected the key benchmarks"),
        ("chains/samples.jsonl", "hello\n", "samples.jsonl, line 1: not valid JSON"),
    ],
)
def test_broken_evaluation_is_refused(tmp_path, evaluation, name, text, message):
    run, folder = make_run(tmp_path / "run"), tmp_path / "eval"
    shutil.copytree(evaluation, folder)
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        write_report(run, evaluations=[folder])
    assert not (run / "report.html").exists()
