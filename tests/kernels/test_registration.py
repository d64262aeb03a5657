"""The ops as torch sees them: schema, fake, autograd, compilation, and whose code they run."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import laser_kernels
from laser_kernels import last_token_score, linear_logprob

OPS = torch.ops.laser_kernels


def op_arguments(head, impl):
    """Realistic arguments of every op, by name."""
    h, w, labels = head
    num_rows, vocabulary, device = len(h), len(w), h.device
    rows = [torch.rand(num_rows, device=device) + 0.5 for _ in range(3)]
    inv_temperature, g, e = rows
    hd, wd = h.detach(), w.detach()
    head = (hd, wd, labels, inv_temperature, 30.0)
    stats = OPS.linear_logprob_fwd(*head, True, impl, "", "")
    *loss_stats, kept = OPS.loss_chunk_fwd(*head, None, impl, "")
    has_buffer = impl == "chunked" and device.type == "cpu"
    buffer = torch.empty_like(kept) if has_buffer else None
    _, _, _, *few, few_kept = OPS.last_token_fwd(*head, g, e, 0.1, -4.0, True, impl)
    grads = (torch.zeros_like(hd).float(), torch.zeros_like(wd).float())
    scalar = torch.tensor(2.0, device=device)
    return {
        "linear_logprob_fwd": (h, w, *head[2:], True, impl, "", ""),
        "linear_logprob_bwd": (g, e, *head, *stats, True, False, impl, ""),
        "loss_chunk_fwd": (*head, buffer, impl, ""),
        "loss_chunk_bwd": (g, *loss_stats, kept, *head, *grads, True, impl, ""),
        "attach_gradients": (scalar, h, w, *(torch.randn_like(x) for x in grads)),
        "scale_gradient": (torch.randn(num_rows, vocabulary, device=device), scalar, h.dtype),
        "last_token_fwd": (h, w, *head[2:], g, e, 0.1, -4.0, True, impl),
        "last_token_bwd": (g, few_kept, *head, *few, True, True, impl),
    }


NAMES = [
    "attach_gradients",
    "last_token_bwd",
    "last_token_fwd",
    "linear_logprob_bwd",
    "linear_logprob_fwd",
    "loss_chunk_bwd",
    "loss_chunk_fwd",
    "scale_gradient",
]


@pytest.mark.parametrize("op", NAMES)
def test_opcheck(op, case, make_head):
    impl, dtype = case
    arguments = op_arguments(make_head(6, 16, 41, dtype), impl)
    assert sorted(arguments) == NAMES
    others = ("test_schema", "test_autograd_registration", "test_faketensor")
    keeps_logits = op == "last_token_fwd"
    # Its backward overwrites the kept logits, an output that no caller sees: not to be compared.
    tests = others if keeps_logits else (*others, "test_aot_dispatch_dynamic")
    checks = torch.library.opcheck(getattr(OPS, op).default, arguments[op], test_utils=tests)
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("op", "workspace_mb", "most"),
    [
        ("loss", "66", 2),  # one size, then any: one chunk holds them all
        ("loss", "0.0001", 3),  # and one for what is more than a chunk of 128 rows
        ("selected", "66", 2),
        ("constant", "66", 2),
        ("logprob", "0.0001", 2),
    ],
)
def test_any_number_of_rows_compiles_to_few_graphs(op, workspace_mb, most):
    script = Path(__file__).with_name("dynamic_rows.py")
    package = Path(laser_kernels.__path__[0]).parent
    path = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    environment = dict(os.environ, LASER_KERNELS_WORKSPACE_MB=workspace_mb, PYTHONPATH=path)
    command = [sys.executable, str(script), op]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout) <= most


def test_opcheck_of_the_labels_of_a_shard(device):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD.group_name
        arguments = (torch.randint(41, (6,), device=device), 41, group)
        checks = torch.library.opcheck(OPS.local_labels.default, arguments)
    finally:
        torch.distributed.destroy_process_group()
    assert set(checks.values()) == {"SUCCESS"}


def test_compiled_chunks_equal_eager_ones(make_head, scalar_ops, monkeypatch):
    monkeypatch.setenv("LASER_KERNELS_WORKSPACE_MB", "0.0001")  # chunks of 128 rows
    head = make_head(300, 16, 41, torch.float32)
    g = torch.randn(300, device=head.labels.device)
    compiled = torch.compile(scalar_ops["loss"], fullgraph=True, backend="inductor")
    results = (op(*head, "chunked", g) for op in (scalar_ops["loss"], compiled))
    grads = (torch.autograd.grad(result, head[:2]) for result in results)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["logprob", "entropy", "loss", "last_token", "score"])
def test_compiled_equals_eager(name, case, make_head, scalar_ops):
    def score(h, w, labels, impl, g):
        return (last_token_score(h, w, 3, beta=0.1, ref_logprob=-4.0, impl=impl) * g).sum()

    torch._dynamo.reset()  # a frame that another test could not compile is skipped from then on
    impl, dtype = case
    head = make_head(6, 16, 41, dtype)
    function = score if name == "score" else scalar_ops[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    g = torch.randn(6, device=head.labels.device)
    eager, traced = function(*head, impl, g), compiled(*head, impl, g)
    assert torch.equal(eager, traced)
    assert eager.requires_grad == traced.requires_grad == (name != "score")
    if eager.requires_grad:
        grads = (torch.autograd.grad(x, head[:2]) for x in (eager, traced))
        for a, b in zip(*grads, strict=True):
            assert torch.equal(a, b)


FIRST_CALL = """
import torch
from laser_kernels import last_impl, linear_logprob
head = (torch.randn(3, 8), torch.randn(11, 8), torch.zeros(3, dtype=int))
compiled = torch.compile(linear_logprob, fullgraph=True, backend="aot_eager")
compiled(*head, impl="chunked")
assert last_impl() == "chunked"
compiled(*head, impl="reference")
assert last_impl() == "reference"
with torch._dynamo.config.patch(error_on_recompile=True):
    compiled(*head, impl="chunked")
assert last_impl() == "chunked"
"""


def test_the_first_call_of_a_process_may_be_a_compiled_one():
    """In a fresh process; a later call with another impl neither fails nor compiles again."""
    path = os.pathsep.join([os.path.dirname(laser_kernels.__path__[0]), *sys.path])
    env = os.environ | {"PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, "-c", FIRST_CALL], env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_copies_of_the_package_run_their_own_code(tmp_path, make_head):
    """As Hugging Face's `kernels` loads them: under other module names, from other folders."""

    def load(name):
        folder = tmp_path / name / "laser_kernels"
        shutil.copytree(Path(laser_kernels.__path__[0]), folder, symlinks=True)
        with (folder / "_chunked.py").open("a") as file:
            file.write(
                "_statistics = statistics\n"
                "def statistics(*args):\n"
                "    stats = _statistics(*args)\n"
                f"    return stats._replace(logprobs=stats.logprobs - {len(name)})\n"
            )
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def op(module, head):
        compiled = torch.compile(module.linear_logprob, fullgraph=True, backend="aot_eager")
        eager, traced = (f(*head, impl="chunked") for f in (module.linear_logprob, compiled))
        assert torch.equal(eager, traced)
        return eager

    head = make_head(6, 16, 41, torch.float32)
    expected = linear_logprob(*head, impl="chunked")
    names = ["copied_kernels", "kernels_copied_again"]
    try:
        copies = [load(name) for name in names]
        assert torch.equal(op(laser_kernels, head), expected)
        for name, copy in zip(names, copies, strict=True):
            assert torch.equal(op(copy, head), expected - len(name))
    finally:
        for module in list(sys.modules):
            if module.split(".")[0] in names:
                del sys.modules[module]
