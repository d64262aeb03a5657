"""Every benchmark runs on a CPU and gives a complete table, so that none can rot."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from bench import (
    last_token,
    linear_logprob,
    linear_logprob_loss,
    profile_kernels,
    providers,
    runner,
    train_step,
)
from bench.provenance import ROOT

OURS = {provider.name for provider in providers.OURS}
ROWS = {p.name for p in (*providers.BASELINES, *providers.OURS, *providers.PEERS)}
MEANS = {provider.name for provider in providers.MEAN_PEERS}
BOUNDS = {"bare GEMMs", "stream of W"}
GRAPHS = {"ours triton graph", "ours cuda graph"}
# These need only torch, so they must be there on any machine.
ALWAYS = {"unfused", "ours reference", "ours chunked"}
HEADER = {"op", "device", "threads", "cuda", "python", "versions", "commit", "date", "command"}
TIME = {"median_ms", "p20_ms", "p80_ms", "rounds"}


def smoke(module, tmp_path, *options):
    path = tmp_path / "result.json"
    module.main(["--smoke", "--json", str(path), *options])
    result = json.loads(path.read_text())
    assert set(result["header"]) >= HEADER
    text = path.with_suffix(".md").read_text()
    for row in result["rows"]:
        assert f"| {row['provider']} |" in text
    return result["rows"]


@pytest.mark.parametrize(
    ("module", "names", "modes"),
    [
        (linear_logprob, ROWS | BOUNDS, {"fwd", "fwd+bwd"}),
        (linear_logprob_loss, ROWS | MEANS | BOUNDS, {"fwd", "fwd+bwd"}),
        (last_token, ROWS | GRAPHS | BOUNDS, {"score", "fwd", "fwd+bwd"}),
    ],
)
def test_head_benchmarks(module, names, modes, tmp_path):
    rows = smoke(module, tmp_path)
    for num_rows in (8, 200):
        case = {row["provider"]: row for row in rows if row["case"]["N"] == num_rows}
        assert set(case) == names
        for name, row in case.items():
            if row["status"] in ("skipped", "crashed"):
                assert name not in ALWAYS and row["reason"]
                continue
            assert row["status"] in ("ok", "bound"), f"{name}: {row['reason']}"
            assert set(row["times"]) == modes and set(row["peak_extra_mib"]) == modes
            assert all(set(time) >= TIME for time in row["times"].values())
            assert all("x_bound" in time for time in row["times"].values())
            assert row["errors"] or row["status"] == "bound"
        for name in ({"ours triton", "ours cuda"} | GRAPHS) & names:
            assert case[name]["reason"] == "needs an NVIDIA GPU"
        ranks = [row["rank"] for row in case.values() if row["rank"]]
        assert sorted(ranks) == list(range(1, len(ranks) + 1)) and len(ranks) >= 3
        for name in names - OURS - GRAPHS - providers_that_do_all():
            assert case[name]["cannot"] or case[name]["status"] == "bound"


def providers_that_do_all():
    return {provider.name for provider in providers.BASELINES}


def test_train_step(tmp_path):
    rows = smoke(train_step, tmp_path)
    assert [row["provider"] for row in rows] == ["plain logits", "laser_fast", "body + kernel"]
    for row in rows:
        assert row["status"] == "ok", row["reason"]
        assert set(row["times"]) == {"head", "step"}
        assert row["times"]["step"]["x_baseline"] > 0


@pytest.mark.parametrize("shown", [3, 1000])
def test_profile(shown, tmp_path, monkeypatch):
    monkeypatch.setattr(profile_kernels, "KERNELS_SHOWN", shown)
    rows = profile_kernels.main(["--smoke", "--json", str(tmp_path / "profile.json")])
    for op in ("linear_logprob_loss", "linear_logprob", "last_token"):
        kernels = [row for row in rows if row["op"] == op and row["provider"] == "ours chunked"]
        names = [row["kernel"] for row in kernels]
        if shown == 3:
            assert len(names) == 4 and re.fullmatch(r"\d+ others", names[-1])
        else:
            assert "aten::mm" in names and len(set(names)) == len(names)
        assert all(row["ms"] >= 0 and row["calls"] > 0 for row in kernels)
        times = [row["ms"] for row in kernels[:3]]
        assert times == sorted(times, reverse=True) and times[0] > 0
        assert sum(row["share"] for row in kernels) == pytest.approx(1)
    assert (tmp_path / "profile.md").exists()


@pytest.mark.vllm
@pytest.mark.slow
def test_rollout_score(tmp_path):
    path = tmp_path / "result.json"
    command = [sys.executable, "-m", "bench.rollout_score", "--smoke", "--json", str(path)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    result = json.loads(path.read_text())
    assert set(result["header"]) >= HEADER
    ways = {row["way"]: row["extra_tokens_per_completion"] for row in result["rows"]}
    assert ways["off"] == 0 and ways["inline"] == 1
    assert path.with_suffix(".md").exists()


@pytest.mark.vllm
@pytest.mark.slow
def test_weight_sync(tmp_path):
    path = tmp_path / "result.json"
    command = [sys.executable, "-m", "bench.weight_sync", "--smoke", "--json", str(path)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    result = json.loads(path.read_text())
    assert set(result["header"]) >= HEADER | {"bytes", "disagreement"}
    assert {row["part"] for row in result["rows"]} == {"start", "sync", "check", "copy"}
    assert all(row["median_s"] > 0 for row in result["rows"])
    assert path.with_suffix(".md").exists()


@pytest.mark.trl
@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["trl_sandbox"], ["trl_memory", "laser"], ["grpo_step"]])
def test_trl(arguments, tmp_path):
    path = tmp_path / "result.json"
    command = [sys.executable, "-m", f"bench.{arguments[0]}", *arguments[1:], "--smoke"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    subprocess.run([*command, "--json", path], cwd=ROOT, env=environment, check=True)
    result = json.loads(path.read_text())
    assert set(result["header"]) >= HEADER
    assert {row["trainer"] for row in result["rows"]} <= {
        "LaSeR",
        "stock",
        "laser",
        "TRL",
        "laser_fast",
    }
    if "grpo_step" in arguments:  # of which a file holds cases of several runs
        assert all(result["header"]["commit"] in row["measured"] for row in result["rows"])
    assert path.with_suffix(".md").exists()


@pytest.mark.parametrize("module", [["bench.last_token"], ["bench.guard", "bench.last_token"]])
def test_the_command_line(module, tmp_path):
    command = [sys.executable, "-m", *module, "--smoke", "--only", "unfused,stream of W"]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "", "HOME": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "- command: python -m bench.last_token --smoke --only" in result.stdout
    assert result.stdout.count("| unfused | 1 |") == 2


def test_resume_keeps_finished_cases_and_skip_names_the_reason(tmp_path):
    path = tmp_path / "result.json"
    arguments = ["--smoke", "--only", "unfused,ours chunked", "--json", str(path)]
    first, second = linear_logprob.main(arguments)[:2], linear_logprob.main(arguments)[2:]
    result = json.loads(path.read_text())
    result["rows"] = first  # as if the process had died in the second case
    path.write_text(json.dumps(result))
    skip = "ours chunked=ended the process (exit code -11)"
    rows = linear_logprob.main([*arguments, "--resume", "--skip", skip])
    assert rows[:2] == first and len(rows) == len(first) + len(second)
    assert rows[2]["status"] == "skipped" and "exit code -11" in rows[2]["reason"]
    assert rows[3]["rank"] == 1


def test_rows_are_on_disk_before_the_next_provider_runs(tmp_path, monkeypatch):
    path = tmp_path / "result.json"

    def fatal(inputs):
        rows = json.loads(path.read_text())["rows"]
        assert [row["provider"] for row in rows] == ["bare GEMMs", "ours chunked"]
        assert all(row["is_preliminary"] for row in rows)
        assert (
            "fwd+bwd" in rows[1]["times"] and "preliminary" in path.with_suffix(".md").read_text()
        )
        raise KeyboardInterrupt  # ends the process, as a timeout would

    broken = providers.Provider("unfused", fatal)
    monkeypatch.setattr(linear_logprob, "PROVIDERS", (providers.OURS[1], broken))
    arguments = ["--smoke", "--only", "bare GEMMs,ours chunked,unfused", "--json", str(path)]
    with pytest.raises(KeyboardInterrupt):
        linear_logprob.main(arguments)
    rows = linear_logprob.main([*arguments, "--resume", "--skip", "unfused=ended the process"])
    assert not any("is_preliminary" in row for row in rows) and len(rows) == 6  # measured anew


def test_inputs_that_do_not_fit_are_a_row_and_the_run_goes_on(monkeypatch):
    make = runner.make_input_sets

    def full(shape, num_rows, *rest):
        if num_rows == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has")
        return make(shape, num_rows, *rest)

    monkeypatch.setattr(runner, "make_input_sets", full)
    first, second = linear_logprob.main(["--smoke", "--only", "ours chunked"])
    assert first["reason"].startswith("inputs: too little memory: CUDA out of memory")
    assert second["case"]["N"] == 200 and second["status"] == "ok"


def test_unknown_providers_and_shapes_are_refused_by_name():
    with pytest.raises(SystemExit, match="no provider magic"):
        linear_logprob.main(["--smoke", "--only", "magic"])
    with pytest.raises(SystemExit, match="no shape gpt-9"):
        linear_logprob.main(["--shapes", "gpt-9"])
