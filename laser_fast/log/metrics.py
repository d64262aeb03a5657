"""Every number of a step and of an evaluation: its name, its label, and where it is shown.

To add one, add a line to `METRICS`; console, page and terminal read it from there.
"""

from dataclasses import dataclass

# Okabe and Ito's palette: told apart with any colour vision.
BLUE, ORANGE, GREEN, RED = "#0072b2", "#e69f00", "#009e73", "#d55e00"
PINK, SKY, BROWN, GREY = "#cc79a7", "#56b4e9", "#8a6d3b", "#9aa1a9"
PALETTE = (BLUE, ORANGE, GREEN, RED, PINK, SKY, BROWN, GREY)

# Where a number is shown, each place with what comes later too: the lines of steps only, the tables
# of a benchmark, the table of a run's evaluations, the table at the end of a run, the page's tiles.
STEP, BENCHMARK, RUN, SUMMARY, TILE = range(5)


@dataclass(frozen=True, slots=True)
class Panel:
    """A diagram over steps; `guide` is a level worth seeing."""

    title: str
    limits: tuple[float | None, float | None] = (None, None)
    is_log: bool = False
    guide: float | None = None


@dataclass(frozen=True, slots=True)
class Metric:
    """One number; a step logs it under its key `stage/name`, an evaluation under its name.

    The label of a vote contains the number of voters as `@k`. `line` is the label in the lines of
    the console, where metrics with one `line` stand together.
    """

    key: str
    label: str
    place: int = STEP
    panel: Panel | None = None
    color: str = BLUE
    line: str = ""
    style: str = ".3f"

    @property
    def stage(self) -> str:
        """The first half of the key: the stage of a step, or "vote"."""
        return self.key.split("/")[0]

    @property
    def name(self) -> str:
        """The second half of the key; the report of a benchmark adds @k to a vote."""
        return self.key.split("/")[1]

    def at(self, k: object) -> str:
        """The label for k voters."""
        return self.label.replace("@k", f"@{k}")


_SHARE, _FROM_ZERO = (-0.03, 1.03), (0.0, None)
_REWARD, _LOSS, _NORM = Panel("reward"), Panel("loss"), Panel("gradient norm", is_log=True)
_SCORE = Panel("mean score by class", guide=0.5)
_QUALITY = Panel("self-verification", limits=_SHARE, guide=0.5)
_VERDICTS = Panel("verdicts of the score (share)", limits=_SHARE, guide=0.5)
_SAMPLER = Panel("disagreement of sampler and policy (nats)", is_log=True)
_SHARES = Panel("shares", limits=_SHARE)
_LENGTH = Panel("completion length (tokens)", limits=_FROM_ZERO)
_SPEED = Panel("tokens per second", limits=_FROM_ZERO)
_COEF = Panel("weight of the score loss, after the gradient cap", limits=_FROM_ZERO)
_FAILED = Panel("failed grades per step", limits=_FROM_ZERO)

METRICS = (
    Metric("reward/mean", "training prompts", STEP, _REWARD, BLUE, "reward"),
    Metric("reward/total", "with the extras", STEP, _REWARD, PINK),
    Metric("reward/accuracy", "accuracy", TILE, _REWARD, RED, "accuracy"),
    Metric("vote/pass", "pass@k", BENCHMARK, color=GREY),
    Metric("vote/majority", "maj@k", TILE, _REWARD, ORANGE),
    Metric("vote/weighted_majority", "weighted maj@k", TILE, _REWARD, GREEN),
    Metric("vote/posterior_majority", "posterior maj@k", SUMMARY, color=BLUE),
    Metric("vote/best_of", "best@k by score", SUMMARY, color=PINK),
    Metric("gain/weighted_gain", "weighted minus plain maj@k", BENCHMARK),
    Metric("gain/posterior_gain", "posterior minus plain maj@k", BENCHMARK),
    Metric("gain/best_over_mean", "best@k minus mean accuracy", BENCHMARK),
    Metric("stop/samples_posterior", "samples, stopping by posterior", BENCHMARK, color=BLUE),
    Metric("stop/samples_agreement", "samples, stopping by lead", BENCHMARK, color=GREEN),
    Metric("stop/samples_fixed", "samples, a fixed number", BENCHMARK, color=ORANGE),
    Metric("stop/area_agreement", "mean gain of posterior over lead", BENCHMARK),
    Metric("stop/area_fixed", "mean gain of posterior over fixed", BENCHMARK),
    Metric("score/mean_correct", "score if correct", RUN, _SCORE, GREEN, "score", "+.2f"),
    Metric("score/mean_incorrect", "score if incorrect", RUN, _SCORE, RED, "score", "+.2f"),
    Metric("score/f1", "self-verification F1", TILE, _QUALITY, BLUE, "F1", ".2f"),
    Metric("score/auroc", "AUROC", TILE, _QUALITY, ORANGE, "AUROC", ".2f"),
    Metric("score/auroc_within", "AUROC within problems", SUMMARY),
    Metric("score/tpr", "correct accepted (TPR)", SUMMARY, _VERDICTS, GREEN),
    Metric("score/tnr", "incorrect rejected (TNR)", SUMMARY, _VERDICTS, RED),
    Metric("score/verification_accuracy", "accuracy of the verdict", RUN),
    Metric("score/ece", "ECE", SUMMARY),
    Metric("score/brier", "Brier", RUN),
    Metric("score/f1_calibrated", "F1 at a calibrated threshold", RUN),
    Metric("score/tpr_calibrated", "TPR there", BENCHMARK),
    Metric("score/tnr_calibrated", "TNR there", BENCHMARK),
    Metric("score/f1_corrected", "F1, prior corrected", BENCHMARK),
    Metric("score/tpr_corrected", "TPR, prior corrected", BENCHMARK),
    Metric("score/tnr_corrected", "TNR, prior corrected", BENCHMARK),
    Metric("score/verification_accuracy_corrected", "verdict, prior corrected", BENCHMARK),
    Metric("score/ece_corrected", "ECE, prior corrected", TILE),
    Metric("score/brier_corrected", "Brier, prior corrected", RUN),
    Metric("loss/policy", "policy", STEP, _LOSS, BLUE, "loss", "+.4f"),
    Metric("loss/score", "score", STEP, _LOSS, ORANGE, "loss", "+.4f"),
    Metric("loss/response", "of a given response", STEP, _LOSS, GREEN, "nats", ".4f"),
    Metric("step/grad_norm", "all parameters", STEP, _NORM, BLUE, "grad", ".2f"),
    Metric("loss/grad_norm", "policy term", STEP, _NORM, GREEN),
    Metric("score/grad_norm", "score term", STEP, _NORM, ORANGE),
    Metric("rollout/disagreement", "mean |difference| of log-probs", STEP, _SAMPLER, BLUE,
           "disagreement", ".1e"),
    Metric("rollout/sync_disagreement", "of given tokens after a sync", STEP, _SAMPLER, GREEN),
    Metric("rollout/mean_length", "tokens per completion", RUN, _LENGTH, BLUE, "tokens", ".0f"),
    Metric("rollout/mean_length_correct", "of correct ones", RUN, _LENGTH, GREEN),
    Metric("rollout/mean_length_incorrect", "of incorrect ones", RUN, _LENGTH, RED),
    Metric("throughput/tokens_per_s", "sampled", STEP, _SPEED, BLUE, "tok/s", ".0f"),
    Metric("throughput/computed_per_s", "computed, in the update", STEP, _SPEED, ORANGE),
    Metric("throughput/mfu", "of the device's peak, in the update", STEP, _SHARES, PINK,
           "MFU", ".0%"),
    Metric("pack/left_out", "completions that train nothing", STEP, _SHARES, GREY),
    Metric("rollout/truncated", "truncated completions", RUN, _SHARES, RED),
    Metric("loss/clip_frac", "clipped tokens", STEP, _SHARES, ORANGE),
    Metric("loss/importance_cut", "importance weights above the cap", STEP, _SHARES, BROWN),
    Metric("loss/importance_ess", "effective sample size", STEP, _SHARES, GREEN),
    Metric("advantage/zero_std_groups", "groups without reward spread", STEP, _SHARES),
    Metric("loss/entropy", "estimate", STEP, Panel("entropy (nats per token)")),
    Metric("score/coef", "alpha", STEP, _COEF, ORANGE),
    Metric("loss/kl", "k3 estimate", STEP, Panel("KL to the initial model (nats per token)")),
    Metric("loss/router", "before its coefficient", STEP, Panel("load-balancing loss of experts")),
    Metric("step/lr", "learning rate", STEP, Panel("learning rate", limits=_FROM_ZERO)),
    Metric("memory/peak_gb", "rank 0", STEP, Panel("peak memory (GB)", limits=_FROM_ZERO)),
    Metric("reward/failed", "completions", STEP, _FAILED, RED),
)  # fmt: skip
PANELS = tuple(dict.fromkeys(metric.panel for metric in METRICS if metric.panel))
VOTES = tuple(metric for metric in METRICS if metric.stage == "vote")

# The stages of a step that have a colour of their own.
STAGES = dict(zip("rollout loss reward step sync score pack".split(), PALETTE, strict=False))


def shown_at(place: int) -> list[Metric]:
    """The numbers of an evaluation that are shown at a place."""
    return [metric for metric in METRICS if metric.place >= max(place, BENCHMARK)]
