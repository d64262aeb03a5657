"""What the configuration says of the loss: the defaults that protect, and the doubts."""

import pytest
from tiny_models import make_config

from laser_fast.config import ConfigError


def test_gspo_as_it_was_published_is_silent_and_anything_else_is_doubted(recwarn):
    def messages(**keys):
        recwarn.clear()
        make_config(loss=keys)
        return [str(warning.message) for warning in recwarn]

    good = {"kind": "gspo", "clip_low": 3e-4, "clip_high": 4e-4}
    good["aggregation"] = "seq-mean-token-mean"
    assert messages(**good) == messages() == []
    for key, value in (("clip_low", 0.2), ("clip_high", 0.1)):
        [message] = messages(**good | {key: value})
        assert f"a clip of {value:g} hardly ever meets; set loss.clip_low = 3e-4" in message
    for value in ("token-mean", "seq-mean-token-sum-norm"):
        [message] = messages(**good | {"aggregation": value})
        assert f'"{value}" weights long sequences more; set loss.aggregation' in message
    [message] = messages(kind="gspo")
    assert "0.2 hardly" in message and "token-mean" in message


def test_the_dual_clip_is_on_unless_it_is_switched_off():
    assert make_config().loss.clip_dual == 3.0


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"loss": {"importance": "sequence-mask", "tis_cap": 0.0}},
            'loss.importance = "sequence-mask" needs loss.tis_cap, got 0; set it to 2.0',
        ),
        ({"data": {"pass_rate": [0.9, 0.1]}}, r"data.pass_rate = \[0.9, 0.1\] must be \[lowest, h"),
        ({"data": {"pass_rate": [0.0, 1.1]}}, "expected a number less than or equal to 1, got 1.1"),
        ({"optim": {"epochs": 0}}, "expected a number greater than or equal to 1, got 0"),
    ],
)
def test_keys_that_do_not_fit_are_refused(sections, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**sections)
