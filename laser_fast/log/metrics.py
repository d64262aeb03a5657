"""Which metrics are drawn together, as what, and in which colour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Okabe and Ito's palette: told apart with any colour vision.
BLUE, ORANGE, GREEN, RED = "#0072b2", "#e69f00", "#009e73", "#d55e00"
PINK, SKY, BROWN, GREY = "#cc79a7", "#56b4e9", "#8a6d3b", "#9aa1a9"
COLORS = (BLUE, ORANGE, GREEN, RED, PINK, SKY, BROWN, GREY)

_SHARE = (-0.03, 1.03)
_FROM_ZERO = (0.0, None)


@dataclass(frozen=True, slots=True)
class Panel:
    """One diagram: metrics of the steps as lines, metrics of held-out evaluations as marks.

    `lines` and `marks` map a metric to its label and colour; `guide` is a level worth seeing.
    """

    title: str
    lines: Mapping[str, tuple[str, str]]
    marks: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    limits: tuple[float | None, float | None] = (None, None)
    is_log: bool = False
    guide: float | None = None


PANELS = (
    Panel(
        "reward",
        {"reward/mean": ("training prompts", BLUE)},
        {
            "accuracy": ("accuracy", RED),
            "majority": ("majority vote", ORANGE),
            "weighted_majority": ("weighted vote", GREEN),
        },
    ),
    Panel(
        "mean score by class",
        {"score/mean_correct": ("correct", GREEN), "score/mean_incorrect": ("incorrect", RED)},
        {"mean_correct": ("correct", GREEN), "mean_incorrect": ("incorrect", RED)},
        guide=0.5,
    ),
    Panel(
        "self-verification",
        {"score/f1": ("F1", BLUE), "score/auroc": ("AUROC", ORANGE)},
        {"f1": ("F1", BLUE), "auroc": ("AUROC", ORANGE)},
        limits=_SHARE,
        guide=0.5,
    ),
    Panel(
        "verdicts of the score (share)",
        {"score/tpr": ("correct accepted", GREEN), "score/tnr": ("incorrect rejected", RED)},
        {"tpr": ("correct accepted", GREEN), "tnr": ("incorrect rejected", RED)},
        limits=_SHARE,
        guide=0.5,
    ),
    Panel(
        "disagreement of sampler and policy (nats)",
        {
            "rollout/disagreement": ("mean |difference| of log-probs", BLUE),
            "rollout/sync_disagreement": ("of held tokens after a sync", GREEN),
        },
        is_log=True,
    ),
    Panel("entropy (nats per token)", {"loss/entropy": ("estimate", BLUE)}),
    Panel(
        "completion length (tokens)",
        {"rollout/mean_length": ("training prompts", BLUE)},
        {"mean_length": ("tokens", RED)},
        limits=_FROM_ZERO,
    ),
    Panel(
        "gradient norm",
        {
            "step/grad_norm": ("all parameters", BLUE),
            "loss/grad_norm": ("policy term", GREEN),
            "score/grad_norm": ("score term", ORANGE),
        },
        is_log=True,
    ),
    Panel(
        "shares",
        {
            "loss/clip_frac": ("clipped tokens", ORANGE),
            "rollout/truncated": ("truncated completions", RED),
            "advantage/zero_std_groups": ("groups without reward spread", BLUE),
        },
        limits=_SHARE,
    ),
    Panel("loss", {"loss/policy": ("policy", BLUE), "loss/score": ("score", ORANGE)}),
    Panel(
        "weight of the score loss, after the gradient cap",
        {"score/coef": ("alpha", ORANGE)},
        limits=_FROM_ZERO,
    ),
    Panel("KL to the initial model (nats per token)", {"loss/kl": ("k3 estimate", BLUE)}),
    Panel("learning rate", {"step/lr": ("learning rate", BLUE)}, limits=_FROM_ZERO),
    Panel("tokens per second", {"throughput/tokens_per_s": ("trained", BLUE)}, limits=_FROM_ZERO),
    Panel("peak memory (GB)", {"memory/peak_gb": ("rank 0", BLUE)}, limits=_FROM_ZERO),
    Panel("failed grades per step", {"reward/failed": ("completions", RED)}, limits=_FROM_ZERO),
)

# Stages of a step that take time; the others share one colour.
STAGES = {
    "rollout": BLUE,
    "loss": ORANGE,
    "reward": GREEN,
    "step": RED,
    "sync": PINK,
    "score": SKY,
    "pack": BROWN,
}
