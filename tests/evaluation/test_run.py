"""`eval` and `calibrate` from the model's folder to the report, killed, continued and rescored."""

import json
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from laser_fast.cli import main
from laser_fast.config import ConfigError
from laser_fast.evaluation.benchmarks import find_benchmark
from laser_fast.evaluation.calibrate import calibrate
from laser_fast.evaluation.evaluate import run_evaluation
from laser_fast.evaluation.folder import EvalFolder
from laser_fast.evaluation.rescore import rescore_evaluation
from laser_fast.evaluation.settings import build_config
from laser_fast.evaluation.statistics import ReportOptions
from laser_fast.log.samples import read_samples

FEW = ReportOptions(num_resamples=20)


@pytest.fixture(scope="module")
def model(sandbox_model):
    overrides = ["score.token=<|reserved_0|>", "score.beta=0.2", "score.ref_logprob=-9.5"]
    return {"model": str(sandbox_model), "overrides": [*overrides, "rollout.max_num_seqs=8"]}


def _also(model, *overrides):
    return {**model, "overrides": [*model["overrides"], *overrides]}


@pytest.fixture(scope="module")
def evaluate(sandbox):
    """Evaluate nine problems of the sandbox, four samples each, unless told otherwise."""

    def run(out, model, overrides=(), benchmarks=(sandbox,), **options):
        measured = [(b, build_config(model, b, overrides=overrides)) for b in benchmarks]
        return run_evaluation(measured, out, **{"samples": 4, "limit": 9, "report": FEW} | options)

    return run


@pytest.fixture(scope="module")
def finished(evaluate, model, tmp_path_factory):
    """One undisturbed evaluation: nine problems in chunks of two."""
    moves = []
    out = tmp_path_factory.mktemp("eval") / "out"
    conclusion = evaluate(out, **model, on_progress=lambda *move: moves.append(move))
    assert [done for _, done, _ in moves] == [0, 2, 4, 6, 8, 9]
    return conclusion


def _samples(conclusion, name="sandbox"):
    return read_samples(conclusion.samples(name))


def test_report_and_samples(finished):
    folder = finished
    assert json.loads(folder.report.read_text()) == finished.read_report()
    report = finished.read_report()["benchmarks"]["sandbox"]
    assert (report["num_prompts"], report["samples_per_prompt"]) == (9, 4)
    assert report["golds_rejected"] == report["golds_unreadable"] == []
    assert finished.read_report()["score"]["ref_logprob"] == -9.5
    records = _samples(finished)
    assert [(r.prompt_id, r.sample) for r in records] == [
        (f"sandbox-{p}", s) for p in range(9) for s in range(4)
    ]
    ended = [record for record in records if record.is_finished]
    assert ended and all(
        record.score == pytest.approx(0.2 * (record.score_logprob + 9.5)) for record in ended
    )


def test_a_killed_evaluation_continues_to_the_same_numbers(finished, evaluate, model, tmp_path):
    def kill(name, done, total):
        if done == 4:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        evaluate(out, **model, on_progress=kill)
    path = EvalFolder(out).samples("sandbox")
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 16
    # Killed while it wrote the next chunk: three lines and a half.
    own = finished.samples("sandbox").read_text().splitlines(keepends=True)
    path.write_text("".join(lines + own[16:19]) + own[19][:40])
    conclusion = evaluate(out, **model)
    assert _samples(conclusion) == _samples(finished)
    assert conclusion.read_report() == finished.read_report()


def test_a_kill_between_samples_and_report_needs_no_model(
    finished, evaluate, model, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    evaluate(out, **model)
    EvalFolder(out).report.unlink()
    monkeypatch.setattr("laser_fast.evaluation.evaluate.build_policy", None)
    assert evaluate(out, **model).read_report() == finished.read_report()


def test_a_continued_evaluation_may_have_another_score(finished, evaluate, model, tmp_path):
    out = tmp_path / "out"
    evaluate(out, **model, limit=4)
    EvalFolder(out).report.unlink()
    changed = evaluate(out, **_also(model, "score.beta=0.4"), limit=4)
    for record, before in zip(_samples(changed), _samples(finished), strict=False):
        assert record.score == pytest.approx(2 * before.score)
    # A rescore starts from what the folder says.
    rescored = rescore_evaluation(out, tmp_path / "again", report=FEW)
    assert rescored.read_report()["score"]["beta"] == 0.4
    assert _samples(rescored) == _samples(changed)


@pytest.mark.slow
def test_sigkill_from_outside(evaluate, model, tmp_path, monkeypatch, capsys):
    """The same through the command line and a real kill, with chunks small enough to be cut."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "laser_fast", "eval", model["model"], "-b", "sandbox"]
    command += [
        "--token",
        "<|reserved_0|>",
        "--beta",
        "0.2",
        "--ref-logprob=-9.5",
        "--out",
        str(out),
    ]
    command += ["--samples", "4", "--limit", "40", "rollout.max_num_seqs=8"]
    samples = EvalFolder(out).samples("sandbox")
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (samples.exists() and samples.stat().st_size) and time.monotonic() < deadline:
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    survived = len(samples.read_text().splitlines())
    assert 0 < survived < 160
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", command[2:])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert not exit_.value.code
    assert "40 problems, 4 completions each; accuracy (avg@4)" in capsys.readouterr().out
    undisturbed = evaluate(tmp_path / "again", **model, limit=40)
    assert read_samples(samples) == _samples(undisturbed)
    report = json.loads(EvalFolder(out).report.read_text())["benchmarks"]["sandbox"]
    again = undisturbed.read_report()["benchmarks"]["sandbox"]
    values = {name: entry["value"] for name, entry in report["metrics"].items()}
    assert values == {name: entry["value"] for name, entry in again["metrics"].items()}


def test_outputs_are_not_overwritten_unasked(finished, evaluate, model):
    out = finished.path
    before = finished.report.read_text()
    with pytest.raises(ConfigError, match="holds a finished evaluation"):
        evaluate(out, **model)
    assert finished.report.read_text() == before


def test_other_settings_do_not_continue(finished, evaluate, model, tmp_path):
    out = tmp_path / "out"
    evaluate(out, **model, limit=2)
    EvalFolder(out).report.unlink()
    with pytest.raises(ConfigError, match="begun with another seed: 0 against 1"):
        evaluate(out, **_also(model, "seed=1"), limit=2)
    with pytest.raises(ConfigError, match="begun with another benchmarks"):
        evaluate(out, **model, limit=3)
    overwritten = evaluate(out, **_also(model, "seed=1"), limit=2, overwrite=True)
    assert _samples(overwritten) != _samples(finished)[:8]


def test_c_ref_of_the_model_itself(evaluate, model, finished, tmp_path):
    conclusion = evaluate(tmp_path / "out", **_also(model, "score.ref_logprob=auto"), limit=4)
    ended = [r.score_logprob for r in _samples(finished)[:16] if r.is_finished]
    mean = sum(ended) / len(ended)
    assert conclusion.read_report()["score"]["ref_logprob"] == pytest.approx(mean)
    assert conclusion.read_report()["score"]["ref_logprob_is_measured"]
    scores = [r.score for r in _samples(conclusion) if r.is_finished]
    assert sum(scores) == pytest.approx(0.0, abs=1e-6)


def test_without_scores_nothing_about_them_is_needed(evaluate, model, tmp_path):
    conclusion = evaluate(tmp_path / "out", model["model"], limit=2, needs_score=False)
    assert "score" not in conclusion.read_report()
    metrics = conclusion.read_report()["benchmarks"]["sandbox"]["metrics"]
    assert metrics["accuracy"]["value"] is not None and "auroc" not in metrics
    with pytest.raises(ConfigError, match="a score needs c_ref"):
        evaluate(tmp_path / "other", model["model"])


def test_rescoring_needs_no_model(finished, tmp_path):
    source = finished.path
    same = rescore_evaluation(source, tmp_path / "same", report=FEW)
    assert _samples(same) == _samples(finished)
    own = finished.read_report()["benchmarks"]["sandbox"]
    metrics = own["metrics"]
    known = ("reward", "num_dropped", "golds_rejected", "golds_unreadable")
    rescored = same.read_report()["benchmarks"]["sandbox"]
    assert {key: rescored[key] for key in known} == {key: own[key] for key in known}
    assert same.read_report()["benchmarks"]["sandbox"]["metrics"] == metrics
    other = rescore_evaluation(
        finished.samples("sandbox"),
        tmp_path / "other",
        beta=0.4,
        ref_logprob="-9",
        reward="exact",
        report=ReportOptions(ks=(3,), num_resamples=5),
    )
    for record, before in zip(_samples(other), _samples(finished), strict=True):
        if record.is_finished:
            assert record.score == pytest.approx(0.4 * (before.score_logprob + 9))
        assert record.reward == float(record.answer == record.gold)
    # "exact" lets work after the box pass, which the sandbox's own reward does not.
    assert other.read_report()["benchmarks"]["sandbox"]["ks"] == [3]
    # What it said of the golds was the other reward's word.
    regraded = other.read_report()["benchmarks"]["sandbox"]
    assert (regraded["reward"], regraded["num_dropped"]) == ("exact", own["num_dropped"])
    assert "golds_rejected" not in regraded and "golds_unreadable" not in regraded
    settings = other.read_settings()["benchmarks"]["sandbox"]
    assert (settings["reward"], settings["format_gate"]) == ("exact", False)
    for given in ({"ref_logprob": "nan"}, {"beta": float("inf")}):
        with pytest.raises(ConfigError, match="expected a finite number"):
            rescore_evaluation(source, tmp_path / "x", report=FEW, **given)
    with pytest.raises(ConfigError, match="--k 8: .* has 4 samples"):
        rescore_evaluation(source, tmp_path / "x", report=ReportOptions(ks=(8,)))
    with pytest.raises(ConfigError, match="where the samples come from"):
        rescore_evaluation(source, source, report=FEW, overwrite=True)
    with pytest.raises(ConfigError, match="expected the folder of an evaluation"):
        rescore_evaluation(tmp_path / "none", tmp_path / "x", report=FEW)
    assert not (tmp_path / "x").exists()


def test_equal_benchmarks_are_drawn_independently(finished, tmp_path):
    for name in ("one", "two"):
        (tmp_path / "in" / name).mkdir(parents=True)
        path = tmp_path / "in" / name / "samples.jsonl"
        path.write_bytes(finished.samples("sandbox").read_bytes())
    report = rescore_evaluation(
        tmp_path / "in", tmp_path / "out", report=ReportOptions()
    ).read_report()
    parts = (*report["benchmarks"].values(), report["average"])
    lengths = [part["metrics"]["mean_length"] for part in parts]
    one, two, mean = (entry["high"] - entry["low"] for entry in lengths)
    assert mean < 0.85 * min(one, two)


def test_the_command_line_rescores_and_draws(finished, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["laser-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, capsys.readouterr()

    out = tmp_path / "out"
    code, shown = run("rescore", finished.path, out, "--beta", "0.4", "--k", "2")
    assert code == 0 and f"plots: {out}" in shown.out.replace("\n", "")
    assert (out / "sandbox" / "plots.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "report.json").read_text())["score"]["beta"] == 0.4
    # What needs a model is no option of it.
    for option in ("--samples", "--token", "--config", "--engine", "--seed", "--benchmark"):
        code, shown = run("rescore", finished.path, tmp_path / "x", option, "2")
        assert code == 2 and f"No such option: {option}" in shown.err
    for option in ("--rescore", "--reward"):
        code, shown = run("eval", "model", option, "x")
        assert code == 2 and f"No such option: {option}" in shown.err
    code, shown = run("calibrate", "none", "--data", "none", "--beta", "0")
    assert code == 2 and "Invalid value for '--beta'" in shown.err  # before anything is measured
    assert not (tmp_path / "x").exists()


def test_lone_samples_need_both_numbers_or_keep_theirs(finished, tmp_path):
    (tmp_path / "lone").mkdir()
    path = tmp_path / "lone" / "samples.jsonl"
    path.write_bytes(finished.samples("sandbox").read_bytes())
    kept = rescore_evaluation(path, tmp_path / "kept", report=FEW)
    assert _samples(kept, "lone") == _samples(finished)
    with pytest.raises(ConfigError, match="give both --beta and --ref-logprob"):
        rescore_evaluation(path, tmp_path / "x", beta=0.3, report=FEW)
    lines = path.read_text().splitlines(keepends=True)
    ended = next(i for i, line in enumerate(lines) if '"stop"' in line)
    unscored = json.loads(lines[ended]) | {"score": None, "score_logprob": None}
    others = [*lines[:ended], *lines[ended + 1 :]]
    path.write_text("".join([*others, json.dumps(unscored) + "\n"]))
    for field, numbers in (("score", {}), ("score_logprob", {"beta": 0.3, "ref_logprob": "auto"})):
        with pytest.raises(ConfigError, match=f"lone/samples.jsonl: expected a {field} of all"):
            rescore_evaluation(path, tmp_path / "x", report=FEW, **numbers)
    path.write_text("".join([*lines, lines[0]]))
    with pytest.raises(ConfigError, match="sample 0 of prompt sandbox-0 appears twice"):
        rescore_evaluation(path, tmp_path / "x", report=FEW)
    path.write_text("")
    with pytest.raises(ConfigError, match="at least one record"):
        rescore_evaluation(path, tmp_path / "x", report=FEW)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ('{"problem": "1a+2=", "answer": "3"}\n{"problem"\n', "bad.jsonl:2: not valid JSON"),
        ('{"problem": "1a+2="}\n', "no field among answer, "),
        ('{"problem": "1a+2=", "answer": null}\n', 'field "answer".* is null'),
    ],
)
def test_broken_files_name_the_place(evaluate, model, tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    benchmarks = [find_benchmark(str(tmp_path / "bad.jsonl"))]
    template = ["data.template={prompt}", "rollout.max_new_tokens=8", "data.max_prompt_tokens=64"]
    with pytest.raises(ConfigError, match=message):
        evaluate(tmp_path / "out", **_also(model, *template), benchmarks=benchmarks)
    assert not (tmp_path / "out").exists()


def test_answers_of_every_kind_and_equal_ids(evaluate, model, tmp_path, caplog):
    rows = [
        {"id": 1, "problem": "1a+2=", "answer": 3},
        {"id": 1, "problem": "1a+2=", "answer": 0.5},
        {"problem": "2a+2=", "answer": ["4", 5]},
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ["data.template={prompt}", "data.prompt_suffix="]
    overrides += ["rollout.max_new_tokens=24", "data.max_prompt_tokens=64"]
    benchmarks = [find_benchmark(str(file))]
    conclusion = evaluate(
        tmp_path / "out", **_also(model, *overrides), benchmarks=benchmarks, samples=2
    )
    records = _samples(conclusion, "mine")
    assert [(r.prompt_id, r.gold) for r in records[::2]] == [
        ("mine-0", "3"),
        ("mine-1", "0.5"),
        ("mine-2", "4, 5"),
    ]
    assert "mine: 1 problems repeat an earlier one and count again" in caplog.text


def test_options_that_do_not_fit(evaluate, sandbox, model, tmp_path):
    def refuse(match, *overrides, **given):
        with pytest.raises(ConfigError, match=match):
            evaluate(tmp_path / "out", **_also(model, *overrides), **given)

    refuse("--k 8 needs as many samples, and sandbox gets 4", report=ReportOptions(ks=(8,)))
    refuse("name at least one --benchmark", benchmarks=[])
    refuse('two benchmarks are called "sandbox"', benchmarks=[sandbox, sandbox])
    refuse("the tokenizer has no chat template", "data.template=chat")
    refuse("exceeds the 128 positions of the model", "rollout.max_new_tokens=104")
    refuse("model.replicas = 2 does not divide the 1 ranks", "model.replicas=2")
    assert not (tmp_path / "out").exists()


def test_real_files_end_to_end(evaluate, random_model, data_dir, tmp_path):
    """A random model on the first problems of every real file: prompts, grades, votes, report."""
    names = ["math500", "amc23", "aime24", "aime25", "olympiadbench", "gsm8k"]
    overrides = ["score.token=<|reserved_0|>", "score.ref_logprob=auto"]
    overrides += ["data.template={prompt}", "rollout.max_new_tokens=12"]
    benchmarks = [find_benchmark(name, data_dir=data_dir) for name in names]
    conclusion = evaluate(
        tmp_path / "out", str(random_model), overrides, benchmarks=benchmarks, limit=4
    )
    for name in names:
        report = conclusion.read_report()["benchmarks"][name]
        assert (report["num_prompts"], report["num_failed_grades"]) == (4, 0)
        assert report["metrics"]["weighted_majority@4"]["value"] is not None
        records = _samples(conclusion, name)
        assert len(records) == 16 and all(record.prompt for record in records)
    average = conclusion.read_report()["average"]
    assert average["num_benchmarks"] == 6
    assert average["metrics"]["accuracy"]["value"] < 0.2


def test_calibration_of_the_sandbox_model(model, sandbox, finished):
    """c_ref of a token is the mean of the log-probs that an evaluation reads for it."""
    build = partial(build_config, is_calibration=True)
    config = build(model["model"], sandbox, overrides=["rollout.max_num_seqs=8"])
    options = {"prompts": 6, "samples": 4}
    everything = calibrate(config, sandbox, **options)
    assert everything.num_completions == 24 and everything.num_finished > 0
    assert {c.token for c in everything.candidates} <= {f"<|reserved_{i}|>" for i in range(5)}
    one = calibrate(config, sandbox, token="<|reserved_2|>", **options)
    assert [c.token for c in one.candidates] == ["<|reserved_2|>"]
    ended = [r.score_logprob for r in _samples(finished) if r.is_finished]
    [own] = [c for c in everything.candidates if c.token == "<|reserved_0|>"]
    # Other prompts of the same kind, so the same number up to a few standard errors.
    assert own.ref_logprob == pytest.approx(sum(ended) / len(ended), abs=0.5)
    templates = ("{prompt}", "0{prompt}")
    two = calibrate(config, sandbox, token="<|reserved_0|>", templates=templates, **options)
    groups = two.candidates[0].spreads
    assert groups["all"].num == two.num_finished
    assert {"template '{prompt}'", "template '0{prompt}'"} <= groups.keys()
    with pytest.raises(ConfigError, match="--template: .* put {prompt} into it"):
        calibrate(config, sandbox, **options, templates=("none",))
    for key in ("score.token", "score.beta", "score.ref_logprob", "data.prompts_per_step"):
        with pytest.raises(ConfigError, match=f"{key} has no effect here"):
            build("m", sandbox, overrides=[f"{key}=1"])
