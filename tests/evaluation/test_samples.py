"""The summary of a scripted sampler's samples against numbers by hand."""

import dataclasses
import json
import math

import pytest

from laser_fast.evaluation.statistics import summarize
from laser_fast.log.metrics import RUN, shown_at
from laser_fast.log.samples import scored, to_records
from laser_fast.records import Completion, Group, Prompt, Sampling

EOS = 0


class ScriptedEngine:
    """Samples what it was told: per prompt, (answer id, is finished, score log-prob).

    A reward is 1 if the answer is the gold one; the digit 9 breaks the grader.
    """

    def __init__(self, script):
        self.script = script

    def generate(self, prompts, sampling):
        groups = []
        for prompt in prompts:
            completions, rewards = [], []
            for answer, finished, logprob in self.script[prompt.prompt_id]:
                ids = (answer, EOS) if finished else (answer,)
                completions.append(
                    Completion(
                        completion_ids=ids,
                        rollout_logprobs=(-1.0,) * len(ids),
                        finish_reason="stop" if finished else "length",
                        score_logprob=logprob if sampling.score_at else None,
                    )
                )
                rewards.append(None if answer == 9 else float(str(answer) == prompt.answer))
            assert len(completions) == sampling.group_size
            graded = {"completions": tuple(completions), "rewards": tuple(rewards)}
            groups.append(Group(prompt=prompt, **graded))
        return groups


def collect(prompts, *, engine, sampling, **parts):
    records = to_records(engine.generate(prompts, sampling), **parts)
    return scored(records, beta=0.1, ref_logprob=-20.0)


def evaluate(prompts, *, same_answer=None, **parts):
    return summarize(collect(prompts, **parts), same_answer=same_answer)


def _decode(ids):
    return "".join(rf"\boxed{{{i}}}" for i in ids if i != EOS)


def _extract(text):
    return text.split("{")[-1].strip("}")


def _prompt(prompt_id: str, answer: str) -> Prompt:
    return Prompt(prompt_id=prompt_id, text="?", prompt_ids=(1,), answer=answer)


def _parts(needs_score: bool = True, group_size: int = 4) -> dict:
    sampling = Sampling(
        group_size=group_size,
        temperature=1.0,
        max_new_tokens=2,
        seed=0,
        score_at="eos" if needs_score else None,
    )
    return {"decode": _decode, "extract": _extract, "sampling": sampling}


PROMPTS = [_prompt("a", "1"), _prompt("b", "2")]
# Scores are .1 (logprob + 20).
SCRIPT = {
    # Plain vote: 3 wins with two votes; weighted: 1 with .9; best: 1. The failed grade is left out.
    "a": [(3, True, -19.0), (1, True, -11.0), (3, True, -18.0), (9, True, -10.0)],
    # Plain vote: 2 wins with three; weighted: 4 with 1.3 clipped to 1 against .6 + .3 + 0.
    "b": [(2, True, -14.0), (4, True, -7.0), (2, False, None), (2, True, -17.0)],
}


def test_report_by_hand():
    report = evaluate(PROMPTS, engine=ScriptedEngine(SCRIPT), **_parts())
    assert (report["num_prompts"], report["samples_per_prompt"]) == (2, 4)
    assert report["num_failed_grades"] == 1
    # Correct: 1 of 3 graded in a, 3 of 4 in b, the truncated one with its right answer among them.
    assert report["accuracy"] == pytest.approx(4 / 7)
    assert report["uses_scores"]
    assert (report["majority"], report["weighted_majority"], report["best_of"]) == (0.5, 0.5, 0.5)
    assert report["truncated"] == pytest.approx(1 / 7)
    assert report["mean_length"] == pytest.approx(13 / 7)
    assert report["mean_length_correct"] == pytest.approx((2 + 2 + 1 + 2) / 4)
    assert report["mean_length_incorrect"] == pytest.approx(2.0)
    # Correct scores .9 .6 0 .3, incorrect .1 .2 1.3.
    assert (report["tpr"], report["tnr"]) == (0.5, pytest.approx(2 / 3))
    assert report["f1"] == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))
    assert report["auroc"] == pytest.approx((2 + 2 + 0 + 2) / 12)
    assert (report["mean_correct"], report["mean_incorrect"]) == pytest.approx((0.6, 1.6 / 3))
    # Finished and graded, clipped: .1 .9 .2 .6 1 .3.
    clipped = [0.1, 0.9, 0.2, 0.6, 1.0, 0.3]
    mean = sum(clipped) / 6
    variance = sum((c - mean) ** 2 for c in clipped) / 6
    assert report["score_std"] == pytest.approx(math.sqrt(variance))


def test_untrained_scores_do_not_vote():
    """Scores in [.01, .04]: weighting would let the single .04 beat two right answers."""
    script = {"a": [(1, True, -19.9), (1, True, -19.9), (3, True, -19.6), (4, True, -19.95)]}
    report = evaluate(PROMPTS[:1], engine=ScriptedEngine(script), **_parts())
    assert not report["uses_scores"]
    assert (report["majority"], report["weighted_majority"], report["best_of"]) == (1.0, 1.0, 0.0)
    spread = {"a": [(1, True, -19.5), (1, True, -19.5), (3, True, -8.0), (4, True, -19.9)]}
    report = evaluate(PROMPTS[:1], engine=ScriptedEngine(spread), **_parts())
    assert report["uses_scores"]
    assert (report["majority"], report["weighted_majority"]) == (1.0, 0.0)


def test_equivalent_answers_vote_together():
    script = {"a": [(3, True, -12.0), (3, True, -18.0), (1, True, -18.0), (11, True, -19.0)]}
    parts = _parts()
    assert evaluate(PROMPTS[:1], engine=ScriptedEngine(script), **parts)["majority"] == 0.0
    script["a"].append((11, True, -19.0))
    parts = _parts(group_size=5)
    report = evaluate(
        PROMPTS[:1],
        engine=ScriptedEngine(script),
        same_answer=lambda first, second: first.strip("1") == second.strip("1"),
        **parts,
    )
    assert report["majority"] == 1.0


def test_ranks_join_to_the_same_report():
    engine = ScriptedEngine(SCRIPT)
    whole = summarize(collect(PROMPTS, engine=engine, **_parts()))
    shares = [collect(PROMPTS[i : i + 1], engine=engine, **_parts()) for i in (1, 0)]
    assert summarize(shares[0] + shares[1]) == whole
    assert collect([], engine=engine, **_parts()) == []


def test_without_scores_only_their_metrics_are_undefined():
    report = evaluate(PROMPTS, engine=ScriptedEngine(SCRIPT), **_parts(needs_score=False))
    assert report["accuracy"] == pytest.approx(4 / 7) and report["majority"] == 0.5
    for key in ("f1", "tpr", "auroc", "ece", "weighted_majority", "best_of", "score_std"):
        assert report[key] is None
    assert report["uses_scores"] is False
    json.dumps(report, allow_nan=False)


def test_summary_is_flat_and_complete():
    """The keys that a run's log, table and curves are made of."""
    report = evaluate(PROMPTS, engine=ScriptedEngine(SCRIPT), **_parts())
    assert list(report) == [
        *("num_prompts", "samples_per_prompt", "num_failed_grades", "uses_scores", "score_std"),
        *(metric.name for metric in shown_at(RUN)),
    ]
    promised = """accuracy majority weighted_majority best_of truncated mean_length tpr tnr f1 auroc
        verification_accuracy ece brier ece_corrected brier_corrected mean_correct mean_incorrect"""
    assert set(promised.split()) <= report.keys()
    # Scores .1 .9 .2 .6 1.3 0 .3 of correct answers 0 1 0 1 0 1 1.
    assert report["verification_accuracy"] == pytest.approx(4 / 7)
    json.dumps(report, allow_nan=False)


def test_all_grades_failed():
    script = {"a": [(9, True, -10.0)] * 4}
    report = evaluate(PROMPTS[:1], engine=ScriptedEngine(script), **_parts())
    assert report["num_failed_grades"] == 4
    assert report["accuracy"] is None and report["majority"] is None


def test_records_are_refused_when_they_do_not_fit_together():
    records = collect(PROMPTS, engine=ScriptedEngine(SCRIPT), **_parts())
    with pytest.raises(ValueError, match="at least one record"):
        summarize([])
    with pytest.raises(ValueError, match="sample 0 of prompt a appears twice"):
        summarize([*records, records[0]])
    with pytest.raises(ValueError, match="expected 4 samples of every prompt, got 3 of b"):
        summarize(records[:-1])
    unscored = dataclasses.replace(records[0], score=None)
    assert summarize(records)["f1"] is not None is summarize([unscored, *records[1:]])["f1"]
