"""Tables and plots from made results: the README's, and the table of targets."""

import json

import pytest

from bench import report, targets
from bench.markdown import document
from bench.provenance import ROOT


def row(provider, milliseconds, *, op="linear_logprob_loss", shape="qwen2.5-7b", n=8192, **changes):
    case = {"op": op, "shape": shape, "N": n, "D": 3584, "V": 152064, "dtype": "bfloat16"}
    time = {
        "median_ms": milliseconds,
        "p20_ms": milliseconds,
        "p80_ms": milliseconds,
        "rounds": 9,
        "x_baseline": milliseconds / 60,
        "x_bound": milliseconds / 34,
    }
    return {
        "case": case,
        "provider": provider,
        "cannot": "",
        "status": "ok",
        "reason": "",
        "rank": 1,
        "errors": {"loss": {"value": 1e-6, "tolerance": 1e-5, "library": 2e-6}},
        "peak_extra_mib": {"fwd": 1.0, "fwd+bwd": 3072.0},
        "times": {"fwd": time, "fwd+bwd": time},
    } | changes


ABSENT = {"times": {}, "peak_extra_mib": {}, "errors": {}, "rank": None, "status": "skipped"}
ROWS = [
    row("unfused", 60.0, rank=2),
    row("ours triton", 36.0),
    row("ours triton", 4.5, n=1024),
    row("ours triton", 144.0, n=32768),
    row("unfused", 240.0, n=32768, peak_extra_mib={"fwd+bwd": 65 * 1024.0}),
    row("bare GEMMs", 34.0, status="bound", rank=None),
    row("stream of W", 0.5, status="bound", rank=None),
    row("bare GEMMs", 4.3, n=1024, status="bound", rank=None),
    row("bare GEMMs", 136.0, n=32768, status="bound", rank=None),
    row("quack", 0.0, cannot="a gradient per row") | ABSENT | {"reason": "No module named 'quack'"},
]


@pytest.fixture
def results(tmp_path):
    def write(rows, name="loss_h200.json", device="NVIDIA H200", **header):
        path = tmp_path / name
        path.write_text(json.dumps({"header": {"device": device} | header, "rows": rows}))
        return path

    return write


def test_table_and_plot(results, tmp_path):
    png = tmp_path / "plots" / "loss.png"
    text = report.main([str(results(ROWS)), "--plot", str(png)])
    lines = text.splitlines()
    assert "N 8192" in lines[0] and "NVIDIA H200" in lines[0] and "`loss_h200.json`" in lines[0]
    assert [line.split(" | ")[0] for line in lines[4:8]] == [
        "| ours triton",
        "| unfused",
        "| bare GEMMs",
        "| stream of W",
    ]
    assert lines[4] == "| ours triton | 36 | 0.60 | 1.06 | 3 | loss 1.0e-06 (2.0e-06) |  |"
    assert lines[-1] == "Not measured: quack (No module named 'quack')"
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 10_000


def test_the_time_of_the_host_stands_beside_the_device_where_it_was_taken():
    rows = [
        row("ours triton", 0.3, host_ms={"fwd": 0.51, "fwd+bwd": 0.62}),
        row("quack", 0) | ABSENT,
    ]
    lines = document({}, rows).splitlines()
    assert lines[2].count("| host ms |") == 2 and "| 0.51 |" in lines[4] and "| 0.62 |" in lines[4]
    assert "host ms" not in document({}, rows[1:])


def test_a_later_file_replaces_an_earlier_one(results):
    old = results([row("ours triton", 99.0)], "a.json")
    new = results([row("ours triton", 36.0)], "b.json")
    text = report.main([str(old), str(new)])
    assert "| ours triton | 36 |" in text and "99" not in text


def test_nothing_is_made_up(results):
    assert report.main([str(results(ROWS)), "--shape", "llama-3-8b"]) == "not yet measured\n"


def test_targets_are_met_missed_or_not_measured(results, tmp_path):
    results(ROWS)
    results([row("ours triton", 40.0, op="linear_logprob")], "scoring.json")
    lines = {line.split(" | ")[0]: line for line in targets.report(targets.read([tmp_path]))}
    bound = lines["| linear_logprob_loss fwd+bwd, 7B head, N 8192, over three bare GEMMs"]
    assert bound.endswith("| 1.08x | - | 1.06x (ours triton) | met | NVIDIA H200 |")
    assert "| 0.60x (ours triton) | met |" in lines["| the same over the unfused baseline"]
    assert (
        "| 1.18x (ours triton) | NOT met |"
        in lines["| scoring, 7B head, N 8192, over one bare GEMM"]
    )
    memory = lines["| peak extra memory, 7B head, N 32768"]
    assert "3.00 GiB, unfused 65.0 GiB (ours triton) | met |" in memory
    assert "not measured" in lines["| last_token_loss fwd, 7B head, B 64, over reading W once"]


def test_a_wrong_result_meets_no_target(results, tmp_path):
    results([row("ours triton", 20.0, status="wrong")])
    (line,) = [x for x in targets.report(targets.read([tmp_path])) if "three bare" in x]
    assert "0.59x (ours triton, wrong) | NOT met |" in line


def line_of(folder, text):
    (line,) = [line for line in targets.report(targets.read([folder])) if text in line]
    return line


def test_few_rows_are_held_to_the_stream_and_more_to_the_slower_bound(results, tmp_path):
    def last_token(provider, n, fwd, both, x_bound=1.1, **changes):
        times = {
            mode: {"median_ms": value, "x_bound": x_bound}
            for mode, value in (("fwd", fwd), ("fwd+bwd", both))
        }
        return row(provider, 0, op="last_token", n=n, times=times, **changes)

    rows = [last_token("ours triton", 64, 0.30, 1.1), last_token("stream of W", 64, 0.25, 0.75)]
    rows += [last_token("ours triton", 256, 0.4, 1.2, x_bound=1.4, is_preliminary=True)]
    results(rows)
    assert "| 1.25x | - | 1.20x (ours triton) | met |" in line_of(tmp_path, "reading W once")
    assert "| 1.47x (ours triton) | NOT met |" in line_of(tmp_path, "its memory floor")
    line = line_of(tmp_path, "B 256")
    assert "| 1.40x (ours triton, preliminary) | NOT met |" in line
    assert "not measured" in line_of(tmp_path, "B 1024")


@pytest.mark.parametrize(
    ("cuda", "measured", "rule"),
    [
        (30.0, "cuda by 20% (36 ms triton, 30 ms cuda)", "auto takes cuda"),
        (35.0, "cuda by 3% (36 ms triton, 35 ms cuda)", "auto stays as it is"),
        (40.0, "triton by 11% (36 ms triton, 40 ms cuda)", "auto takes triton"),
    ],
)
def test_the_faster_by_five_percent_is_for_auto(results, tmp_path, cuda, measured, rule):
    results([*ROWS, row("ours cuda", cuda)])
    assert f"| {measured} | {rule} | NVIDIA H200 |" in line_of(tmp_path, "Hopper: loss")
    results([*ROWS, row("ours cuda", cuda, status="wrong")])
    assert "not measured" in line_of(tmp_path, "Hopper: loss")


def test_every_card_has_its_line_and_its_prediction(results, tmp_path):
    name = targets.TARGETS[1].name
    predicted = [
        {"target": name, "card": card, "impl": "cuda", "predicted": value}
        for card, value in (("H200", 1.06), ("H100", 1.1))
    ]
    results(predicted, "predicted.json", "none")
    assert "| 1.06 cuda on H200, 1.10 cuda on H100 | not measured |" in line_of(tmp_path, name)
    results(ROWS, "a.json")
    results(ROWS, "b.json", "NVIDIA H100 80GB HBM3")
    lines = [x for x in targets.report(targets.read([tmp_path])) if name in x]
    assert len(lines) == 2 and "| 1.06 cuda on H200 | 1.06x" in lines[0]
    assert "| 1.10 cuda on H100 | 1.06x" in lines[1] and lines[1].endswith(
        "| NVIDIA H100 80GB HBM3 |"
    )
    results([{"target": "speed", "card": "H200", "impl": "cuda", "predicted": 1.0}], "typo.json")
    with pytest.raises(ValueError, match="expected predictions of targets"):
        targets.report(targets.read([tmp_path]))


def test_targets_on_a_cpu_and_of_the_rollout(results, tmp_path):
    def on_cpu(provider, mib, time):
        times = {"fwd+bwd": {"median_ms": time, "x_baseline": time / 100}}
        return row(provider, 0, shape="cpu", peak_extra_mib={"fwd+bwd": mib}, times=times)

    results([on_cpu("ours chunked", 120.0, 80.0), on_cpu("unfused", 750.0, 100.0)]
            + [on_cpu("unfused logits held", 1000.0, 100.0)], "cpu.json", "a CPU")  # fmt: skip
    inline = {"way": "inline", "extra_tokens_per_completion": 1.0}
    inline |= {"wall": {"extra": 0.07}, "cpu": {"extra": 0.04}}
    results([inline], "rollout.json", "a CPU", op="rollout_score", case="64 completions")
    results(
        [inline | {"wall": {"extra": 0.01}}], "x.json", "a CPU", op="rollout_score", case="smoke"
    )
    step = {"step": {"median_ms": 5.0, "x_baseline": 0.97}}
    results(
        [row("laser_fast", 0, op="train_step", shape="quickstart", times=step)], "s.json", "a CPU"
    )
    lines = targets.report(targets.read([tmp_path]))
    text = "\n".join(lines)
    assert "time over unfused | 0.85x | - | 0.80x (ours chunked) | met | a CPU |" in text
    assert "0.120x (120 of 1000 MiB; 0.160x of 750 MiB where no logits are held) | met" in text
    assert "over plain logits | 1.00x | - | 0.97x (laser_fast) | met" in text
    assert "per inline score | 1.00 | - | 1.00 | met" in text
    assert "of inline scores | +5.0% | - | +7.0% (+4.0% CPU time) | NOT met" in text


def test_a_step_without_its_baseline_is_not_measured(results, tmp_path):
    step = {"step": {"median_ms": 5.0}}  # plain logits took more memory than there is
    results([row("body + kernel", 0, op="train_step", times=step, shape="qwen2.5-1.5b")])
    (line,) = [x for x in targets.report(targets.read([tmp_path])) if "1.5B model" in x]
    assert "| not measured |" in line


def test_committed_results_say_where_they_come_from():
    for path in (ROOT / "bench" / "results").glob("*.json"):
        header = json.loads(path.read_text())["header"]
        assert {"device", "versions", "commit", "date", "command"} <= set(header), path.name
        assert path.with_suffix(".md").exists(), path.name
