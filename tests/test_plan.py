"""laser-fast plan: its terms against measured allocations, and advice that holds when tried."""

import json
import math

import pytest
import torch
import torch.distributed as dist
from family_models import FAMILIES, SIZES
from model_shapes import COUNTS_7B, QWEN_7B, qwen
from tiny_models import make_config, make_model_config, make_sequences
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Glm4MoeConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from laser_fast.config import Config, ConfigError, ModelConfig, OptimConfig
from laser_fast.model.distributed import World
from laser_fast.model.families import balancer
from laser_fast.model.packing import Packer
from laser_fast.model.policy import Policy, shard
from laser_fast.plan import Plan, advise, verdict
from laser_fast.plan.memory import WORKSPACE_MB, activation_bytes_per_token, count_parameters
from laser_fast.training.update import IS_FUSED, build_optimizer
from laser_kernels import _dispatch, linear_logprob_loss

SMALL = {
    "vocab_size": 2000,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
EXPERTS = {"num_experts": 8, "moe_intermediate_size": 160, "num_experts_per_tok": 2}
FEW_KEYS = {"num_key_value_heads": 2}
UNTIED = {"tie_word_embeddings": False}
BIASES = {"attention_bias": True, "mlp_bias": True}


def _config(**sections):
    defaults = {
        "data": {"max_prompt_tokens": 100, "prompts_per_step": 64},
        "rollout": {"engine": "vllm", "max_new_tokens": 400},
        "optim": {"tokens_per_microbatch": 4096},
    }
    merged = {name: {**defaults.get(name, {}), **keys} for name, keys in sections.items()}
    return make_config(**{**defaults, **merged})


def _plan(config=None, *, model=None, counts=None, num_gpus=8, memory_gb=80.0, **options):
    """A plan of Qwen2.5-7B, or of another model."""
    counts = counts or (count_parameters(model) if model else COUNTS_7B)
    model = model or qwen(QWEN_7B)
    return Plan(config or _config(), model, *counts, num_gpus, memory_gb, **options)


def _small(family, **changes):
    return make_model_config(family, **SMALL | changes)


def _glm(**changes):
    return Glm4MoeConfig(**SMALL, **EXPERTS, n_routed_experts=8, head_dim=16, **changes)


def _model(config, **options):
    return AutoModelForCausalLM.from_config(config, attn_implementation="laser_torch", **options)


def _storages(tensors) -> int:
    """Bytes of the distinct storages under local tensors."""
    locals_ = [getattr(tensor, "_local_tensor", tensor).untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in locals_}.values())


@pytest.mark.parametrize(
    ("config", "query", "key", "extra"),
    # Extra are biases of attention and MLP, and the norms of heads.
    [
        (_small("qwen2"), 64, 64, 3 * 64),
        (_small("qwen2", **FEW_KEYS, **UNTIED), 64, 32, 64 + 2 * 32),
        (_small("qwen3", **FEW_KEYS, head_dim=24), 96, 48, 2 * 24),
        (_small("qwen3", **UNTIED, attention_bias=True), 64, 64, 4 * 64 + 2 * 16),
        (_small("llama", **UNTIED, **BIASES), 64, 64, 4 * 64 + 2 * 160 + 64),
        (_small("llama", **FEW_KEYS), 64, 32, 0),
    ],
)
def test_counts_by_hand(config, query, key, extra):
    hidden, num_tables = 64, 1 if config.tie_word_embeddings else 2
    block = 2 * hidden * (query + key) + 3 * hidden * 160 + 2 * hidden + extra
    root = (num_tables * 2000 + 1) * hidden
    assert count_parameters(config) == (3 * block + root, block, root)


def test_counts_of_a_known_model():
    assert count_parameters(qwen(QWEN_7B)) == COUNTS_7B


def test_dense_first_blocks_of_a_mixture_of_experts():
    total, block, root = count_parameters(_glm(first_k_dense_replace=1))
    assert root == (2 * 2000 + 1) * 64
    assert block > 8 * 3 * 64 * 160 and 2 * block < total - root < 3 * block


def test_sharded_terms_are_what_a_training_step_allocates():
    config = _small("qwen2", **UNTIED)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        world = World(0, 8, torch.device("cpu"))
        policy = Policy(_model(config), compute_dtype=torch.float32)
        shard(policy, ModelConfig(path="model"), world)
        optimizer = build_optimizer(policy, OptimConfig(steps=1))
        packer = Packer(
            budget=32, score_token_id=9, score_at="eos", temperature=1.0, device=world.device
        )
        batch = packer.pack(make_sequences(1))

        def read(hidden_states, head):
            # The root is gathered here: this is R of the plan, as far as the table goes.
            assert head.weight.shape == (config.vocab_size, config.hidden_size)
            return linear_logprob_loss(
                hidden_states, head.weight, batch.labels, lambda logprobs, rows: logprobs.sum()
            )

        policy(batch, read).backward()
        gradients = _storages(parameter.grad for parameter in policy.parameters())
        optimizer.step()
        moments = [s for state in optimizer.state.values() for s in state.values() if s.ndim]
        measured = {
            "parameters": _storages(policy.parameters()),
            "gradients": gradients,
            "optimizer": _storages(moments),
        }
    finally:
        dist.destroy_process_group()
    terms = _plan(model=config).terms
    for name, found in measured.items():
        assert terms[name].bytes == pytest.approx(found, rel=0.1), name


@pytest.mark.parametrize(
    ("vocab", "workspace_mb", "at_least"),
    # Where the rounded gradients are the larger part, within 10%; where the chunk of logits is,
    # the term is a bound, since chunks are whole tiles.
    [(8000, 4, 0.9), (20000, 2, 0.9), (3000, 12, 0.5)],
)
def test_head_term_is_what_the_head_allocates(monkeypatch, vocab, workspace_mb, at_least):
    tokens, hidden = 1024, 128
    monkeypatch.setenv("LASER_KERNELS_WORKSPACE_MB", str(workspace_mb))
    hidden_states = torch.randn(2 * tokens, hidden)
    weight = torch.randn(vocab, hidden, requires_grad=True)
    labels, rows = torch.randint(vocab, (tokens,)), torch.randperm(2 * tokens)[:tokens]

    def function():
        selected = hidden_states[rows].requires_grad_()
        linear_logprob_loss(
            selected, weight, labels, lambda logprobs, rows: logprobs.sum(), impl="chunked"
        ).backward()

    function()
    weight.grad = None
    model = _small("qwen2", **UNTIED, vocab_size=vocab, hidden_size=hidden)
    config = _config(model={"compute_dtype": "float32"}, optim={"tokens_per_microbatch": tokens})
    term = _plan(config, model=model, workspace_mb=float(workspace_mb)).terms["head"]
    assert at_least <= _peak_bytes(function) / term.bytes <= 1.1


def test_workspace_is_the_default_of_the_kernels():
    assert _dispatch.WORKSPACE_MB["cuda"] == WORKSPACE_MB


def _peak_bytes(function) -> int:
    """Largest number of bytes that `function` held at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    memory = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = peak = 0
    for event in memory:
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "config",
    [
        *(_small(family, **UNTIED) for family in ("qwen2", "qwen3", "llama")),
        _glm(first_k_dense_replace=0),
        OlmoeConfig(**SMALL, num_experts=8, num_experts_per_tok=4),
        Qwen2MoeConfig(**SMALL, **EXPERTS, shared_expert_intermediate_size=320),
        Qwen3MoeConfig(**SMALL, **EXPERTS, head_dim=16),
    ],
    ids=lambda config: config.model_type,
)
def test_activations_are_what_autograd_keeps(config, dtype):
    model = _model(config, dtype=dtype).train()
    tokens = 256
    # On a CPU sdpa keeps no attention matrix where key and query heads are equally many.
    block, rotary = model.model.layers[0], model.model.rotary_emb
    states = torch.randn(1, tokens, config.hidden_size, dtype=dtype, requires_grad=True)
    position = rotary(states, torch.arange(tokens)[None])
    kept = {}
    ignored = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *position, states)}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = block(states, position_embeddings=position)
    assert output.requires_grad
    found = sum(nbytes for nbytes, _ in kept.values()) / tokens
    if dtype == torch.float32:
        found += 4 * config.hidden_size  # the first norm's copy is the input itself
    expected = activation_bytes_per_token(config, dtype.itemsize, repeats_keys=False)
    assert expected == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_router_loss_keeps_logits_and_their_probabilities(dtype):
    model = AutoConfig.for_model("qwen3_moe", **SIZES | FAMILIES["qwen3_moe"] | {"num_experts": 64})
    logits = [
        torch.randn(256, 64, dtype=getattr(torch, dtype), requires_grad=True) for _ in range(2)
    ]
    kept = list(logits)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        balancer(model)(tuple(x.float() for x in logits))
    keys = {"compute_dtype": dtype, "router_aux_loss_coef": 0.01}
    sections = {
        "data": {"max_prompt_tokens": 20},
        "rollout": {"max_new_tokens": 20},
        "optim": {"tokens_per_microbatch": 256},
    }
    found = _plan(_config(model=keys, **sections), model=model)
    term = found.terms["router loss"]
    # The rest are indices that topk would read, if anything read its values.
    assert term.bytes == pytest.approx(_storages(kept), rel=0.05)
    assert term in found.phases["head and loss"] and term in found.phases["backward of the blocks"]
    without = _plan(_config(model={"compute_dtype": dtype}, **sections), model=model)
    assert "router loss" not in without.terms


def test_terms_by_hand():
    model = _small(
        "qwen2", vocab_size=100, hidden_size=8, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, **UNTIED,
    )  # fmt: skip
    config = _config(
        model={"gradient_checkpointing": True, "replicas": 2, "attention": "varlen"},
        data={"max_prompt_tokens": 100},
        rollout={"tensor_parallel": 2, "gpu_memory_fraction": 0.5, "max_new_tokens": 400},
        optim={"tokens_per_microbatch": 1000},
        loss={"kl_coef": 0.1},
    )
    plan = _plan(config, model=model, counts=(2500, 1000, 500), memory_gb=10.0, workspace_mb=0.001)
    found = {name: term.bytes for name, term in plan.terms.items()}
    shards, total = 4, 2500
    assert found == pytest.approx(
        {
            "parameters": 4 * total / shards,
            "optimizer": 8 * total / shards,
            "reference policy": 2 * total / shards,
            "gradients": 4 * total / shards,
            "gathered weights": 2 * (500 + 2 * 1000),
            "unsharded gradients": 2 * 500 + 6 * 1000,
            "activations": 1000 * 2 * 2 * 8,
            # Two norms, attention with repeated keys, the MLP; then its gradients. Each of 8
            # completions has the keys of its prompt.
            "block at work": 1000
            * (2 * 8 * 8 + (2 * 2 * 8 * (1 + 8) + 4 * 2) + 4 * 2 * 32 + 2 * 80),
            "head": 4 * (800 + 8000) + max(1000, 2 * 8800) + 2 * 8000,
            "reduction of the root": 8 * 500,
            "temporary of AdamW": 0 if IS_FUSED else 4 * total / shards,
            "attention scores": 0,
            "engine weights": 2 * total / 2,
            "key-value cache": 5e9 - total,
            "sync buffer": 2 * 800 * (1 + 1 / 4),
        }
    )
    # One key-value head cannot be split over two ranks: 2 layers x 2 x 4 x 2 bytes a token.
    assert plan.num_cached == pytest.approx((5e9 - total - 2e9) / (501 * 32))
    assert max(plan.peaks.values()) == plan.peaks["rollout"] == pytest.approx(5 + 4, abs=1e-3)


def test_offloaded_run_keeps_its_state_on_the_host():
    config = _config(model={"cpu_offload": True})
    plan = _plan(config)
    for name in ("parameters", "gradients", "optimizer", "temporary of AdamW"):
        assert plan.terms[name].bytes == 0
    assert plan.host_gb == pytest.approx(16 * COUNTS_7B[0] / 8 / 1e9) and _plan().host_gb == 0


@pytest.mark.parametrize(
    ("engine", "names"),
    [
        ({"engine": "hf"}, {"gathered policy", "key-value cache"}),
        ({"engine": "vllm_server", "server_url": "http://localhost"}, {"sync buffer"}),
    ],
)
def test_terms_of_the_other_engines(engine, names):
    plan = _plan(_config(rollout=engine))
    all_names = {"gathered policy", "key-value cache", "sync buffer", "engine weights"}
    assert plan.terms.keys() & all_names == names and plan.num_cached == math.inf
    if engine["engine"] == "hf":
        # 64 prompts x 8 over 8 GPUs; 501 tokens of 28 layers, keys and values of 512 in 2 bytes.
        assert plan.terms["key-value cache"].bytes == 64 * 501 * 28 * 2 * 512 * 2


@pytest.mark.parametrize(
    ("sections", "num_gpus", "memory_gb", "expected"),
    [
        ({"rollout": {"gpu_memory_fraction": 0.95}}, 8, 80, ["rollout.gpu_memory_fraction="]),
        ({"optim": {"tokens_per_microbatch": 65536}}, 8, 80, ["optim.tokens_per_microbatch="]),
        ({"model": {"replicas": 8}}, 8, 80, ["model.replicas=1"]),
        ({}, 1, 80, ["model.cpu_offload=true"]),
        ({"rollout": {"engine": "hf", "max_num_seqs": 4096, "max_new_tokens": 3000}}, 1, 80, None),
        ({"rollout": {"gpu_memory_fraction": 0.05}}, 8, 80, ["rollout.gpu_memory_fraction="]),
        ({}, 4, 24, ["model.cpu_offload=true", "rollout.", "optim."]),
        ({}, 1, 17, ["--gpus=2", "model.cpu_offload=true", "rollout.tensor_parallel=2", "optim."]),
        (  # the smallest microbatch that a run takes, with no place for a score
            {"rollout": {"max_new_tokens": 450}, "score": {"position": "last"}}, 1, 17,
            ["--gpus=2", "model.cpu_offload=true", "rollout.tensor_parallel=2", "optim."],
        ),
    ],
)  # fmt: skip
def test_advice_makes_it_fit(sections, num_gpus, memory_gb, expected):
    config = _config(**sections)
    plan = _plan(config, num_gpus=num_gpus, memory_gb=memory_gb)
    assert plan.misfits() and verdict(plan).startswith("It does not fit: ")
    changes, after = advise(plan)
    assert changes and not after.misfits()
    if expected is not None:
        assert len(changes) == len(expected)
        assert all(map(str.startswith, changes, expected))
    # What is printed is what was tried: typed as overrides it gives the same plan.
    data = config.model_dump()
    gpus, workspace = num_gpus, WORKSPACE_MB
    for name, _, value in (change.partition("=") for change in changes):
        if name == "LASER_KERNELS_WORKSPACE_MB":
            workspace = float(value)
        elif name == "--gpus":
            gpus = int(value)
        else:
            section, _, key = name.partition(".")
            data[section][key] = json.loads(value)
    typed = Config.parse(data, source="advice")
    tried = _plan(typed, num_gpus=gpus, memory_gb=memory_gb, workspace_mb=workspace)
    assert tried.peaks == pytest.approx(after.peaks) and not tried.misfits()


def test_hopeless_plan_says_so():
    plan = _plan(num_gpus=1, memory_gb=5.0)
    assert advise(plan)[0] == [] and "nothing here makes it fit" in verdict(plan)
    assert "It fits" in verdict(_plan())


@pytest.mark.parametrize(
    ("sections", "num_gpus", "message"),
    [
        ({"model": {"replicas": 3}}, 8, "model.replicas = 3 does not divide the 8 ranks"),
        ({"rollout": {"tensor_parallel": 3}}, 8, "rollout.tensor_parallel = 3 does not divide"),
        ({}, 24, "does not divide over 24 ranks"),
    ],
)
def test_impossible_setup_is_refused(sections, num_gpus, message):
    with pytest.raises(ConfigError, match=message):
        _plan(_config(**sections), num_gpus=num_gpus)
