"""Spread, beta and the choice of a token, by hand."""

import json
import math

import numpy as np
import pytest

from laser_fast.config import ConfigError
from laser_fast.evaluation.benchmarks import find_benchmark
from laser_fast.evaluation.calibrate import (
    Reading,
    calibrate,
    propose_beta,
    rank_candidates,
    spread,
)
from laser_fast.evaluation.settings import build_config


@pytest.mark.parametrize(
    ("ref_logprob", "beta"),
    [
        (-11.7, 0.12),  # 1 / 8.7 = .115
        (-7.0, 0.25),  # exactly 1 / 4
        (-4.7, 0.59),  # 1 / 1.7 = .588
        (-3.5, 2.0),
        (-23.1, 0.1),  # the rule allows .0498; the paper's value stands
        (-3.0, math.inf),
        (-1.0, math.inf),
        (-math.inf, math.inf),  # a token whose logit is masked
        (math.nan, math.inf),
    ],
)
def test_beta_of_the_rule(ref_logprob, beta):
    assert propose_beta(ref_logprob) == beta
    if math.isfinite(beta):
        assert ref_logprob + 1 / beta <= -3 + 1e-9


def test_spread_by_hand():
    found = spread(np.array([-10.0, -12.0, -11.0, -11.0]), ["a", "a", "b", "b"])
    assert (found.num, found.mean, found.std) == (4, -11.0, pytest.approx(math.sqrt(0.5)))
    # Both clusters sum to their share of the mean: the mean of prompts does not vary.
    assert found.standard_error == 0.0
    found = spread(np.array([-10.0, -10.0, -12.0, -12.0]), ["a", "a", "b", "b"])
    # sums +2 and -2: sqrt(2 / 1 * 8) / 4 = 1, as for the two numbers -10 and -12.
    assert found.standard_error == pytest.approx(1.0)
    assert math.isnan(spread(np.array([-1.0, -2.0]), ["a", "a"]).standard_error)


def test_error_of_lone_completions_is_the_usual_one():
    values = np.random.default_rng(0).normal(-20, 1, 50)
    found = spread(values, [str(i) for i in range(50)])
    assert found.standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(50))


def _row(logprobs, *, template="chat", prompt="p0", eos="<eos>", ids=(7, 1)):
    return Reading(
        template=template, prompt_id=prompt, eos=eos, completion_ids=ids, logprobs=logprobs
    )


def test_least_noise_at_its_own_beta_wins():
    # Spread .5 at -20 and beta .1 is less noise than spread .4 at -8 and beta .2.
    rows = [_row([-19.5, -7.6, -2.0]), _row([-20.5, -8.4, -2.0], prompt="p1")]
    found = rank_candidates(rows, {"far": 40, "near": 41, "common": 42})
    assert [candidate.token for candidate in found.candidates] == ["far", "near", "common"]
    noises = [candidate.noise(candidate.beta) for candidate in found.candidates]
    assert noises == [pytest.approx(0.05), pytest.approx(0.08), math.inf]
    assert list(found.candidates[0].spreads) == ["all"]


def test_spreads_by_template_and_eos():
    rows = [
        _row([-20.0]),
        _row([-21.0], eos="<end>"),
        _row([-24.0], template="{prompt}", prompt="p1"),
        _row(None, eos=None),
    ]
    found = rank_candidates(rows, {"z": 40})
    assert (found.num_completions, found.num_finished) == (4, 3)
    means = {group: part.mean for group, part in found.candidates[0].spreads.items()}
    assert means == {
        "all": pytest.approx(-65 / 3),
        "template 'chat'": -20.5,
        "after <eos>": -22.0,
        "after <end>": -21.0,
        "template '{prompt}'": -24.0,
    }


def test_tokens_that_the_model_writes_cannot_serve():
    rows = [_row([-20.0, -19.0], ids=(40, 1)), _row([-20.0, -19.0], prompt="p1")]
    assert [c.token for c in rank_candidates(rows, {"z": 40, "y": 41}).candidates] == ["y"]
    with pytest.raises(ConfigError, match="every reserved token occurs"):
        rank_candidates(rows, {"z": 40})


def test_a_spread_is_that_of_two_prompts():
    with pytest.raises(ConfigError, match="0 of 2 completions ended"):
        rank_candidates([_row(None, eos=None)] * 2, {"z": 40})
    with pytest.raises(ConfigError, match="2 of 2 completions ended.* those of two prompts"):
        rank_candidates([_row([-20.0])] * 2, {"z": 40})


def test_calibration_reads_every_prompt_once(sandbox_model, tmp_path):
    rows = [{"problem": f"{i}a+2=", "answer": str(i + 2)} for i in range(3)]
    file = tmp_path / "three.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ["data.template={prompt}", "data.prompt_suffix=", "rollout.max_new_tokens=24"]
    overrides += ["data.max_prompt_tokens=64"]
    benchmark = find_benchmark(str(file))
    means = set()
    for limit, position in ((8, "eos"), (0, "last")):
        where = [f"score.position={position}"]
        config = build_config(str(sandbox_model), benchmark, overrides=overrides + where)
        found = calibrate(config, benchmark, prompts=limit, samples=2)
        assert found.num_completions == 3 * 2 and found.position == position
        means.add(found.candidates[0].ref_logprob)
    assert len(means) == 2
