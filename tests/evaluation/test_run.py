"""`eval` and `calibrate` from the model's folder to the report, killed, continued and rescored."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from laser_fast.cli import main
from laser_fast.config import ConfigError
from laser_fast.evaluation.calibrate import calibrate
from laser_fast.evaluation.evaluate import run_evaluation
from laser_fast.evaluation.folder import EvalFolder
from laser_fast.evaluation.rescore import rescore_evaluation
from laser_fast.evaluation.statistics import ReportOptions
from laser_fast.log.samples import read_samples

FEW = ReportOptions(num_resamples=20)


@pytest.fixture(scope="module")
def model(sandbox_model):
    overrides = ["score.token=<|reserved_0|>", "score.beta=0.2", "score.ref_logprob=-9.5"]
    return {"model": str(sandbox_model), "overrides": [*overrides, "rollout.max_num_seqs=8"]}


def _also(model, *overrides):
    return {**model, "overrides": [*model["overrides"], *overrides]}


def _options(out, **given):
    known = {"benchmarks": ["sandbox"], "samples": 4, "limit": 9, "report": FEW}
    return {"out": out, **known, **given}


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """One undisturbed evaluation: nine problems in chunks of two."""
    moves = []
    out = tmp_path_factory.mktemp("eval") / "out"
    conclusion = run_evaluation(
        **model, **_options(out), on_progress=lambda *move: moves.append(move)
    )
    assert [done for _, done, _ in moves] == [0, 2, 4, 6, 8, 9]
    return conclusion


def _samples(conclusion, name="sandbox"):
    return read_samples(conclusion.folder.samples(name))


def test_report_samples_and_plots(finished):
    folder = finished.folder
    assert json.loads(folder.report.read_text()) == finished.report
    report = finished.report["benchmarks"]["sandbox"]
    assert (report["num_prompts"], report["samples_per_prompt"]) == (9, 4)
    assert report["golds_rejected"] == report["golds_unreadable"] == []
    assert finished.report["score"]["ref_logprob"] == -9.5
    records = _samples(finished)
    assert [(r.prompt_id, r.sample) for r in records] == [
        (f"sandbox-{p}", s) for p in range(9) for s in range(4)
    ]
    ended = [record for record in records if record.is_finished]
    assert ended and all(
        record.score == pytest.approx(0.2 * (record.score_logprob + 9.5)) for record in ended
    )
    assert folder.plots("sandbox").read_bytes().startswith(b"\x89PNG")


def test_a_killed_evaluation_continues_to_the_same_numbers(finished, model, tmp_path):
    def kill(name, done, total):
        if done == 4:
            raise KeyboardInterrupt

    options = _options(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(**model, **options, on_progress=kill)
    path = EvalFolder(options["out"]).samples("sandbox")
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 16
    # Killed while it wrote the next chunk: three lines and a half.
    own = finished.folder.samples("sandbox").read_text().splitlines(keepends=True)
    path.write_text("".join(lines + own[16:19]) + own[19][:40])
    conclusion = run_evaluation(**model, **options)
    assert _samples(conclusion) == _samples(finished)
    assert conclusion.report == finished.report


def test_a_kill_between_samples_and_report_needs_no_model(finished, model, tmp_path, monkeypatch):
    options = _options(tmp_path / "out")
    run_evaluation(**model, **options)
    EvalFolder(options["out"]).report.unlink()
    monkeypatch.setattr("laser_fast.evaluation.evaluate.open_engine", None)
    assert run_evaluation(**model, **options).report == finished.report


@pytest.mark.slow
def test_sigkill_from_outside(model, tmp_path):
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
    environment = {**os.environ, "COLUMNS": "100"}
    second = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert second.returncode == 0, second.stderr
    assert "40 problems, 4 completions each; accuracy (avg@4)" in second.stdout
    undisturbed = run_evaluation(**model, **_options(tmp_path / "again", limit=40))
    assert read_samples(samples) == _samples(undisturbed)
    report = json.loads(EvalFolder(out).report.read_text())["benchmarks"]["sandbox"]
    again = undisturbed.report["benchmarks"]["sandbox"]
    values = {name: entry["value"] for name, entry in report["metrics"].items()}
    assert values == {name: entry["value"] for name, entry in again["metrics"].items()}


def test_outputs_are_not_overwritten_unasked(finished, model):
    out = finished.folder.path
    before = finished.folder.report.read_text()
    with pytest.raises(ConfigError, match="holds a finished evaluation"):
        run_evaluation(**model, **_options(out))
    assert finished.folder.report.read_text() == before


def test_other_settings_do_not_continue(finished, model, tmp_path):
    options = _options(tmp_path / "out", limit=2)
    run_evaluation(**model, **options)
    EvalFolder(options["out"]).report.unlink()
    with pytest.raises(ConfigError, match="begun with another seed: 0 against 1"):
        run_evaluation(**_also(model, "seed=1"), **options)
    with pytest.raises(ConfigError, match="begun with another benchmarks"):
        run_evaluation(**model, **_options(tmp_path / "out", limit=3))
    overwritten = run_evaluation(
        **_also(model, "seed=1"), **_options(tmp_path / "out", limit=2, overwrite=True)
    )
    assert _samples(overwritten) != _samples(finished)[:8]


def test_c_ref_of_the_model_itself(model, finished, tmp_path):
    conclusion = run_evaluation(
        **_also(model, "score.ref_logprob=auto"), **_options(tmp_path / "out", limit=4)
    )
    ended = [r.score_logprob for r in _samples(finished)[:16] if r.is_finished]
    mean = sum(ended) / len(ended)
    assert conclusion.report["score"]["ref_logprob"] == pytest.approx(mean)
    assert conclusion.report["score"]["ref_logprob_is_measured"]
    scores = [r.score for r in _samples(conclusion) if r.is_finished]
    assert sum(scores) == pytest.approx(0.0, abs=1e-6)


def test_without_scores_nothing_about_them_is_needed(model, tmp_path):
    plain = {"model": model["model"]}
    conclusion = run_evaluation(**plain, **_options(tmp_path / "out", limit=2, needs_score=False))
    assert "score" not in conclusion.report
    metrics = conclusion.report["benchmarks"]["sandbox"]["metrics"]
    assert metrics["accuracy"]["value"] is not None and "auroc" not in metrics
    with pytest.raises(ConfigError, match="a score needs c_ref"):
        run_evaluation(**plain, **_options(tmp_path / "other"))


def test_rescoring_needs_no_model(finished, tmp_path):
    source = finished.folder.path
    same = rescore_evaluation(source, tmp_path / "same", report=FEW)
    assert _samples(same) == _samples(finished)
    own = finished.report["benchmarks"]["sandbox"]
    metrics = own["metrics"]
    known = ("reward", "num_dropped", "golds_rejected", "golds_unreadable")
    rescored = same.report["benchmarks"]["sandbox"]
    assert {key: rescored[key] for key in known} == {key: own[key] for key in known}
    assert same.report["benchmarks"]["sandbox"]["metrics"] == metrics
    other = rescore_evaluation(
        finished.folder.samples("sandbox"),
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
    assert other.report["benchmarks"]["sandbox"]["ks"] == [3]
    # What it said of the golds was the other reward's word.
    regraded = other.report["benchmarks"]["sandbox"]
    assert (regraded["reward"], regraded["num_dropped"]) == ("exact", own["num_dropped"])
    assert "golds_rejected" not in regraded and "golds_unreadable" not in regraded
    settings = other.folder.read_settings()["benchmarks"]["sandbox"]
    assert (settings["reward"], settings["format_gate"]) == ("exact", False)
    for given in ({"ref_logprob": "nan"}, {"beta": float("inf")}):
        with pytest.raises(ConfigError, match="expected a finite number"):
            rescore_evaluation(source, tmp_path / "x", **given)
    with pytest.raises(ConfigError, match="--k 8: .* has 4 samples"):
        rescore_evaluation(source, tmp_path / "x", report=ReportOptions(ks=(8,)))
    with pytest.raises(ConfigError, match="where the samples come from"):
        rescore_evaluation(source, source, overwrite=True)
    with pytest.raises(ConfigError, match="expected the folder of an evaluation"):
        rescore_evaluation(tmp_path / "none", tmp_path / "x")


def test_equal_benchmarks_are_drawn_independently(finished, tmp_path):
    for name in ("one", "two"):
        (tmp_path / "in" / name).mkdir(parents=True)
        path = tmp_path / "in" / name / "samples.jsonl"
        path.write_bytes(finished.folder.samples("sandbox").read_bytes())
    report = rescore_evaluation(tmp_path / "in", tmp_path / "out").report
    parts = (*report["benchmarks"].values(), report["average"])
    lengths = [part["metrics"]["mean_length"] for part in parts]
    one, two, mean = (entry["high"] - entry["low"] for entry in lengths)
    assert mean < 0.85 * min(one, two)


def test_rescoring_refuses_what_it_does_not_read(finished, tmp_path, monkeypatch, capsys):
    def refusal(*options):
        source = str(finished.folder.path)
        arguments = ["laser-fast", "eval", *options, "--rescore", source]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        return capsys.readouterr().err

    out = ["--out", str(tmp_path / "out")]
    for option in (
        ["--samples", "2"],
        ["--limit", "3"],
        ["--token", "z"],
        ["--config", "x"],
        ["--engine", "hf"],
        ["--seed", "0"],
        ["--data-dir", "x"],
        ["--benchmark", "x"],
        ["--no-score"],
    ):
        assert refusal(*option, *out).endswith(f"takes no model; drop {option[0]}\n")
    assert "drop a model, overrides" in refusal("m", "seed=1", *out)
    assert "needs --out" in refusal()
    assert not (tmp_path / "out").exists()


def test_lone_samples_need_both_numbers_or_keep_theirs(finished, tmp_path):
    (tmp_path / "lone").mkdir()
    path = tmp_path / "lone" / "samples.jsonl"
    path.write_bytes(finished.folder.samples("sandbox").read_bytes())
    kept = rescore_evaluation(path, tmp_path / "kept", report=FEW)
    assert _samples(kept, "lone") == _samples(finished)
    with pytest.raises(ConfigError, match="give both --beta and --ref-logprob"):
        rescore_evaluation(path, tmp_path / "x", beta=0.3)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[0]]))
    with pytest.raises(ConfigError, match="sample 0 of prompt sandbox-0 appears twice"):
        rescore_evaluation(path, tmp_path / "x")
    path.write_text("")
    with pytest.raises(ConfigError, match="at least one record"):
        rescore_evaluation(path, tmp_path / "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ('{"problem": "1a+2=", "answer": "3"}\n{"problem"\n', "bad.jsonl:2: not valid JSON"),
        ('{"problem": "1a+2="}\n', 'no field "answer"'),
        ('{"problem": "1a+2=", "answer": null}\n', 'field "answer".* is null'),
    ],
)
def test_broken_files_name_the_place(model, tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    options = _options(tmp_path / "out", benchmarks=[str(tmp_path / "bad.jsonl")])
    template = ["data.template={prompt}", "rollout.max_new_tokens=8", "data.max_prompt_tokens=64"]
    with pytest.raises(ConfigError, match=message):
        run_evaluation(**_also(model, *template), **options)
    assert not (tmp_path / "out").exists()


def test_answers_of_every_kind_and_equal_ids(model, tmp_path, caplog):
    rows = [
        {"id": 1, "problem": "1a+2=", "answer": 3},
        {"id": 1, "problem": "1a+2=", "answer": 0.5},
        {"problem": "2a+2=", "answer": ["4", 5]},
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ["data.template={prompt}", "data.prompt_suffix="]
    overrides += ["rollout.max_new_tokens=24", "data.max_prompt_tokens=64"]
    conclusion = run_evaluation(
        **_also(model, *overrides),
        **_options(tmp_path / "out", benchmarks=[str(file)], samples=2),
    )
    records = _samples(conclusion, "mine")
    assert [(r.prompt_id, r.gold) for r in records[::2]] == [
        ("mine-0", "3"),
        ("mine-1", "0.5"),
        ("mine-2", "4, 5"),
    ]
    assert "mine: 1 problems repeat an earlier one and count again" in caplog.text


def test_options_that_do_not_fit(model, tmp_path):
    def refuse(match, **given):
        with pytest.raises(ConfigError, match=match):
            run_evaluation(**model, **_options(tmp_path / "out", **given))

    refuse("--k 8 needs as many samples, and sandbox gets 4", report=ReportOptions(ks=(8,)))
    refuse("name at least one --benchmark", benchmarks=[])
    refuse('two benchmarks are called "sandbox"', benchmarks=["sandbox", "sandbox"])
    refuse('benchmark "nope": expected', benchmarks=["nope"])
    chat = _also(model, "data.template=chat")
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        run_evaluation(**chat, **_options(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_real_files_end_to_end(random_model, data_dir, tmp_path):
    """A random model on the first problems of every real file: prompts, grades, votes, report."""
    names = ["math500", "amc23", "aime24", "aime25", "olympiadbench", "gsm8k"]
    overrides = ["score.token=<|reserved_0|>", "score.ref_logprob=auto"]
    overrides += ["data.template={prompt}", "rollout.max_new_tokens=12"]
    model = {"model": str(random_model), "overrides": overrides}
    options = _options(tmp_path / "out", benchmarks=names, data_dir=data_dir, limit=4)
    conclusion = run_evaluation(**model, **options)
    for name in names:
        report = conclusion.report["benchmarks"][name]
        assert (report["num_prompts"], report["num_failed_grades"]) == (4, 0)
        assert report["metrics"]["weighted_majority@4"]["value"] is not None
        records = _samples(conclusion, name)
        assert len(records) == 16 and all(record.prompt for record in records)
    average = conclusion.report["average"]
    assert average["num_benchmarks"] == 6
    assert average["metrics"]["accuracy"]["value"] < 0.2


def test_calibration_of_the_sandbox_model(model, finished):
    """c_ref of a token is the mean of the log-probs that an evaluation reads for it."""
    options = {"data": "sandbox", "prompts": 6, "samples": 4}
    model = {**model, "overrides": ["rollout.max_num_seqs=8"]}
    everything = calibrate(**model, **options)
    assert everything.num_completions == 24 and everything.num_finished > 0
    assert {c.token for c in everything.candidates} <= {f"<|reserved_{i}|>" for i in range(5)}
    one = calibrate(**model, token="<|reserved_2|>", **options)
    assert [c.token for c in one.candidates] == ["<|reserved_2|>"]
    ended = [r.score_logprob for r in _samples(finished) if r.is_finished]
    [own] = [c for c in everything.candidates if c.token == "<|reserved_0|>"]
    # Other prompts of the same kind, so the same number up to a few standard errors.
    assert own.ref_logprob == pytest.approx(sum(ended) / len(ended), abs=0.5)
    two = calibrate(
        **model,
        token="<|reserved_0|>",
        **options,
        templates=("{prompt}", "0{prompt}"),
    )
    groups = {part.group: part.count for part in two.candidates[0].spreads}
    assert groups["all"] == two.num_finished
    assert {"template '{prompt}'", "template '0{prompt}'"} <= groups.keys()
    with pytest.raises(ConfigError, match="put {prompt} into it"):
        calibrate(**model, **options, templates=("none",))
    for key in ("score.token", "score.beta", "score.ref_logprob", "data.prompts_per_step"):
        with pytest.raises(ConfigError, match=f"{key} has no effect here"):
            calibrate(**_also(model, f"{key}=1"), **options)


def test_calibration_reads_every_prompt_once(sandbox_model, tmp_path):
    rows = [{"problem": f"{i}a+2=", "answer": str(i + 2)} for i in range(3)]
    file = tmp_path / "three.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ["data.template={prompt}", "data.prompt_suffix=", "rollout.max_new_tokens=24"]
    overrides += ["data.max_prompt_tokens=64"]
    found = calibrate(str(sandbox_model), str(file), overrides=overrides, prompts=8, samples=2)
    assert found.num_completions == 3 * 2
