r"""LaSeR in one scroll: a plain Hugging Face model learns to solve problems and to grade itself.

`python -m laser_fast.minimal` takes about two minutes on two CPU cores or one GPU. It is the
readable twin of `laser_fast.training`: the same functions in one process, with rows that are padded
instead of packed, and `generate` as the sampler. Needs [train]. Equations of arXiv 2510.14943:

    r_s = beta (log pi(z_c | x, y) - c_ref)               eq. 11, the score, read at the end of y
    L_s = mean_finished w (r_s - r_v)^2                   eq. 14, w balances right and wrong
    A   = (1 - tau) A_v + tau A_s                         eq. 15, from rewards r_v and scores r_s
    L   = mean_tokens -min(ratio A, clip(ratio) A) + alpha L_s                            eq. 13

x is a problem, y an answer, and z_c a reserved token that is never sampled. Shapes: P problems,
G answers of each, B = P * G rows of L tokens, with T sampled tokens and F finished answers in all.
"""

import logging
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor

from laser_fast import needs_train

with needs_train():
    from transformers import Qwen2ForCausalLM as Model
    from transformers import Qwen2Tokenizer as Tokenizer

from laser_fast.algorithm.advantage import group_advantages, mix_advantages
from laser_fast.algorithm.loss import policy_loss
from laser_fast.algorithm.score import check_score_target, class_weights
from laser_fast.algorithm.verification import verify
from laser_fast.rewards import grade
from laser_fast.sandbox.model import make_sandbox_model
from laser_fast.sandbox.task import RESERVED_TOKENS, TOKENS, rows
from laser_kernels import last_token_loss, last_token_score, linear_logprob_loss

WARM_START_STEPS, STEPS, P, G, MAX_NEW_TOKENS = 350, 60, 16, 8, 48
LR, BETA, ALPHA, TAU, FIRST_MIXED_STEP = 2e-4, 0.3, 1.0, 0.1, 20  # before, scores mean nothing
Z_C = TOKENS.index(RESERVED_TOKENS[0])
Problems = list[dict[str, str]]


class Rollout(NamedTuple):
    """B graded rows as `generate` returns them: padding, problem, answer, EOS, padding."""

    ids: Tensor  # [B, L]
    is_text: Tensor  # [B, L] bool, all but the padding
    is_sampled: Tensor  # [B, L] bool, the T tokens of the answers, EOS included
    is_end: Tensor  # [B, L] bool, the F EOS that end an answer; there its score is read
    rewards: Tensor  # [B]


def sample(model: Model, tokenizer: Tokenizer, problems: Problems, group_size: int) -> Rollout:
    """Draw answers from the policy as it is (temperature 1, nothing cut off) and grade them."""
    # Rotary positions are relative, so padding on the left shifts nothing.
    texts = [row["problem"] for row in problems]
    prompts = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    ids = model.generate(
        **prompts.to(model.device), max_new_tokens=MAX_NEW_TOKENS, num_return_sequences=group_size,
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, suppress_tokens=[Z_C],
    )  # fmt: skip
    is_prompt = prompts.attention_mask.bool().repeat_interleave(group_size, dim=0)
    nothing, answer_ids = torch.zeros_like(is_prompt), ids[:, is_prompt.shape[1] :]
    is_eos = answer_ids == tokenizer.eos_token_id
    is_answer = is_eos.cumsum(dim=1) - is_eos.long() == 0  # no EOS came before
    is_text = torch.cat([is_prompt, is_answer], dim=1)
    is_sampled = torch.cat([nothing, is_answer], dim=1)
    is_end = torch.cat([nothing, is_answer & is_eos], dim=1)
    answers = tokenizer.batch_decode(answer_ids, skip_special_tokens=True)
    golds = [row["answer"] for row in problems for _ in range(group_size)]
    # A grade that failed is None; the trainer drops such an answer, here it counts as wrong.
    rewards = [grade("sandbox", a, gold) or 0.0 for a, gold in zip(answers, golds, strict=True)]
    return Rollout(ids, is_text, is_sampled, is_end, torch.tensor(rewards, device=ids.device))


def laser_loss(model: Model, batch: Rollout, c_ref: float, *, mixes: bool) -> Tensor:
    """The joint loss of one rollout (eq. 13)."""
    hidden = model.model(batch.ids, batch.is_text).last_hidden_state  # [B, L, D]
    head = model.lm_head.weight  # [V, D]
    rewards, is_finished = batch.rewards.view(-1, G), batch.is_end.any(1).view(-1, G)  # [P, G]

    # Scores and their squared error, right and wrong answers in balance (eq. 11 and 14).
    balance = class_weights(rewards, is_finished)[is_finished] / is_finished.sum()  # [F]
    ends, targets = hidden[batch.is_end], rewards[is_finished]  # [F, D], [F]
    score_loss, r_s = last_token_loss(
        ends, head, Z_C, targets, beta=BETA, ref_logprob=c_ref, sample_weight=balance
    )
    scores = torch.zeros_like(rewards).masked_scatter(is_finished, r_s)  # [P, G]

    # Advantages within the group, of rewards and later of scores too (eq. 15).
    advantages = group_advantages(rewards)  # [P, G]
    if mixes:
        advantages = mix_advantages(advantages, scores, is_finished, tau=TAU, min_std=0.1)
    token_advantages = advantages.flatten()[batch.is_sampled.nonzero()[:, 0]]  # [T]

    def policy_term(logprobs: Tensor, part: slice) -> Tensor:  # [n], log-probs of some of T tokens
        # With one update per rollout, the policy that learns is the one that sampled: ratio 1.
        losses = policy_loss(logprobs, logprobs.detach(), token_advantages[part])
        return losses.sum() / len(token_advantages)

    states = hidden[:, :-1][batch.is_sampled[:, 1:]]  # [T, D], each before the token it predicts
    labels = batch.ids[batch.is_sampled]  # [T]
    return linear_logprob_loss(states, head, labels, policy_term) + ALPHA * score_loss


@torch.no_grad()
def evaluate(model: Model, tokenizer: Tokenizer, problems: Problems, c_ref: float) -> str:
    """How often answers are right, and how often a right one outscores a wrong one."""
    batch = sample(model, tokenizer, problems, group_size=2)
    hidden = model.model(batch.ids, batch.is_text).last_hidden_state
    is_finished, head = batch.is_end.any(dim=1), model.lm_head.weight
    r_s = last_token_score(hidden[batch.is_end], head, Z_C, beta=BETA, ref_logprob=c_ref)
    scores = torch.zeros_like(batch.rewards).masked_scatter(is_finished, r_s)  # [B]
    found = verify(scores.cpu(), batch.rewards.cpu() > 0.5, is_finished=is_finished.cpu())
    return f"reward {batch.rewards.mean():.3f}, auroc {found['auroc']:.3f}"


def main(seed: int = 0) -> None:
    """Warm-start the sandbox model, measure it, train it with LaSeR, and measure it again."""
    torch.manual_seed(seed)
    with TemporaryDirectory() as folder:
        make_sandbox_model(f"{folder}/model", seed=seed, steps=WARM_START_STEPS)
        tokenizer = Tokenizer.from_pretrained(f"{folder}/model")
        model = Model.from_pretrained(f"{folder}/model")
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.0)
    problems, held_out = rows("train", seed=seed), rows("eval", seed=seed)

    # c_ref: log pi(z_c | x, y) of the untrained model, the mean over answers of its own.
    batch = sample(model, tokenizer, problems[:P], G)
    ends = model.model(batch.ids, batch.is_text).last_hidden_state[batch.is_end]
    c_ref = last_token_score(ends, model.lm_head.weight, Z_C, beta=1, ref_logprob=0).mean().item()
    check_score_target(beta=BETA, ref_logprob=c_ref)
    print("before:", evaluate(model, tokenizer, held_out, c_ref))

    for step in range(STEPS):
        batch = sample(model, tokenizer, problems[step * P : (step + 1) * P], G)
        loss = laser_loss(model, batch, c_ref, mixes=step >= FIRST_MIXED_STEP)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        print(f"step {step + 1}: reward {batch.rewards.mean():.3f}")
    print("after:", evaluate(model, tokenizer, held_out, c_ref))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # the warm start's progress
    main()
