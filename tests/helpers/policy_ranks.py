"""What the ranks of a sharded policy compute, for test_policy.py and test_checkpoint.py.

    python policy_ranks.py MODELS OUT

MODELS holds the folders of MODEL_CASES, OUT receives world-N.pt and a run with a checkpoint for
N = 1, 2 and 4 ranks.
"""

import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from fork_ranks import run_ranks
from tiny_models import EOS, SCORE_TOKEN, VOCAB, make_model, make_sequences
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grad_norm_

from laser_fast.algorithm.score import SelfScore
from laser_fast.config import LossConfig, ModelConfig, UpdateConfig
from laser_fast.config_sft import SftConfig
from laser_fast.model.distributed import open_world
from laser_fast.model.logprobs import label_logprobs
from laser_fast.model.packing import Packer, share_out
from laser_fast.model.policy import build_policy
from laser_fast.records import Prompt, Sampling, SpecialTokens
from laser_fast.rollout.hf import HfEngine
from laser_fast.training.checkpoint import load_checkpoint, save_checkpoint
from laser_fast.training.objective import Objective, joint_loss
from laser_fast.training.trainer import Trainer
from laser_fast.training.update import build_optimizer

TEMPERATURE = 0.7
SCORE = SelfScore(token_id=SCORE_TOKEN, beta=0.2, ref_logprob=-7.5)
OBJECTIVE = Objective(loss=LossConfig(), score=SCORE, score_coef=0.8)
SAMPLING = Sampling(group_size=2, temperature=0.9, max_new_tokens=6, seed=3)
PROMPTS = [
    Prompt(prompt_id=f"p{n}", text="", prompt_ids=tuple(range(10, 11 + n)), answer="")
    for n in range(4)
]
# On four ranks the last one gets two of these 14, the others four each.
SEQUENCES = make_sequences(14, seed=5, group_size=3)  # groups that ranks and bins split
LARGEST = max(len(s.prompt_ids + s.response_ids) for s in SEQUENCES)

MODEL_CASES = {
    "qwen2-tied": ("qwen2", True),
    "qwen2-untied": ("qwen2", False),
    "llama-untied": ("llama", False),
    "qwen3-tied": ("qwen3", True),
}


# Keys that change where things are and no number.
MEMORY_SAVERS = {"cpu_offload": True, "activation_offload": True, "reshard_after_forward": False}


def save_models(folder):
    """Write the model folder of every case."""
    for name, (family, tied) in MODEL_CASES.items():
        make_model(family, tie_word_embeddings=tied).save_pretrained(folder / name)


def adapt(policy):
    """Give every adapter weights that are not zero, the same on any number of ranks."""
    for n, (name, parameter) in enumerate(policy.hf.named_parameters()):
        if "lora_" in name:
            generator = torch.Generator().manual_seed(n)
            values = torch.randn(parameter.shape, generator=generator) * 0.2
            if isinstance(parameter, DTensor):
                values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
            parameter.data.copy_(values)
    return policy


def make_optimizer(policy):
    return build_optimizer(policy, UpdateConfig(steps=9, lr=0.05, weight_decay=0.1))


def full(tensor):
    """A copy of a tensor with all of its shards."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def full_parameters(policy):
    """Every parameter by its name in the Hugging Face model. Collective."""
    return {name: full(parameter) for name, parameter in policy.hf.named_parameters()}


def backward(policy, world, sequences, *, budget=4 * LARGEST, is_shared_out=False):
    """Gradients of the joint loss, each rank with its contiguous share of the sequences.

    Or with the one that the trainer gives it.
    """
    share = -(-len(sequences) // world.size)
    own = sequences[world.rank * share : (world.rank + 1) * share]
    if is_shared_out:
        own = share_out(own, world)
    packer = Packer(
        budget=budget,
        score_token_id=SCORE_TOKEN,
        score_at="eos",
        temperature=TEMPERATURE,
        device=world.device,
        agree=world.max,
    )
    batches = packer.microbatches(own)
    loss = torch.zeros(())
    for batch in batches:
        result = policy(batch, joint_loss(OBJECTIVE, batch))
        (result.loss * world.size).backward()
        loss += result.loss.detach()
    return {
        "loss": world.sum(loss),
        "norm": full(clip_grad_norm_(policy.parameters(), float("inf"))),
        "num_batches": len(batches),
        "num_tokens": world.gather([sum(len(batch.input_ids) for batch in batches)]),
    }


def measure_gradients(policy, world, sequences, **options):
    """`backward` with the gradients themselves, which it then clears."""
    found = backward(policy, world, sequences, **options)
    found["gradients"] = {name: full(p.grad) for name, p in policy.hf.named_parameters()}
    policy.zero_grad()
    return found


def update(policy, world, optimizer):
    """One optimizer step on all sequences; returns the parameters after it."""
    backward(policy, world, SEQUENCES)
    optimizer.step()
    optimizer.zero_grad()
    return full_parameters(policy)


def make_engine(model, **options):
    tokens = SpecialTokens(
        score_token_id=SCORE_TOKEN,
        eos_token_ids=(EOS, *range(75, VOCAB)),  # many, so that random models come to an end
        pad_token_id=EOS,
        vocab_size=VOCAB,
    )
    return HfEngine(model, tokens, max_num_seqs=3, **options)


@contextmanager
def count_calls(module):
    """Number of forwards of a module, as a list of one entry each."""
    calls = []
    handle = module.register_forward_pre_hook(lambda *_: calls.append(None))
    yield calls
    handle.remove()


def microbatches(world):
    """This rank's contiguous share of the sequences, in small microbatches."""
    packer = Packer(
        budget=LARGEST,
        score_token_id=SCORE_TOKEN,
        score_at="eos",
        temperature=TEMPERATURE,
        device=world.device,
        agree=world.max,
    )
    share = -(-len(SEQUENCES) // world.size)
    return packer.microbatches(SEQUENCES[world.rank * share : (world.rank + 1) * share])


def count_all_reduces(policy, world):
    """Of gradients over replicas, in the trainer's accumulation of a step, and its gradients."""
    batches = microbatches(world)
    trainer = SimpleNamespace(policy=policy, world=world)
    calls = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda *a, **k: calls.append(None) or all_reduce(*a, **k)
    try:
        Trainer._backward(trainer, OBJECTIVE, batches, None)
    finally:
        dist.all_reduce = all_reduce
    found = {name: full(p.grad) for name, p in policy.hf.named_parameters()}
    policy.zero_grad()
    return {"gradients": found, "num_all_reduces": len(calls), "num_batches": len(batches)}


def measure_rollout(policy, world):
    """Sample out of lock-step, rank r for r + 1 prompts, then train as before."""
    before = measure_gradients(policy, world, SEQUENCES)
    engine = make_engine(policy.hf, unsharded=policy.unsharded)
    groups = engine.generate(PROMPTS[: world.rank + 1], SAMPLING)
    after = measure_gradients(policy, world, SEQUENCES)
    return {
        "groups": world.gather([groups]),
        "before": before,
        "after": after,
        "is_sharded": [isinstance(p, DTensor) for p in policy.parameters()],
    }


def checkpoint_config(model, run, **checkpoint):
    """Of a run with such a model, which here only names its folder."""
    data, optim = {"train": "unread.jsonl"}, {"steps": 1}
    return SftConfig(
        output_dir=str(run), model=model, data=data, optim=optim, checkpoint=checkpoint
    )


def measure_checkpoint(config, world, run):
    """Updates before and after a checkpoint, undisturbed and resumed."""
    policy = build_policy(config, world)
    optimizer = make_optimizer(policy)
    first = update(policy, world, optimizer)
    save_checkpoint(
        checkpoint_config(config, run),
        1,
        policy=policy,
        optimizer=optimizer,
        state={"ref_logprob": -7.25},
        world=world,
    )
    second = update(policy, world, optimizer)

    policy = build_policy(config, world)
    optimizer = make_optimizer(policy)
    state = load_checkpoint(run / "checkpoints" / "step-000001", policy=policy, optimizer=optimizer)
    loaded = full_parameters(policy)
    return {
        "first": first,
        "second": second,
        "loaded": loaded,
        "resumed": update(policy, world, optimizer),
        "state": (state.step, state.ref_logprob),
    }


def measure(world, models, out):
    """Everything that the tests ask of this number of ranks."""

    def build(name, *, is_trained=True, **keys):
        config = ModelConfig(path=str(models / name), **keys)
        return build_policy(config, world, is_trained=is_trained)

    found = {"gradients": {}}
    for name in MODEL_CASES if world.size == 2 else ("qwen2-tied", "qwen2-untied"):
        found["gradients"][name] = measure_gradients(build(name), world, SEQUENCES)

    policy = build("qwen2-tied")
    found["stream"] = dict(policy.stream_weights(world.device))
    found["variants"] = {
        "small budget": measure_gradients(policy, world, SEQUENCES, budget=LARGEST),
        "reversed": measure_gradients(policy, world, SEQUENCES[::-1]),
        "shared out": measure_gradients(policy, world, SEQUENCES, is_shared_out=True),
    }
    found["rollout"] = measure_rollout(policy, world)
    found["checkpoint"] = measure_checkpoint(
        ModelConfig(path=str(models / "qwen2-tied")), world, out / f"run-{world.size}"
    )
    if world.size == 2:
        policy = build("qwen2-tied", gradient_checkpointing=True)
        with count_calls(policy.hf.model.layers[0].mlp) as calls:
            found["variants"]["gradient_checkpointing"] = measure_gradients(
                policy, world, SEQUENCES
            )
        found["recomputed_calls"] = len(calls)
        policy = build("qwen2-untied", compute_dtype="bfloat16")
        found["bfloat16"] = measure_gradients(policy, world, SEQUENCES)
        found["bfloat16_stream"] = dict(policy.stream_weights(world.device))
        found["bfloat16_masters"] = {p.dtype for p in policy.parameters()}
        for key, value in MEMORY_SAVERS.items():
            policy = build("qwen2-tied", **{key: value})
            found["variants"][key] = measure_gradients(policy, world, SEQUENCES)
        found["references"] = [
            label_logprobs(policy, batches)
            for batches in [microbatches(world)]
            for is_trained in (True, False)
            for policy in [build("qwen2-tied", compute_dtype="bfloat16", is_trained=is_trained)]
        ]
    if world.size == 4:
        policy = build("qwen2-tied", replicas=2)
        found["variants"]["replicas"] = measure_gradients(policy, world, SEQUENCES)
        found["accumulated"] = count_all_reduces(policy, world)
        found["num_shards"] = 1 + len(policy.hf.model.layers)
        found["mesh"] = tuple(policy.hf.lm_head.weight.device_mesh.shape)
        found["replicas_stream"] = dict(policy.stream_weights(world.device))
    return found


def run(models, out):
    """One rank."""
    with open_world() as world:
        found = measure(world, models, out)
        if world.is_main:
            torch.save(found, out / f"world-{world.size}.pt")


if __name__ == "__main__":
    for size in (1, 2, 4):
        run_ranks(size, run, *map(Path, sys.argv[1:]))
