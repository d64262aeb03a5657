"""What the small runs of tests/runs look like."""

STEPS = 4
GROUPS, GROUP_SIZE = 6, 4

# Every optional part of a step at once; the plain configuration has the usual ones.
EXTRAS = {
    "loss": {"kind": "gspo", "kl_coef": 0.1, "entropy_coef": 0.01, "clip_dual": 3.0},
    "optim": {"minibatches": 2, "tokens_per_microbatch": 80},
    "rollout": {"resample_rounds": 2, "score": "off", "temperature": 1.3, "max_num_seqs": 5},
    "reward": {"overlong": "mask"},
    "score": {"warmup_steps": 1, "ref_logprob": "floating", "beta": 0.9, "position": "last"},
    "advantage": {"scale": "none", "score_warmup_steps": 1},
}
PLAIN_GRPO = {"score": {"loss_coef": 0.0}, "advantage": {"score_coef": 0.0}}
