"""What is learned: the keys of the score, the advantages and the policy loss."""

from collections.abc import Iterator
from typing import Annotated, Literal

from laser_fast.algorithm.loss import Aggregation, Importance, check_gspo
from laser_fast.algorithm.score import check_score_target
from laser_fast.config_errors import ConfigError
from laser_fast.config_section import Field, Section
from laser_fast.records import ScorePosition


class ScoreConfig(Section):
    """The last-token self-score and its loss term."""

    token: str = "<|vision_start|>"
    """The reserved token z_c: unused in ordinary text, never sampled."""
    beta: float = Field(0.1, gt=0)
    """Scale of the score: r_s = beta (log pi(z_c | x, y) - ref_logprob)."""
    position: ScorePosition = "eos"
    """Row that the score is read from: the EOS's, or the "last" before it, at no extra token."""
    ref_logprob: Annotated[float, Field(le=0)] | Literal["auto", "floating"] = "auto"
    """c_ref; "auto": the untrained model's log pi(z_c | x, y); "floating": refitted each step."""
    loss_coef: float = Field(0.1, ge=0)
    """alpha, weight of the score's MSE; 0 trains plain GRPO."""
    warmup_steps: int = Field(0, ge=0)
    """Steps before the MSE joins the loss."""
    max_class_weight: float = Field(5.0, ge=1)
    """Ceiling of the class-balancing weight."""
    max_grad_ratio: float = Field(0.0, ge=0)
    """Cap of the score term's gradient norm relative to the policy term's; 0: no cap."""

    def check_target(self, ref_logprob: float) -> None:
        """Refuse a beta, if it is trained, whose target for a correct answer is not improbable."""
        try:
            if self.loss_coef > 0:
                check_score_target(beta=self.beta, ref_logprob=ref_logprob)
        except ValueError as error:
            raise ConfigError(f"score.beta = {self.beta:g}: {error}") from None


class AdvantageConfig(Section):
    """From rewards and scores to advantages."""

    scale: Literal["std", "none"] = "std"
    """Divide by the group's standard deviation, or do not (Dr.GRPO)."""
    score_coef: float = Field(0.1, ge=0, le=1)
    """tau, share of the advantage that comes from scores; 0: only rewards."""
    score_min_std: float = Field(0.1, ge=0)
    """Groups whose scores spread no more than this keep the reward advantage."""
    score_warmup_steps: int = Field(0, ge=0)
    """Steps after `score.warmup_steps` before scores join the advantage."""


class LossConfig(Section):
    """The policy loss."""

    kind: Literal["grpo", "gspo", "cispo"] = "grpo"
    """Policy loss; gspo clips sequence ratios, cispo clips the weight and keeps every gradient."""
    clip_low: float = Field(0.2, ge=0, le=1)
    """Ratios below 1 - clip_low are clipped."""
    clip_high: float = Field(0.2, ge=0)
    """Ratios above 1 + clip_high are clipped."""
    clip_dual: float = Field(3.0, ge=0)
    """Dual clip: bound of the ratio where the advantage is negative; 0: none."""
    aggregation: Aggregation = "token-mean"
    """How token losses become one number; denominators are global."""
    tis_cap: float = Field(2.0, ge=0)
    """Importance sampling, cap of exp(old - rollout log-prob); 0: no correction."""
    importance: Importance = "token-truncate"
    """Ratio of a token or of its whole sequence; above `tis_cap` truncated to it, or masked."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the k3 KL penalty to the initial model, which is then kept in memory."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the entropy bonus; above 0 the head recomputes its logits in the backward."""

    def _problems(self) -> Iterator[str]:
        if self.kind == "gspo":
            check_gspo(max(self.clip_low, self.clip_high), self.aggregation)
        if self.tis_cap == 0 and self.importance != "token-truncate":
            yield f'loss.importance = "{self.importance}" needs loss.tis_cap, got 0; set it to 2.0'
