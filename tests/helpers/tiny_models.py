"""Tiny models, sequences and the naive loss that the tests compare with."""

import random

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from laser_fast.config import Config
from laser_fast.records import Completion, Group, Prompt, TrainingSequence
from laser_fast.sandbox.task import EOS_TOKEN, PAD_TOKEN, TOKENS, write_tokenizer

VOCAB = 97  # odd: no number of ranks divides it
EOS = 2
SCORE_TOKEN = 5

_FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
}
_TOKENS = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS}


def make_model_config(family="qwen2", **changes):
    """The configuration of a tiny model; `changes` are keys of the family's configuration."""
    keys = SIZES | _TOKENS | {"tie_word_embeddings": True} | changes
    keys.setdefault("head_dim", keys["hidden_size"] // keys["num_attention_heads"])
    return _FAMILIES[family][0](**keys)


def make_model(family="qwen2", *, seed=0, **changes):
    """A random float32 model of two layers whose logits are far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _FAMILIES[family][1](make_model_config(family, **changes))
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms start at 1 and biases at 0, where a lost one is unseen
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model


def save_model(folder, family="qwen2", *, adapt=None, **changes):
    """Write a tiny model and the tokenizer of the sandbox, whose ids it has; returns the model.

    `adapt` is called with the model before it is written.
    """
    tokens = {"eos_token_id": TOKENS.index(EOS_TOKEN), "pad_token_id": TOKENS.index(PAD_TOKEN)}
    model = make_model(family, **({"vocab_size": len(TOKENS)} | tokens | changes))
    if adapt:
        adapt(model)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def make_config(**sections):
    """A valid configuration; `sections` are merged over the required keys."""
    required = {
        "model": {"path": "model"},
        "data": {"train": "train.jsonl", "max_prompt_tokens": 24},
        "rollout": {"max_new_tokens": 10},
        "optim": {"steps": 10},
    }
    for name, keys in sections.items():
        required[name] = {**required.get(name, {}), **keys}
    return Config.parse({"output_dir": "run", **required}, source="test")


def make_group(name, members, rewards=()):
    """A group of completions (length, is_finished, score log-prob) and their rewards."""
    completions = tuple(
        Completion(
            completion_ids=(*range(10, 9 + length), EOS if is_finished else 90),
            rollout_logprobs=tuple(-0.1 * (t + 1) for t in range(length)),
            finish_reason="stop" if is_finished else "length",
            score_logprob=score,
        )
        for length, is_finished, score in members
    )
    prompt = Prompt(prompt_id=name, text=name, prompt_ids=(7, 8, 9), answer="1")
    rewards, extras = tuple(rewards), ({},) * len(rewards)
    return Group(
        prompt=prompt, completions=completions, rewards=rewards, totals=rewards, extras=extras
    )


def make_sequences(count=12, *, seed=0, longest=12, group_size=1):
    """Random sequences of mixed lengths; two of three have a score row, and groups one prompt."""
    rng = random.Random(seed)
    sequences, prompt_ids = [], ()
    for index in range(count):
        length = 1 if index == 1 else rng.randint(2, longest)
        has_score_row = index % 3 != 2
        ids = [rng.randrange(6, VOCAB) for _ in range(length)]
        if index % group_size == 0:
            prompt_ids = tuple(rng.randrange(6, VOCAB) for _ in range(rng.randint(1, longest)))
        sequences.append(
            TrainingSequence(
                prompt_ids=prompt_ids,
                completion_ids=(*ids[:-1], EOS if has_score_row else ids[-1]),
                rollout_logprobs=tuple(rng.uniform(-6, -1) for _ in ids),
                score_at="eos" if has_score_row else None,
                advantage=rng.gauss(0, 1),
                token_weight=rng.uniform(0.01, 0.03),
                reward=float(rng.random() < 0.5),
                score_weight=rng.uniform(0.05, 0.3),
            )
        )
    return sequences


def naive_logprobs(model, sequence, *, temperature):
    """Log-probs [n, V] of a completion's rows, and [V] of the row of its score at temperature 1."""
    logits = model(torch.tensor([sequence.prompt_ids + sequence.completion_ids])).logits[0]
    rows = logits[len(sequence.prompt_ids) - 1 : -1] / temperature
    return rows.log_softmax(-1), logits[-2 if sequence.score_at == "last" else -1].log_softmax(-1)


def naive_loss(model, sequences, objective, *, temperature=1.0, old=None, ref=None):
    """The joint loss by its definition, one sequence at a time, from full logits."""
    config, total = objective.loss, 0.0
    for index, sequence in enumerate(sequences):
        rows, last = naive_logprobs(model, sequence, temperature=temperature)
        chosen = rows.gather(1, torch.tensor(sequence.completion_ids)[:, None])[:, 0]
        behaviour = chosen.detach() if old is None else old[index]
        ratio, advantage = (chosen - behaviour).exp(), sequence.advantage
        if config.kind == "gspo":
            ratio = (chosen - behaviour).mean().exp().expand_as(chosen)
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        terms = -torch.minimum(ratio * advantage, clipped * advantage)
        if config.clip_dual and advantage < 0:
            terms = terms.clamp(max=-config.clip_dual * advantage)
        if config.kind == "cispo":
            terms = -clipped.detach() * advantage * chosen
        if config.tis_cap:
            rollout = torch.tensor(sequence.rollout_logprobs, dtype=chosen.dtype)
            gaps = behaviour - rollout
            level, cut = config.importance.split("-")
            weight = (gaps.sum().expand_as(gaps) if level == "sequence" else gaps).exp()
            above = 0.0 if cut == "mask" else config.tis_cap
            terms = terms * torch.where(weight > config.tis_cap, above, weight)
        if ref is not None:
            gap = ref[index] - chosen
            terms = terms + config.kl_coef * (gap.exp() - 1 - gap)
        terms = terms + config.entropy_coef * (rows.exp() * rows).sum(-1)
        total = total + sequence.token_weight * terms.sum()
        if sequence.score_at:
            score = objective.score.of(last[SCORE_TOKEN])
            error = sequence.score_weight * (score - sequence.reward) ** 2
            total = total + objective.score_coef * error
    return total
