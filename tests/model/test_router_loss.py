"""The load-balancing loss of experts is transformers' own, over the tokens of a microbatch."""

import math
from types import SimpleNamespace

import pytest
import torch
from family_models import FAMILIES, SIZES, save_family
from policy_ranks import OBJECTIVE, SEQUENCES, TEMPERATURE, full
from tiny_models import SCORE_TOKEN, make_config, make_group, naive_loss
from torch.optim import AdamW
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from laser_fast.config import ConfigError, ModelConfig
from laser_fast.config_sft import SftConfig
from laser_fast.log.timer import StageTimer
from laser_fast.model.packing import Packer, with_router_weights
from laser_fast.model.policy import build_policy, load_model_config
from laser_fast.sandbox.task import TOKENS, write_tokenizer
from laser_fast.training.objective import joint_loss
from laser_fast.training.schedule import GradientCap
from laser_fast.training.sft import SftTrainer
from laser_fast.training.trainer import Trainer

COEF = 0.5
EXPERTS, CHOSEN = (FAMILIES["qwen3_moe"][key] for key in ("num_experts", "num_experts_per_tok"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    save_family(folder, "qwen3_moe")
    return folder


def load(folder):
    """The model with transformers' own attention and experts by definition, in float64."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )


def make_packer(world, budget=999):
    return Packer(
        budget=budget,
        score_token_id=SCORE_TOKEN,
        score_at="eos",
        temperature=TEMPERATURE,
        device=world.device,
    )


def weighted(batches, coef, world):
    """The microbatches of one update."""
    [found] = with_router_weights([batches], coef, world)
    return found


def mean_of(model, sequences):
    """Number of tokens and loss of sequences of which equal prompts count once."""
    layers, known = [], set()
    for sequence in sequences:
        ids = torch.tensor([sequence.prompt_ids + sequence.response_ids])
        found = model(input_ids=ids, output_router_logits=True).router_logits
        first = len(sequence.prompt_ids) if sequence.prompt_ids in known else 0
        known.add(sequence.prompt_ids)
        layers.append([layer[first:] for layer in found])
    joined = tuple(torch.cat(parts) for parts in zip(*layers, strict=True))
    return len(joined[0]), load_balancing_loss_func(joined, EXPERTS, CHOSEN)


def backward(policy, batches):
    """Router losses of the microbatches, whose gradients add up."""
    results = [policy(batch, joint_loss(OBJECTIVE, batch)) for batch in batches]
    for result in results:
        result.loss.backward()
    return [float(result.router_loss) for result in results]


def test_one_sequence_has_the_loss_of_transformers(folder, world):
    policy, exact = build_policy(ModelConfig(path=str(folder)), world), load(folder)
    ids = torch.tensor([SEQUENCES[0].prompt_ids + SEQUENCES[0].response_ids])
    want = exact(input_ids=ids, output_router_logits=True).aux_loss.item()
    batches = weighted([make_packer(world).pack(SEQUENCES[:1])], COEF, world)
    assert backward(policy, batches) == [pytest.approx(COEF * want, rel=1e-6)]


@pytest.mark.parametrize("keys", [{}, {"gradient_checkpointing": True}], ids=["plain", "again"])
def test_gradients_are_those_of_the_token_weighted_mean(folder, world, keys):
    policy, exact = build_policy(ModelConfig(path=str(folder), **keys), world), load(folder)
    packer = make_packer(world)
    parts = [SEQUENCES[:4], SEQUENCES[4:9], []]  # the last is filled up by a token
    plain = [packer.pack(part) for part in parts]
    assert len(plain[-1].input_ids) == 1
    batches = weighted(plain, COEF, world)
    found = backward(policy, batches)

    counts, losses = zip(*(mean_of(exact, part) for part in parts[:2]), strict=True)
    assert counts == tuple(len(batch.input_ids) for batch in batches[:2])
    weights = [COEF * count / sum(counts) for count in counts]
    assert [batch.router_weight for batch in batches] == pytest.approx([*weights, 0.0])
    twice = SimpleNamespace(sum=lambda count: 2 * count)  # another rank has as many tokens
    shares = [batch.router_weight for batch in weighted(plain, COEF, twice)]
    assert sum(shares) == pytest.approx(COEF / 2)
    terms = torch.stack(losses) * torch.tensor(weights)
    assert found == pytest.approx([*terms.tolist(), 0.0], rel=1e-6)
    (naive_loss(exact, SEQUENCES[:9], OBJECTIVE, temperature=TEMPERATURE) + terms.sum()).backward()
    gradients = {name: p.grad for name, p in exact.named_parameters()}
    for name, parameter in policy.hf.named_parameters():
        want = gradients[name]
        error = (full(parameter.grad).double() - want).norm() / want.norm()
        assert error < 1e-4, name


def test_adapters_are_moved_by_it_beside_frozen_routers(folder, world):
    policy = build_policy(ModelConfig(path=str(folder), lora_rank=2), world)
    batches, found = [make_packer(world).pack(SEQUENCES[:4])], []
    for coef in (0.0, COEF):
        backward(policy, weighted(batches, coef, world))
        trained = {n: full(p.grad) for n, p in policy.hf.named_parameters() if p.requires_grad}
        found.append(trained)
        policy.zero_grad()
    plain, balanced = found
    assert all("lora_" in name for name in balanced)
    first = "model.layers.0.self_attn.o_proj.lora_B.default.weight"
    assert (balanced[first] - plain[first]).norm() > 1e-3 * plain[first].norm()


def test_a_step_trains_and_logs_it(folder, world):
    config = make_config(
        model={"router_aux_loss_coef": COEF}, optim={"minibatches": 2}, score={"max_grad_ratio": 1}
    )
    groups = [make_group(name, [(3, True, -1.0), (4, False, None)], (1.0, 0.0)) for name in "ab"]
    policy = build_policy(ModelConfig(path=str(folder)), world)
    sampler = SimpleNamespace(
        config=config,
        world=world,
        stage=StageTimer(world.device),
        packer=make_packer(world),
        policy=policy,
        sample=lambda step: groups,
        staleness=1,
        sync_disagreement=0.0,
    )
    trainer = Trainer(
        sampler=sampler,
        reference=None,
        optimizer=AdamW(policy.parameters(), lr=0.1),
        score=OBJECTIVE.score,
        cap=GradientCap(loss_coef=0.8, max_ratio=1.0),
    )
    losses = [trainer.step(step)[0]["loss/router"] for step in range(8)]
    assert losses[0] > losses[-1] > 0.9 * CHOSEN


def test_a_supervised_phase_has_it_beside_its_loss(folder, world, tmp_path):
    write_tokenizer(folder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"problem": "1+2=", "response": "3"}\n')
    found = {}
    for coef in (0.0, COEF):
        config = SftConfig(
            output_dir="run",
            model={"path": str(folder), "router_aux_loss_coef": coef},
            data={
                "train": str(rows),
                "template": "{prompt}",
                "max_prompt_tokens": 16,
                "max_response_tokens": 8,
                "rows_per_step": 1,
            },
            optim={"steps": 1},
        )
        trainer = SftTrainer(config, world, StageTimer(world.device))
        found[coef] = trainer.step(0)
    [prompt] = trainer.rows.prompts(0)
    ids = torch.tensor([[*prompt.prompt_ids, TOKENS.index("3")]])  # nothing follows the EOS
    want = load(folder)(ids, output_router_logits=True).aux_loss.item()
    assert found[COEF]["loss/router"] == pytest.approx(want, rel=1e-6)
    assert found[COEF]["loss/response"] == pytest.approx(found[0.0]["loss/response"])
    assert not math.isclose(found[COEF]["step/grad_norm"], found[0.0]["step/grad_norm"])
    assert "loss/router" not in found[0.0]


@pytest.mark.parametrize(
    ("kind", "changes"), [("qwen2", {}), ("glm4_moe", {"n_routed_experts": 4, "n_group": 1})]
)
def test_models_without_such_a_loss_are_refused(tmp_path, kind, changes):
    AutoConfig.for_model(kind, **SIZES | changes).save_pretrained(tmp_path)
    load_model_config(ModelConfig(path=str(tmp_path)))
    with pytest.raises(ConfigError, match=f"balances no routers of a {kind} model"):
        load_model_config(ModelConfig(path=str(tmp_path), router_aux_loss_coef=0.01))


def test_compiled_blocks_are_refused():
    with pytest.raises(ConfigError, match="hides the routers from model.router_aux_loss_coef"):
        make_config(model={"compile": True, "router_aux_loss_coef": 0.01})
