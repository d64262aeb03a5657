"""The study of the real model: its problems, what it starts, and the arithmetic of its report."""

import json
import math
import random
import re
import subprocess
from collections import Counter
from fractions import Fraction
from itertools import islice
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import pytest
from report_runs import make_evaluation, make_run

from bench import real_model, real_model_report, word_problems
from bench.real_model_report import BASELINE, START, Row
from laser_fast.config import load_config
from laser_fast.log import jsonl

K = real_model_report.K


# Problems


def test_problems_are_the_same_every_time_and_held_out_ones_are_apart():
    train, held_out = word_problems.rows("train", 300), word_problems.rows("eval", 100)
    assert train[:40] == word_problems.rows("train", 40)
    texts = {row["problem"] for row in train}
    given = {row["problem"] for row in word_problems.responses(300)}
    unseen = {row["problem"] for row in held_out}
    assert len(texts) == 300 and len(unseen) == 100
    assert not unseen & (texts | given)
    # By the class of a problem, so that no longer list meets the other's either.
    assert all(map(word_problems.is_held_out, unseen))
    assert not any(map(word_problems.is_held_out, texts | given))


def test_answers_follow_from_the_numbers_of_the_problem():
    for question, steps in islice(word_problems.problems("test", held_out=False), 200):
        text, answer = word_problems.work(steps)
        known = Counter(map(int, re.findall(r"\d+", question)))
        for line in text.removesuffix(".").split(". "):
            work, result = line.split(" = ")
            left, operation, right = work.split()
            # Independent of the steps: what is written holds, and uses only what is known.
            assert Fraction(eval(work)) == int(result) >= 0
            assert {int(left), int(right)} <= set(known), (question, line)
            known[int(result)] += 1
        assert int(answer) == int(result)


def test_responses_show_their_work_or_only_the_answer():
    rows = list(word_problems.responses(400))
    shown = [row["response"] for row in rows if not row["response"].startswith("\\boxed{")]
    assert 0.65 < len(shown) / len(rows) < 0.85
    for response in shown:
        assert re.fullmatch(r"(\d+ [-+*/] \d+ = \d+\. ){2,3}\\boxed\{\d+\}", response)
        assert response.split()[-2].rstrip(".") == re.search(r"\{(\d+)\}", response)[1]


# What it starts


def test_methods_are_valid_configurations(tmp_path):
    configs = {
        method: load_config(real_model.CONFIG, real_model.run_overrides(tmp_path, method, 3))
        for method in real_model.METHODS
    }
    assert set(configs) == set(real_model_report.LABELS) - {START}
    grpo, laser, last = configs[BASELINE], configs["laser"], configs["laser-last"]
    assert grpo.score.loss_coef == grpo.advantage.score_coef == 0 < laser.score.loss_coef
    assert (laser.score.position, last.score.position) == ("eos", "last")
    assert laser.score.ref_logprob == last.score.ref_logprob == "floating"
    assert grpo.optim == laser.optim and {config.seed for config in configs.values()} == {3}


@pytest.fixture
def started(monkeypatch):
    """The commands of laser_fast that a study starts; each leaves what a real one would."""
    commands = []

    def run(command, **options):
        assert command[1:4] == ["-m", "torch.distributed.run", "--standalone"]
        ranks, arguments = command[5], command[command.index("laser_fast") + 1 :]
        commands.append((ranks, *arguments))
        verb, *rest = arguments
        out = {
            "train": lambda: _option(rest, "output_dir=", "summary.json"),
            "export": lambda: rest[1] + "/laser_fast.json" * ("laser" in rest[0]),
            "eval": lambda: rest[rest.index("--out") + 1] + "/report.json",
        }[verb]()
        path = real_model.Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}") if path.suffix else path.mkdir()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def _option(arguments, key, file):
    (value,) = [argument.removeprefix(key) for argument in arguments if argument.startswith(key)]
    return f"{value}/{file}"


def test_train_starts_a_method_once(started, tmp_path):
    arguments = ["--study", str(tmp_path), "train", "laser-last", "2"]
    real_model.main([*arguments, "optim.steps=7"])
    (command,) = started
    assert command[:3] == ("2", "train", str(real_model.CONFIG))
    config = load_config(command[2], list(command[3:]))
    assert (config.seed, config.optim.steps, config.score.position) == (2, 7, "last")
    assert config.output_dir == f"{tmp_path}/laser-last_2"
    assert config.data.train == f"{tmp_path}/train.jsonl"
    real_model.main(arguments)
    assert len(started) == 1


def test_evaluate_exports_measures_and_repeats_nothing(started, tmp_path):
    evaluate = ["--study", str(tmp_path), "--ranks", "1", "evaluate"]
    with pytest.raises(SystemExit, match="laser_1 is not finished; train it first"):
        real_model.main([*evaluate, "laser", "1"])
    (tmp_path / "laser_1").mkdir()
    (tmp_path / "laser_1" / "summary.json").touch()
    folder = tmp_path / "evaluations" / "laser_1"
    real_model.main([*evaluate, "laser", "1", "--problems", "5", "--samples", "9"])
    model, rows = folder / "model", tmp_path / "held_out.jsonl"
    shared = f"--config {tmp_path}/laser_1/config.toml --seed 1"
    assert [" ".join(command) for command in started] == [
        f"1 export {tmp_path}/laser_1 {model}",
        f"1 eval {model} {shared} --out {folder}/held_out --benchmark {rows} --limit 5 --samples 9",
    ]
    assert not model.exists()  # it can be had again from the run's checkpoint
    seen = load_config(real_model.CONFIG).data.eval_limit
    assert jsonl.read_lines(rows) == word_problems.rows("eval", real_model.EVAL_ROWS)[seen:]

    real_model.main([*evaluate, "laser", "1"])
    assert len(started) == 2
    real_model.main([*evaluate, "laser", "1", "--gsm8k", str(tmp_path)])
    assert [command[1] for command in started[2:]] == ["export", "eval"]
    assert {"gsm8k", "--no-score", "data.max_prompt_tokens=400", str(tmp_path)} < set(started[-1])


def test_evaluate_measures_c_ref_where_no_score_was_trained(started, tmp_path):
    (tmp_path / "start").mkdir()
    (tmp_path / "grpo_0").mkdir()
    (tmp_path / "grpo_0" / "summary.json").touch()
    for method in ("start", "grpo"):
        real_model.main(["--study", str(tmp_path), "evaluate", method, "0"])
    assert [command[1] for command in started] == ["eval", "export", "eval"]
    for command in (started[0], started[2]):
        assert command[command.index("--ref-logprob") + 1] == "auto"
    assert started[0][2] == f"{tmp_path}/start" and (tmp_path / "start").exists()


# The report


def _row(method, seed, **values):
    return Row(method, seed, {key: values.get(key) for key in real_model_report.COLUMNS})


def test_means_and_differences_by_hand():
    rows = [
        _row(START, 0, accuracy=0.3),
        *(_row("grpo", seed, accuracy=a) for seed, a in enumerate((0.5, 0.7, 0.6))),
        *(_row("laser", seed, accuracy=a, auroc=0.8) for seed, a in enumerate((0.52, 0.72))),
    ]
    found = real_model_report.means(rows)
    assert found["grpo"]["accuracy"] == pytest.approx((0.6, 4.303 * 0.1 / math.sqrt(3)))
    assert math.isnan(found["grpo"]["auroc"].mean)
    assert found[START]["accuracy"].mean == 0.3 and math.isnan(found[START]["accuracy"].half_width)
    # Seeds differ much, the two methods of a seed always by the same.
    gains = real_model_report.differences(rows)
    assert [row[:2] for row in gains] == [("laser", 0), ("laser", 1)]
    gain = real_model_report.means(gains)["laser"]
    assert gain["accuracy"] == pytest.approx((0.02, 0.0), abs=1e-12)
    assert math.isnan(gain["auroc"].mean)
    assert real_model_report.differences([_row("laser", 5, accuracy=0.9)]) == []


def test_samples_needed_for_the_vote_of_k_not_of_all():
    stopping = {
        "fixed": {
            "samples": [1, *range(1, 17)],
            "accuracy": [0.5, *(0.5 + 0.02 * k for k in range(16))],
        },
        "posterior": {"samples": [1, 3, 16], "accuracy": [0.5, 0.6, 0.9]},
        "agreement": {"samples": [1, 2, 16], "accuracy": [0.5, 0.5, 0.6]},
    }
    found = real_model_report.samples_needed(stopping)
    wanted = 0.5 + 0.02 * (K - 1) - 0.005
    assert found["samples_posterior"] == pytest.approx(3 + 13 * (wanted - 0.6) / 0.3, abs=0.03)
    assert found["samples_fixed"] == pytest.approx(K - 0.25, abs=0.03)
    assert math.isnan(found["samples_agreement"])


def _draw_evaluation(study, method, seed, *, gsm8k=None):
    """A finished evaluation of K drawn completions, whose scores know something."""
    folder = study / "evaluations" / f"{method}_{seed}"
    rng = random.Random(f"{method} {seed}")
    lines = []
    for problem in range(12):
        for sample in range(K):
            answer = rng.choice("77789")
            score = min(max(rng.gauss(0.65 if answer == "7" else 0.35, 0.25), 0.01), 0.99)
            lines.append({
                "prompt_id": f"{problem}", "sample": sample, "prompt": "", "gold": "7",
                "text": "", "answer": answer, "reward": float(answer == "7"), "score": score,
                "score_logprob": None, "finish_reason": "stop", "num_tokens": 5,
            })  # fmt: skip
    (folder / "held_out" / "held_out").mkdir(parents=True)
    jsonl.write_lines(folder / "held_out" / "held_out" / "samples.jsonl", lines)
    (folder / "held_out" / "report.json").write_text("{}")
    if gsm8k is not None:
        (folder / "gsm8k").mkdir()
        report = {"benchmarks": {"gsm8k": {"metrics": {"accuracy": {"value": gsm8k}}}}}
        (folder / "gsm8k" / "report.json").write_text(json.dumps(report))
    return lines


def _vote(ballot, weights):
    """Whether the answer with most votes is right, the first of a tie."""
    totals = Counter()
    for line, weight in zip(ballot, weights, strict=True):
        totals[line["answer"]] += weight
    return float(max(totals, key=totals.get) == "7")


def test_gains_are_bootstrapped_over_the_same_problems_in_every_seed(tmp_path):
    gains = []
    for seed in range(3):
        lines = _draw_evaluation(tmp_path, "laser", seed)
        ballots = [lines[i : i + K] for i in range(0, len(lines), K)]
        gains.append([
            _vote(ballot, [line["score"] for line in ballot]) - _vote(ballot, [1] * K)
            for ballot in ballots
        ])  # fmt: skip
    by_problem = np.mean(gains, axis=0)
    rng = np.random.default_rng((0, crc32(b"held_out")))
    draws = [by_problem[rng.integers(12, size=12)].mean() for _ in range(1000)]
    expected = (by_problem.mean(), *np.percentile(draws, [2.5, 97.5]))
    assert expected[0] > 0

    measured = [real_model_report.read_evaluation(tmp_path, "laser", seed) for seed in range(3)]
    # Intervals of few problems are coarse, so the draws behind them are compared as well.
    key = f"weighted_gain@{K}"
    assert np.mean([one.draws[key] for one in measured], axis=0) == pytest.approx(draws)
    pooled = real_model_report.pooled_gains(measured)["laser"]
    assert pooled[key] == pytest.approx(expected)
    assert real_model_report.read_evaluation(tmp_path, "laser", 3) is None


def test_values_are_those_of_the_evaluation(tmp_path):
    folder = tmp_path / "evaluations" / "laser_0" / "held_out"
    folder.parent.mkdir(parents=True)
    make_evaluation(folder, {"held_out": 0.6}, problems=6, samples=K)
    metrics = json.loads((folder / "report.json").read_text())["benchmarks"]["held_out"]["metrics"]
    found = real_model_report.read_evaluation(tmp_path, "laser", 0)
    assert found[1:3] == (6, K)
    for key in set(real_model_report.COLUMNS) - {"gsm8k"}:
        assert found.row.values[key] == metrics[key]["value"], key


def _made_run(study, method, seed, *, accuracy):
    evaluations = [
        {"step": step, "num_prompts": 64, "samples_per_prompt": 8, "accuracy": value, "f1": None}
        for step, value in ((0, 0.3), (30, accuracy))
    ]
    is_trained = method != BASELINE
    make_run(
        study / f"{method}_{seed}",
        loss_coef=float(is_trained),
        score_coef=0.1 * is_trained,
        evaluations=evaluations,
    )
    (study / f"{method}_{seed}" / "summary.json").write_text('{"wall_seconds": 5.0}')


def test_report_takes_what_is_finished_and_names_the_rest(tmp_path, capsys):
    study = tmp_path / "study"
    for method, seed, accuracy in (("grpo", 0, 0.6), ("laser", 0, 0.65), ("laser", 1, 0.7)):
        _made_run(study, method, seed, accuracy=accuracy)
    make_run(study / "laser-last_0")  # still going: no summary
    for method, gsm8k in (("start", 0.02), ("grpo", None), ("laser", 0.05)):
        _draw_evaluation(study, method, 0, gsm8k=gsm8k)
    path = tmp_path / "result.json"
    real_model.main(["--study", str(study), "report", "--json", str(path), "--seeds", "0", "1"])
    result = json.loads(path.read_text())
    facts = result["header"]
    assert facts["missing, not trained"] == "grpo 1, laser-last 0, laser-last 1"
    assert facts["missing, not evaluated"] == "laser 1"
    assert facts["missing, no GSM8K"] == "grpo 0"
    assert "missing, start not evaluated" not in facts
    assert {"commit", "versions", "device", "command", "commands before"} < facts.keys()
    # Made runs have another configuration, which the commands would not give.
    other = facts["laser_1 was trained with"]
    assert "seed = 0, " in other and "optim.steps = 30, " in other
    assert not re.search("loss_coef|model.path|sandbox", other)

    rows = {(row["part"], row["method"], row["seed"]): row for row in result["rows"]}
    assert rows["own", "laser", 1]["values"]["accuracy"] == 0.7
    assert rows["own", "start", 0]["values"]["accuracy"] == 0.3
    assert rows["evaluate", "laser", 0]["values"]["gsm8k"] == 0.05
    assert ("evaluate", "laser", 1) not in rows and ("own", "laser-last", 0) not in rows

    text = path.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    assert f"12 held-out problems, {K} completions each" in text
    assert "| LaSeR, score at the EOS | 2 | .675 +- .318 |" in text
    assert "| LaSeR, score at the EOS | 1 | +.050 |" in text  # the runs' own, paired
    readme = text[text.index("## For the README") :]
    assert "(bench/results/result.md)" in readme
    says = (
        r"LaSeR, score at the EOS: accuracy N against GRPO's; .*; posterior votes N \[N, N\] over"
    )
    assert re.search(says.replace("N", r"[-+]\.\d{3}"), readme)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_curves_average_the_steps_that_all_seeds_have(tmp_path):
    runs = [
        real_model_report.read_run(make_run(tmp_path / f"{steps}", steps=steps))
        for steps in (9, 12)
    ]
    lines = [real_model_report._line(run, "score/mean_correct") for run in runs]
    assert list(lines[0]) == list(range(5, 9))  # undefined before, as the first class was empty
    figure = real_model_report.charts.figure([("", lambda axes: real_model_report._draw(
        axes, runs={"LaSeR": runs}, keys={"score/mean_correct": "-"}
    ))], columns=1)  # fmt: skip
    thin, other, mean = figure.axes[0].lines
    assert thin.get_linewidth() == other.get_linewidth() < mean.get_linewidth()
    assert list(mean.get_xdata()) == list(range(5, 9)) and mean.get_label() == "LaSeR"
    assert mean.get_ydata()[0] == pytest.approx(0.05)


def test_report_refuses_evaluations_of_two_sizes(tmp_path, monkeypatch):
    def read(study, method, seed):
        return real_model_report.Measured(_row(method, seed), 12 + len(method), K, {})

    monkeypatch.setattr(real_model_report, "read_evaluation", read)
    with pytest.raises(ValueError, match=r"one size.*\(16, 8\), \(17, 8\)"):
        real_model_report.write(tmp_path, tmp_path / "r.json", ["grpo", "laser"], [0], {})
