"""A step without a finite gradient: left out, dumped, counted, and survived or not."""

from collections import Counter

import pytest
from small_runs import read_batch

from laser_fast.cli import train_run
from laser_fast.config import load_config
from laser_fast.log.jsonl import read_lines
from laser_fast.training import trainer as trainer_module
from laser_fast.training.bad_steps import DivergedError
from laser_fast.training.trainer import Trainer


@pytest.fixture
def spoil(monkeypatch):
    """A function that makes the loss, or the policy's log-probs too, nan in given steps."""

    def install(steps, *, logprobs=False):
        now, seen = [], {}
        step, joint_loss = Trainer.step, trainer_module.joint_loss

        def counted(self, number):
            now[:] = [number]
            seen[number] = [p.full_tensor().clone() for p in self.policy.parameters()]
            return step(self, number)

        def spoilt(objective, batch):
            head = joint_loss(objective, batch)

            def spoilt_head(*arguments):
                result = head(*arguments)
                if now[0] not in steps:
                    return result
                if logprobs:
                    result = result._replace(logprobs=result.logprobs * float("nan"))
                return result._replace(loss=result.loss * float("nan"))

            return spoilt_head

        monkeypatch.setattr(Trainer, "step", counted)
        monkeypatch.setattr(trainer_module, "joint_loss", spoilt)
        return seen

    return install


@pytest.mark.parametrize("logprobs", [False, True])
def test_the_step_is_skipped_dumped_and_the_run_goes_on(tmp_path, write_config, spoil, logprobs):
    seen = spoil({1}, logprobs=logprobs)
    score = {"max_grad_ratio": 0.5}  # measured in step 0, and 1 of another
    path = write_config(tmp_path, score=score, optim={"minibatches": 1}, data={"eval": ""})
    train_run(load_config(path))
    changed = [
        any((a != b).any() for a, b in zip(seen[step], seen[step + 1], strict=True))
        for step in range(3)
    ]
    assert changed == [True, False, True]
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step/grad_norm"] is None for line in lines] == [False, True, False, False]
    assert all(line["score/coef"] > 0 for line in lines)

    [dump] = (tmp_path / "run" / "bad_steps").iterdir()
    assert dump.name == "step-000001-update-0-rank-0.jsonl"
    sequences = read_batch(dump)
    samples = read_lines(tmp_path / "run" / "samples.jsonl")
    sampled = Counter(line["num_tokens"] for line in samples if line["step"] == 1)
    assert Counter(len(s.completion_ids) for s in sequences) <= sampled
    assert all(len(s.rollout_logprobs) == len(s.completion_ids) for s in sequences)
    assert any(s.advantage for s in sequences) and any(s.score_at for s in sequences)


def test_too_many_in_a_row_end_the_run_also_across_a_resume(tmp_path, write_config, spoil):
    spoil({1, 2, 3})
    options = {"optim": {"max_bad_steps": 2}, "data": {"eval": ""}}
    path = write_config(tmp_path, checkpoint={"every": 1, "keep": 9}, **options)
    message = "after 3 such steps in a row, more than optim.max_bad_steps = 2"
    with pytest.raises(
        DivergedError, match=f"step 3: .*{message}.*start a new one with a lower optim.lr"
    ):
        train_run(load_config(path))
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 3
    with pytest.raises(DivergedError, match=message):
        train_run(load_config(path), resume=True)
