"""Bad input: one error that names the argument, what was expected, what came, and what to do."""

import os
import subprocess
import sys

import pytest
import torch

import laser_kernels
from laser_kernels import (
    last_token_loss,
    linear_logprob,
    linear_logprob_entropy,
    linear_logprob_loss,
)

N, D, V = 4, 8, 11
HEAD = dict(
    hidden_states=torch.randn(N, D), weight=torch.randn(V, D), labels=torch.zeros(N, dtype=int)
)
GRAD = torch.ones(N, requires_grad=True)
OTHER = torch.device("meta")


class DTensor(torch.Tensor):
    """A stand-in with the name of torch.distributed.tensor.DTensor, which needs a process group."""


BAD_HEAD = {
    "rank of hidden_states": (dict(hidden_states=torch.randn(2, 2, D)), r"hidden_states \[N, D\]"),
    "rank of weight": (dict(weight=torch.randn(D)), r"weight \[V, D\], got shape \(8,\)"),
    "mismatched D": (dict(weight=torch.randn(V, D + 1)), r"with V >= 1 and D=8 .* got \(11, 9\)"),
    "empty vocabulary": (dict(weight=torch.randn(0, D)), r"V >= 1"),
    "mixed dtypes": (dict(weight=torch.randn(V, D).bfloat16()), r"float32, got torch.bfloat16"),
    "float64": (dict(hidden_states=torch.randn(N, D).double()), r"got torch.float64; .*reference"),
    "integers": (dict(hidden_states=torch.ones(N, D, dtype=int)), r"got torch.int64"),
    "no tensor": (dict(weight=[[1.0]]), r"weight as a tensor \[V, D\], got list"),
    "device of weight": (dict(weight=torch.randn(V, D, device=OTHER)), r"weight on cpu.* got meta"),
    "DTensor": (
        dict(weight=torch.randn(V, D).as_subclass(DTensor)),
        r"weight as a plain tensor .*DTensor; call the op inside the forward",
    ),
}
BAD_ROWS = {
    "number of labels": (dict(labels=torch.zeros(N + 1, dtype=int)), r"labels \[N\] with N=4"),
    "dtype of labels": (dict(labels=torch.zeros(N)), r"int64, got torch.float32; .*long"),
    "device of labels": (dict(labels=torch.zeros(N, dtype=int, device=OTHER)), r"labels on cpu"),
    "label above": (dict(labels=torch.tensor([0, V, 1, 2])), r"labels.* \[0, 11\).* got 11"),
    "label below": (dict(labels=torch.tensor([0, -100, 1, 2])), r"labels.* got -100"),
    "negative temperature": (dict(temperature=-0.5), r"temperature > 0.* got -0.5"),
    "zero temperature": (dict(temperature=0), r"temperature > 0.* got 0"),
    "a zero temperature": (dict(temperature=torch.tensor([1.0, 0, 1, 1])), r"temperature.* got 0"),
    "number of temperatures": (dict(temperature=torch.ones(N + 1)), r"temperature \[N\]"),
    "dtype of temperature": (
        dict(temperature=torch.ones(N).double()),
        r"float32 \[N\].* torch.float64",
    ),
    "gradient of temperature": (dict(temperature=GRAD), r"requires_grad=True"),
    "zero softcap": (dict(softcap=0.0), r"softcap > 0.* got 0.0"),
    "negative softcap": (dict(softcap=-30), r"softcap > 0.* got -30"),
    "infinite softcap": (dict(softcap=float("inf")), r"softcap > 0 and finite, got inf"),
    "softcap that is no number": (dict(softcap=float("nan")), r"softcap > 0.* got nan"),
    "softcap as text": (dict(softcap="30"), r"softcap > 0 and finite, got '30'"),
    "temperature as text": (dict(temperature="1"), r"temperature > 0 and finite, got '1'"),
    "unknown impl": (dict(impl="fast"), r"impl to be one of .*'chunked'.* got 'fast'"),
}


@pytest.mark.parametrize("op", [linear_logprob, linear_logprob_entropy, linear_logprob_loss])
@pytest.mark.parametrize("name", [*BAD_HEAD, *BAD_ROWS])
def test_bad_input_of_a_head(op, name):
    change, message = {**BAD_HEAD, **BAD_ROWS}[name]
    args = {**HEAD, **change}
    if op is linear_logprob_loss:
        args["loss_fn"] = lambda logprobs, rows: logprobs.sum()
    with pytest.raises(ValueError, match=message):
        op(**args)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("name", ["label above", "label below", "a zero temperature"])
def test_bad_values_of_every_implementation(impl, name):
    change, message = BAD_ROWS[name]
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{**HEAD, **change}, impl=impl)


BAD_SCORES = {
    "token id": (dict(token_id=V), r"token_id as an int in \[0, 11\), got 11"),
    "token id tensor": (dict(token_id=torch.tensor(1)), r"token_id as an int"),
    "beta": (dict(beta=-0.1), r"beta > 0.* got -0.1"),
    "ref_logprob": (dict(ref_logprob=float("nan")), r"finite ref_logprob, got nan"),
    "ref_logprob as text": (dict(ref_logprob="auto"), r"finite ref_logprob, got auto"),
    "softcap of a score": (dict(softcap=-1.0), r"softcap > 0.* got -1.0"),
    "number of rewards": (dict(rewards=torch.ones(N + 1)), r"rewards \[N\] with N=4"),
    "rewards as a list": (dict(rewards=[1.0] * N), r"rewards as a tensor \[N\], got list"),
    "gradient of rewards": (dict(rewards=GRAD), r"rewards without gradient"),
    "device of weights": (dict(sample_weight=torch.ones(N, device=OTHER)), r"sample_weight on cpu"),
}


@pytest.mark.parametrize("name", [*BAD_HEAD, *BAD_SCORES])
def test_bad_input_of_a_score(name):
    change, message = {**BAD_HEAD, **BAD_SCORES}[name]
    head = {key: HEAD[key] for key in ("hidden_states", "weight")}
    args = dict(token_id=3, rewards=torch.ones(N), beta=0.1, ref_logprob=-23.0)
    with pytest.raises(ValueError, match=message):
        last_token_loss(**{**head, **args, **change})


@pytest.mark.parametrize("result", [1.0, torch.ones(N)])
def test_a_loss_must_be_a_scalar_tensor(result):
    head = {**HEAD, "hidden_states": HEAD["hidden_states"].clone().requires_grad_()}
    with pytest.raises(ValueError, match="loss_fn to return a scalar tensor, got"):
        linear_logprob_loss(**head, loss_fn=lambda logprobs, rows: result)


def test_a_loss_may_not_train_what_gets_no_gradient_there():
    head = {**HEAD, "hidden_states": HEAD["hidden_states"].clone().requires_grad_()}
    own = torch.ones(N, requires_grad=True)
    for tensor in (own, own * 2):
        with pytest.raises(ValueError, match="a loss_fn of logprobs alone, got another tensor"):
            linear_logprob_loss(**head, loss_fn=lambda p, rows, x=tensor: (p.exp() * x[rows]).sum())
    linear_logprob_loss(**head, loss_fn=lambda p, rows: (p * p * own.detach()[rows]).sum())


def test_reference_takes_float64():
    head = {**HEAD, "hidden_states": HEAD["hidden_states"].double()}
    head["weight"] = HEAD["weight"].double()
    assert linear_logprob(**head, impl="reference").dtype == torch.float64
    assert laser_kernels.last_impl() == "reference"


def test_auto_is_chunked_on_a_cpu():
    linear_logprob(**HEAD)
    assert laser_kernels.last_impl() == "chunked"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_cuda_without_a_gpu_says_so():
    with pytest.raises(RuntimeError, match="impl='cuda' needs tensors on an NVIDIA GPU, got cpu"):
        linear_logprob(**HEAD, impl="cuda")


def test_triton_refuses_float32(device):
    head = {name: x.to(device) for name, x in HEAD.items()}
    with pytest.raises(ValueError, match=r"bfloat16 or float16, got torch.float32; .*chunked"):
        linear_logprob(**head, impl="triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU multiplies bfloat16")
def test_the_interpreter_refuses_bfloat16():
    head = {**HEAD, "hidden_states": HEAD["hidden_states"].bfloat16()}
    with pytest.raises(ValueError, match=r"triton#11584\); use float16 on a CPU, or impl='chunk"):
        linear_logprob(**head | {"weight": HEAD["weight"].bfloat16()}, impl="triton")


def test_triton_without_a_gpu_says_so():
    """In a fresh process, because this one interprets the kernels."""
    code = (
        "import torch; from laser_kernels import linear_logprob\n"
        "h, w = torch.ones(2, 8).half(), torch.ones(3, 8).half()\n"
        "linear_logprob(h, w, torch.zeros(2, dtype=int), impl='triton')"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.path.dirname(laser_kernels.__path__[0])
    env["PYTHONPATH"] = os.pathsep.join([path, env.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "impl='triton' needs tensors on an NVIDIA GPU, got cpu" in run.stderr


def test_importing_the_package_imports_neither_triton_nor_the_trainer():
    code = (
        "import sys, laser_kernels\n"
        "assert not {'triton', 'transformers', 'laser_fast'} & sys.modules.keys()"
    )
    path = os.path.dirname(laser_kernels.__path__[0])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([path, os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_kernels_folder_is_no_package():
    """With an __init__.py it would shadow Hugging Face's `kernels`."""
    folder = os.path.dirname(laser_kernels.__path__[0])
    assert os.path.basename(folder) != "kernels" or "__init__.py" not in os.listdir(folder)
