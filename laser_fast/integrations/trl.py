"""TRL's GRPO with LaSeR's score, on laser_kernels; the tested version is in `trl_head.py`.

A finished completion gets one label more in the same forward: z_c at its EOS, whose row TRL throws
away, at temperature 1. To TRL's loss comes

    score_loss_coef * sum_finished w (r_s - r_v)^2 / (N_c + N_i)              (eq. 14)

with class balance and denominator of the generation batch, over all processes; to its advantages a
share of those of the scores (eq. 15). `laser_fast.algorithm` has the formulas.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from laser_fast import needs_host

with needs_host("trl", "pip install 'laser-fast[trl]'"):
    from trl import GRPOConfig, GRPOTrainer
    from trl.models.utils import disable_gradient_checkpointing

from laser_fast.algorithm.advantage import mix_advantages
from laser_fast.algorithm.score import (
    SelfScore,
    check_score_target,
    class_weights,
    is_correct,
    score_loss,
)
from laser_fast.algorithm.verification import verify
from laser_fast.config import ScoreConfig
from laser_fast.evaluation.settings import read_score_settings, write_score_settings
from laser_fast.integrations import refuse
from laser_fast.integrations.trl_head import NO_LABEL, base_model, use_laser_kernels
from laser_fast.model.vocabulary import reserved_tokens

__all__ = ["LaserConfig", "LaserGRPOTrainer", "use_laser_kernels"]

_METRICS = ("mean_correct", "mean_incorrect", "tpr", "tnr", "f1", "auroc")


def _option(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass
class LaserConfig(GRPOConfig):
    """TRL's GRPOConfig and what LaSeR adds; steps are those of the optimizer."""

    score_token: str = _option("<|vision_start|>", "Reserved token z_c, unused in ordinary text.")
    score_beta: float = _option(0.1, "Scale of the score: r_s = beta (log pi(z_c) - c_ref).")
    score_ref_logprob: float | None = _option(
        None, "c_ref; None: mean log pi(z_c) of the first generation's finished completions."
    )
    score_loss_coef: float = _option(0.1, "alpha, weight of the score's MSE.")
    score_advantage_coef: float = _option(0.1, "tau, share of the advantage from scores.")
    score_warmup_steps: int = _option(0, "Steps before the MSE joins the loss.")
    score_advantage_warmup_steps: int = _option(
        0, "Steps after score_warmup_steps before scores join the advantage."
    )
    score_min_std: float = _option(
        0.1, "Groups whose scores spread no more than this keep the reward advantage."
    )
    score_max_class_weight: float = _option(5.0, "Ceiling of the class-balancing weight.")

    def __post_init__(self) -> None:
        super().__post_init__()
        alpha, tau = self.score_loss_coef, self.score_advantage_coef
        if not (alpha >= 0 and 0 <= tau <= 1) or (tau > 0 and alpha == 0):
            raise ValueError(
                "LaserConfig: expected score_loss_coef >= 0 and score_advantage_coef in [0, 1], "
                "which is 0 if the former trains no score, got "
                f"{alpha:g} and {tau:g}"
            )


class LaserGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with last-token self-rewarding; its `args` are a `LaserConfig`.

    The first reward function is the verifier: r_v in [0, 1], correct above 1/2; None has no target.
    The metrics "score/*" come from the training forwards since the last log.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, LaserConfig):
            found = type(self.args).__name__
            raise TypeError(f"LaserGRPOTrainer: expected args of type LaserConfig, got {found}")
        adapters = getattr(self.model, "peft_config", {}).values()
        refused = {
            "images": self._is_vlm,
            "tools": bool(self.tools),
            "prompt-learning adapters": any(adapter.is_prompt_learning for adapter in adapters),
        }
        refuse("LaserGRPOTrainer", refused)
        use_laser_kernels(self)
        self._score = SelfScore(
            token_id=self._score_token_id(), beta=self.args.score_beta, ref_logprob=math.nan
        )
        if self.args.score_ref_logprob is not None:
            self._set_reference(self.args.score_ref_logprob)
        # Log-probs [B] of z_c, of each forward of the policy since the list was cleared.
        self._score_logprobs: list[Tensor] = []
        self._verifier_rewards = torch.empty(0)
        # [N, 4] of each microbatch: score, verifier's reward, whether it is finished, MSE term.
        self._scored: dict[str, list[Tensor]] = {"train": [], "eval": []}

    def _score_token_id(self) -> int:
        tokenizer, token = self.processing_class, self.args.score_token
        ends = tuple(self.eos_token_ids)
        num_rows = len(base_model(self).get_output_embeddings().weight)
        token_id = tokenizer.get_vocab().get(token)
        if token_id is None or token_id in ends or token_id >= num_rows:
            free = " ".join(list(reserved_tokens(tokenizer, ends, num_rows=num_rows))[:4])
            raise ValueError(
                "LaserConfig.score_token: expected a token of tokenizer and head that ends no "
                f'completion, got "{token}"; reserved tokens: {free or "none"}'
            )
        return int(token_id)

    def _set_reference(self, ref_logprob: float) -> None:
        self._score = replace(self._score, ref_logprob=ref_logprob)
        if self.args.score_loss_coef > 0:
            check_score_target(beta=self._score.beta, ref_logprob=ref_logprob)

    def _is_end(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Where a sequence ends by an EOS, [B, S] bool."""
        is_last = mask.bool() & ~pad(mask[:, 1:], (0, 1)).bool()
        return is_last & torch.isin(ids, torch.tensor(self.eos_token_ids, device=ids.device))

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's; a forward of the policy also leaves `_score_logprobs`."""
        trl_method, chunks = super()._get_per_token_logps_and_entropies, []
        if model is self.ref_model:
            return trl_method(model, *args, **kwargs)

        def scoring_model(
            input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **inputs: Any
        ) -> Any:
            is_score = self._is_end(input_ids, attention_mask) & (labels != NO_LABEL)
            labels = pad(labels[:, 1:], (0, 1), value=NO_LABEL)
            outputs = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                shift_labels=labels.masked_fill(is_score, self._score.token_id),
                unit_rows=is_score,
                **inputs,
            )
            chunks.append(outputs.log_probs.where(is_score, 0.0).sum(1))
            outputs.log_probs = outputs.log_probs.masked_fill(is_score, 0.0)[:, :-1]
            outputs.entropy = outputs.entropy.masked_fill(is_score, 0.0)[:, :-1]
            return outputs

        result = trl_method(scoring_model, *args, **kwargs)
        self._score_logprobs.append(torch.cat(chunks))
        return result

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(*args, **kwargs)  # of all processes
        verifier = self._verifier_rewards = rewards[:, 0]  # nan for None
        if ((verifier < 0) | (verifier > 1)).any():
            name, found = self.reward_func_names[0], verifier.tolist()
            raise ValueError(
                f"LaserGRPOTrainer: expected rewards in [0, 1] of the first reward function, the "
                f"verifier, got {min(found):g} to {max(found):g} of {name}"
            )
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's generation batch, with rewards and weights of the score and mixed advantages."""
        args, is_training = self.args, self.model.training
        self._score_logprobs.clear()
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        refuse("LaserGRPOTrainer", {"an env_mask": "tool_mask" in output})
        grid = (-1, self.num_generations if is_training else self.num_generations_eval)
        first = self.accelerator.process_index * len(inputs)
        own = slice(first, first + len(inputs))
        is_finished = self._is_end(output["completion_ids"], output["completion_mask"]).any(1)
        is_finished = self.accelerator.gather(is_finished).view(grid)
        rewards = self._verifier_rewards.view(grid)
        is_graded = ~rewards.isnan()
        has_target = is_finished & is_graded
        weights = class_weights(rewards, has_target, max_weight=args.score_max_class_weight)
        output["score_weights"] = (weights / has_target.sum().clamp(min=1)).flatten()[own]
        output["verifier_rewards"] = rewards.flatten()[own]
        first_step = args.score_warmup_steps + args.score_advantage_warmup_steps
        mixes = args.score_advantage_coef > 0 and self.state.global_step >= first_step
        mixes, is_first = mixes and is_training, math.isnan(self._score.ref_logprob)
        if mixes or is_first:
            logprobs = self.accelerator.gather(self._read_scores(output)).view(grid)
        if is_first:
            self._set_reference(_mean_ref_logprob(logprobs[is_finished]))
        if mixes:
            advantages = self.accelerator.gather(output["advantages"]).view(grid)
            mixed = mix_advantages(
                advantages,
                self._score.of(logprobs),
                is_finished,
                tau=args.score_advantage_coef,
                min_std=args.score_min_std,
                is_valid=is_graded,
                scale="none" if self.scale_rewards == "none" else "std",
            )
            advantages = mixed.where(is_graded, advantages).flatten()
            output["advantages"] = advantages[own]
            self._logs["advantages"].extend(advantages.tolist())  # and TRL's fall out
        return output

    def _read_scores(self, output: dict[str, Any]) -> Tensor:
        """Log-probs of z_c of this process's completions, [B], as the policy now is."""
        if "old_per_token_logps" not in output:  # TRL had no need of a forward
            self._score_logprobs.clear()  # the reference may be this model without its adapter
            ids, masks = (
                torch.cat([output[f"prompt_{kind}"], output[f"completion_{kind}"]], dim=1)
                for kind in ("ids", "mask")
            )
            length, size = output["completion_ids"].shape[1], self.args.per_device_train_batch_size
            kwargs = self.args.gradient_checkpointing_kwargs
            with torch.no_grad(), disable_gradient_checkpointing(self.model, kwargs):
                self._get_per_token_logps_and_entropies(self.model, ids, masks, length, size)
        return self._score_logprobs[0]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss and the share of this microbatch in the score's."""
        self._score_logprobs.clear()
        loss: Tensor = super()._compute_loss(model, inputs)
        (logprobs,) = self._score_logprobs
        args, score, rewards = self.args, self._score, inputs["verifier_rewards"]
        mode, num_batches, scale = "eval", 1, float(self.accelerator.num_processes)
        if self.model.training:  # the weights' denominator is that of the generation batch
            mode, num_batches = "train", args.steps_per_generation
            scale *= num_batches / self.current_gradient_accumulation_steps
        terms = score_loss(
            logprobs,
            rewards.nan_to_num(),
            inputs["score_weights"],
            beta=score.beta,
            ref_logprob=score.ref_logprob,
        )
        is_finished = self._is_end(inputs["completion_ids"], inputs["completion_mask"]).any(1)
        columns = (score.of(logprobs.detach()), rewards, is_finished, terms.detach() * num_batches)
        self._scored[mode].append(self.accelerator.gather(torch.stack(columns, dim=1)).cpu())
        if args.score_loss_coef > 0 and self.state.global_step >= args.score_warmup_steps:
            loss = loss + args.score_loss_coef * scale * terms.sum()
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log TRL's metrics and those of the score."""
        mode = "train" if self.model.training else "eval"
        batches, self._scored[mode] = self._scored[mode], []
        if batches:
            rows = torch.cat(batches)
            scores, rewards, is_finished, _ = rows[~rows[:, 1].isnan()].unbind(1)
            found = verify(scores, is_correct(rewards), is_finished=is_finished.bool())
            found |= {
                "loss": float(rows[:, 3].sum()) / len(batches),
                "ref_logprob": self._score.ref_logprob,
            }
            for name in ("loss", "ref_logprob", *_METRICS):
                self._metrics[mode][f"score/{name}"].append(found[name])
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model and, of a score that trains, its laser_fast.json; so do checkpoints."""
        super().save_model(output_dir, _internal_call)
        score, folder = self._score, Path(output_dir or self.args.output_dir)
        is_known = self.args.score_loss_coef > 0 and not math.isnan(score.ref_logprob)
        if self.args.should_save and is_known:
            folder.mkdir(parents=True, exist_ok=True)
            token, ref_logprob = self.args.score_token, score.ref_logprob
            settings = ScoreConfig(token=token, beta=score.beta, ref_logprob=ref_logprob)
            write_score_settings(folder, settings)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        args = self.args
        if checkpoint and args.score_loss_coef > 0 and args.score_ref_logprob is None:
            if not (known := read_score_settings(checkpoint)):
                raise ValueError(
                    f"LaserConfig.score_ref_logprob: {checkpoint} has no laser_fast.json that says "
                    "it; give the number of the run"
                )
            self._set_reference(known["ref_logprob"])


def _mean_ref_logprob(logprobs: Tensor) -> float:
    if not len(logprobs):
        raise ValueError(
            "LaserConfig.score_ref_logprob: the first generation finished no completion to "
            "measure; raise max_completion_length or give a number"
        )
    return float(logprobs.double().mean())
