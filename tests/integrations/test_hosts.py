"""The op in verl, prime-rl and torchtitan: over stand-ins for them, whose parameters are theirs."""

import ast
import importlib.util
import inspect
from pathlib import Path
from types import SimpleNamespace

import fake_hosts
import pytest
import torch
from fake_hosts import SOURCES, import_over, load
from torch.distributed.fsdp import fully_shard

VERSIONS = {"verl": "0.9.1", "prime_rl": "0.8.0", "torchtitan": "0.3.0"}
V, D = 97, 16


@pytest.fixture
def hidden():
    return torch.randn(2, 5, D, requires_grad=True)


@pytest.fixture
def labels():
    return torch.randint(V, (2, 5))


def float64(hidden, weight, labels, temperature=1.0, softcap=None):
    """Log-probs and entropies [B, S] in float64, from logits."""
    logits = hidden.double() @ weight.double().t()
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    table = (logits / torch.as_tensor(temperature, dtype=torch.float64)).log_softmax(-1)
    return table.gather(-1, labels[..., None])[..., 0], -(table.exp() * table).sum(-1)


def assert_same(found, expected, inputs):
    """Values, and gradients of a mix of them."""
    gradients = []
    for values in (found, expected):
        upstream = (torch.linspace(-1, 1, x.numel()).view(x.shape).to(x.dtype) for x in values)
        mixed = sum((x * g).sum() for x, g in zip(values, upstream, strict=True))
        gradients.append(torch.autograd.grad(mixed, inputs))
    for values in ((found, expected), gradients):
        for x, y in zip(*values, strict=True):
            torch.testing.assert_close(x.double(), y.double(), atol=2e-5, rtol=1e-5)


def make_model(head=None, **config):
    head = head or torch.nn.Linear(D, V, bias=False)
    config = SimpleNamespace(**config)
    config.get_text_config = lambda: config
    return SimpleNamespace(get_output_embeddings=lambda: head, config=config, lm_head=head)


@pytest.fixture
def verl(monkeypatch):
    module, modules = import_over(monkeypatch, "verl", "0.9.1")
    modules = {name.rpartition(".")[2]: found for name, found in modules.items()}
    return SimpleNamespace(
        integration=module,
        patch=lambda *args: modules["monkey_patch"].patch_forward_with_backends(*args),
        torch_head=modules["torch_functional"].FusedLinearForPPO().forward,
        triton=modules["linear_cross_entropy"],
        engines=modules["transformer_impl"],
    )


def call_torch(verl, hidden, weight, labels, temperature):
    return verl.torch_head(
        hidden_states=hidden, vocab_weights=weight, input_ids=labels, temperature=temperature
    )


def call_triton(verl, hidden, weight, labels, temperature):
    return verl.triton.linear_cross_entropy(hidden, weight, labels, temperature, "none")


@pytest.mark.parametrize("call", [call_torch, call_triton])
def test_heads_of_verl_are_the_op(verl, hidden, labels, call):
    model = make_model(logit_scale=1.0)
    verl.patch(model, True, "torch")
    assert model.backend == "torch"
    weight = model.lm_head.weight
    found = call(verl, hidden, weight, labels.int(), 0.7)
    assert_same(found, float64(hidden, weight, labels, 0.7), (hidden, weight))


def test_a_head_that_verl_shards_by_itself_is_whole_in_the_op(verl, hidden, labels, world):
    model = make_model()
    full = model.lm_head.weight.detach().clone().requires_grad_()
    verl.patch(model, True, "torch")
    fully_shard(model.lm_head)
    found = call_torch(verl, hidden, model.lm_head.weight, labels, 0.7)
    expected = float64(hidden, full, labels, 0.7)
    for values in (found, expected):
        (values[0].sum() + 0.1 * values[1].sum()).backward()
    grad = model.lm_head.weight.grad.full_tensor()
    torch.testing.assert_close(grad, full.grad, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("head", "config", "backend", "message"),
    [
        (None, {}, "liger", "impl_backend=liger"),
        (None, {}, None, "impl_backend=None"),
        (None, {"final_logit_softcapping": 30.0}, "torch", "final_logit_softcapping"),
        (None, {"logit_scale": 0.0625}, "torch", "logit_scale"),
        (torch.nn.Linear(D, V), {}, "torch", "a head with a bias"),
        (torch.nn.Identity(), {}, "torch", "a head of type Identity"),
    ],
)
def test_what_the_op_cannot_honour_is_refused_in_verl(verl, head, config, backend, message):
    model = make_model(head, **config)
    with pytest.raises(ValueError, match=message):
        verl.patch(model, True, backend)
    assert not hasattr(model, "backend")


def test_fused_kernels_that_are_off_warn(verl):
    model = make_model(final_logit_softcapping=30.0)
    with pytest.warns(UserWarning, match="use_fused_kernels is off"):
        verl.patch(model, False, "torch")
    assert model.backend is None and "forward" not in vars(model.lm_head)


def test_other_engines_of_verl_are_refused(verl, hidden, labels):
    weight = torch.randn(V, D)
    for call in (verl.triton.linear_cross_entropy, verl.triton.LinearCrossEntropy.apply):
        with pytest.raises(ValueError, match="Megatron"):
            call(hidden, weight, labels, 1.0, "none", "group")
    with pytest.raises(ValueError, match="Megatron"):
        verl.triton.linear_cross_entropy(hidden, weight, labels, 1.0, "mean")


def test_a_model_of_before_the_import_is_refused(verl, hidden, labels):
    with pytest.raises(RuntimeError, match="before verl makes its models"):
        call_torch(verl, hidden, torch.randn(V, D), labels, 1.0)


EOS, SCORE = 2, 5


def micro_batch(**options):
    rows = [torch.tensor(row) for row in ([7, 8, 9, EOS], [8, 9, 10], [11, EOS])]
    ids = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    return {"input_ids": ids, "temperature": 0.7, "use_remove_padding": True, **options}


def test_the_score_of_verl_is_read_at_the_eos_at_temperature_1(verl):
    score = verl.integration.EosScore(token_id=SCORE, eos_token_ids=(EOS, 96))
    batch, model = micro_batch(), make_model()
    verl.patch(model, True, "torch")
    plain = verl.engines.FSDPEngineWithLMHead().prepare_model_inputs(batch)[0]
    score.install()
    inputs, _ = verl.engines.FSDPEngineWithLMHead().prepare_model_inputs(batch)
    assert isinstance(inputs["temperature"], float) and inputs["temperature"] == 0.7
    labels = inputs["shift_labels"]
    assert labels[0, [3, 8]].tolist() == [SCORE, SCORE]
    others = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(labels[0, others], plain["shift_labels"][0, others])
    hidden = torch.randn(1, 9, D)
    weight = model.lm_head.weight
    log_probs, _ = call_torch(verl, hidden, weight, labels, inputs["temperature"])
    nested = torch.nested.nested_tensor_from_jagged(log_probs[0], batch["input_ids"].offsets())
    found, is_finished = score.logprobs({"log_probs": nested}, batch)
    assert is_finished.tolist() == [True, False, True]
    expected = float64(hidden, weight, torch.full((1, 9), SCORE))[0][0]
    torch.testing.assert_close(found[is_finished].double(), expected[[3, 8]], atol=2e-5, rtol=0)
    expected = float64(hidden, weight, plain["shift_labels"], 0.7)[0][0]
    torch.testing.assert_close(log_probs[0, [0, 7]].double(), expected[[0, 7]], atol=2e-5, rtol=0)


def test_the_score_of_verl_needs_packed_rows_and_leaves_critics_alone(verl):
    verl.integration.EosScore(token_id=SCORE, eos_token_ids=(EOS,)).install()
    batch = micro_batch(use_remove_padding=False)
    with pytest.raises(ValueError, match="use_remove_padding=True"):
        verl.engines.FSDPEngineWithLMHead().prepare_model_inputs(batch)
    engine = verl.engines.FSDPEngineWithLMHead()
    engine.use_ulysses_sp = True
    with pytest.raises(ValueError, match="ulysses_sequence_parallel_size=1"):
        engine.prepare_model_inputs(micro_batch())
    inputs, _ = verl.engines.FSDPEngineWithValueHead().prepare_model_inputs(batch)
    assert inputs["temperature"] == 0.7 and "shift_labels" not in inputs


def test_the_score_of_verl_is_refused_where_the_heads_are_others(verl):
    score = verl.integration.EosScore(token_id=SCORE, eos_token_ids=(EOS,))
    score.install()
    engine, batch = verl.engines.FSDPEngineWithLMHead(), micro_batch()
    for call in (engine.prepare_model_inputs, lambda batch: score.logprobs({}, batch)):
        with pytest.raises(ValueError, match="other engines than FSDP"):
            call(batch)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_heads_of_prime_rl_are_the_op(monkeypatch, hidden, labels, softcap):
    _, modules = import_over(monkeypatch, "prime_rl", "0.8.1.dev67")
    plain, gemma = (modules[name] for name in fake_hosts.PRIME_RL)
    head_type = gemma.GemmaFusedOutputLinear if softcap else plain.FusedOutputLinear
    head = head_type(D, V, *[softcap] * (softcap is not None))
    temperature = torch.rand(2, 5) + 0.5
    found = head(hidden, labels, temperature=temperature.bfloat16())
    expected = float64(
        hidden, head.weight, labels, temperature.bfloat16().double()[..., None], softcap
    )
    found = (found["logprobs"], found["entropy"])
    assert_same(found, expected, (hidden, head.weight))
    for head_type in (plain.VanillaOutputLinear, gemma.GemmaVanillaOutputLinear):
        with pytest.raises(ValueError, match="fused_lm_head_token_chunk_size"):
            head_type(D, V)(hidden)


@pytest.fixture
def titan(monkeypatch):
    module, modules = import_over(monkeypatch, "torchtitan", "0.3.0")
    loss = modules["torchtitan.components.loss"]
    dapo = modules["torchtitan.experiments.rl.losses.dapo"]
    return SimpleNamespace(integration=module, loss=loss, dapo=dapo)


@pytest.mark.parametrize("shape", [(2, 5), (10,)])
def test_the_wrapper_of_torchtitan_gives_the_loss_of_logits(titan, hidden, labels, shape):
    hidden, labels = hidden.view(*shape, D), labels.view(shape)
    mask = torch.arange(10).view(shape) % 3 != 0
    labels = labels.masked_fill(torch.arange(10).view(shape) == 0, titan.loss.IGNORE_INDEX)
    inputs = {"advantages": torch.randn(shape), "loss_mask": mask}
    head, results = torch.nn.Linear(D, V, bias=False), []
    for wrapper_type in (titan.loss.ChunkedLossWrapper, titan.integration.LaserLossWrapper):
        wrapper = wrapper_type(wrapper_type.Config(loss_fn=titan.dapo.DAPOLoss()))
        wrapper.set_lm_head(head)
        loss, metrics = wrapper(hidden, labels, 7, **inputs)
        gradients = torch.autograd.grad(loss, (hidden, head.weight))
        results.append((loss, metrics["entropy/mean"], *gradients))
    assert not results[1][1].requires_grad
    for found, expected in zip(*results[::-1], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_what_the_op_cannot_honour_is_refused_in_torchtitan(titan, hidden, labels):
    Wrapper = titan.integration.LaserLossWrapper
    dapo, head = titan.dapo.DAPOLoss(), torch.nn.Linear(D, V, bias=False)
    for config, head_of_case, message in (
        ({"loss_fn": object()}, head, "a loss of type object"),
        ({"loss_fn": dapo, "num_chunks": 8}, head, "num_chunks=8"),
        ({"loss_fn": dapo}, torch.nn.Linear(D, V), "a head with a bias"),
    ):
        with pytest.raises(ValueError, match=message):
            Wrapper(Wrapper.Config(**config)).set_lm_head(head_of_case)
    wrapper = Wrapper(Wrapper.Config(loss_fn=dapo))
    head.weight = torch.nn.Parameter(head.weight[: V // 2].detach())  # a shard by rows
    wrapper.set_lm_head(head)
    inputs = {"advantages": torch.ones(2, 5), "loss_mask": torch.ones(2, 5, dtype=torch.bool)}
    with pytest.raises(ValueError, match="tensor parallelism"):
        wrapper(hidden, labels, 7, **inputs)


@pytest.mark.parametrize("host", VERSIONS)
def test_other_versions_warn_and_other_parameters_refuse(monkeypatch, recwarn, host):
    import_over(monkeypatch, host, VERSIONS[host])
    assert not [warning for warning in recwarn if "tested with" in str(warning.message)]
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="tested with .* 10.0"):
        import_over(patch, host, "10.0")
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="got a checkout"):
        import_over(patch, host, None)
    name = next(name for name in SOURCES if name.startswith(f"{host}."))

    def changed(module, fill=fake_hosts.FILL[name]):
        fill(module)
        *owner, function = SOURCES[name][0].split(".")
        owner = getattr(module, owner[0]) if owner else module
        setattr(owner, function, lambda self, logits: None)

    monkeypatch.setitem(fake_hosts.FILL, name, changed)
    integration, _ = load(monkeypatch, host, VERSIONS[host])
    with pytest.raises(ImportError, match=r"expected .*, got \(self logits\) of"):
        importlib.import_module(integration)


@pytest.mark.hosts
@pytest.mark.parametrize("name", SOURCES)
def test_the_hosts_have_the_recorded_parameters(monkeypatch, name):
    host = name.partition(".")[0]
    spec = importlib.util.find_spec(host)
    if spec is None:
        pytest.skip(f"needs the source of {host}")
    path = Path(spec.submodule_search_locations[0], *name.split(".")[1:]).with_suffix(".py")
    tree = ast.parse(path.read_text())
    _, modules = load(monkeypatch, host, VERSIONS[host])
    for qualified in SOURCES[name]:
        found, fake = tree, modules[name]
        for part in qualified.split("."):
            found = next(node for node in found.body if getattr(node, "name", None) == part)
            fake = getattr(fake, part)
        a = found.args
        args = [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]
        names = [arg.arg for arg in args if arg is not None]
        assert names == list(inspect.signature(fake).parameters), qualified
