import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from laser_fast.sandbox import model as warm_start
from laser_fast.sandbox.model import encode_rows, make_sandbox_model
from laser_fast.sandbox.task import EOS_TOKEN, PAD_TOKEN, TOKENS, warm_up_rows

ROWS = [("7a*3b+4c^2=", r"a7*3=1b1+4=5c5^2=5\boxed{5}"), ("1a+1b+1c+1=", r"\boxed{4}")]


@pytest.fixture(scope="module")
def hardly_trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sandbox") / "model"
    make_sandbox_model(folder, seed=0, steps=1)
    return folder


def load(folder):
    """The model, with the attention that reads packed rows, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="laser_torch")
    return model, AutoTokenizer.from_pretrained(folder)


def test_the_folder_is_a_small_tied_qwen2_with_its_tokenizer(hardly_trained):
    model, tokenizer = load(hardly_trained)
    assert model.config.model_type == "qwen2"
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 529_920
    assert model.dtype == torch.float32
    assert len(tokenizer) == model.config.vocab_size == len(TOKENS)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    defaults = GenerationConfig.from_pretrained(hardly_trained)
    assert (defaults.eos_token_id, model.config.eos_token_id) == (eos, eos)
    assert defaults.pad_token_id == pad != eos
    # The tokenizer is still the character-level one with a Qwen2 config beside it.
    assert [TOKENS[i] for i in tokenizer(ROWS[1][1])["input_ids"]] == ["\\boxed{", "4", "}"]


def test_a_model_may_stay_untrained(tmp_path):
    make_sandbox_model(tmp_path / "model", seed=0, steps=0)
    assert load(tmp_path / "model")[0].config.vocab_size == len(TOKENS)


def test_the_seed_alone_decides_and_global_state_is_kept(tmp_path):
    torch.manual_seed(5)
    expected_draw = torch.rand(())
    weights = []
    for folder, outer_seed, seed in (("a", 5, 0), ("b", 6, 0), ("c", 5, 1)):
        torch.manual_seed(outer_seed)
        make_sandbox_model(tmp_path / folder, seed=seed, steps=1)
        if outer_seed == 5:
            assert torch.rand(()) == expected_draw
        weights.append(AutoModelForCausalLM.from_pretrained(tmp_path / folder).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(
        weights[0]["model.embed_tokens.weight"], weights[2]["model.embed_tokens.weight"]
    )


def test_seed_and_task_name_the_problems_too(tmp_path, monkeypatch):
    drawn = []

    def read_rows(model, rows, **keys):
        drawn.append(next(rows))

    monkeypatch.setattr(warm_start, "_train", read_rows)
    cases = [{"seed": 0}, {"seed": 1}, {"seed": 0, "task": "sandbox-hard"}]
    for place, case in enumerate(cases):
        make_sandbox_model(tmp_path / str(place), **case)
    assert drawn == [next(warm_up_rows(**case)) for case in cases] and len(set(drawn)) == 3


def test_labels_are_the_response_eos_and_one_pad():
    [(prompt_ids, ids)] = encode_rows(ROWS[1:])
    assert "".join(TOKENS[i] for i in prompt_ids) == ROWS[1][0]
    assert "".join(TOKENS[i] for i in ids) == ROWS[1][1] + EOS_TOKEN + PAD_TOKEN


def test_a_short_phase_learns_the_form_of_an_answer(hardly_trained, tmp_path, capfd):
    """Forty steps in, the loss of fixed rows has fallen and EOS is followed by <pad>."""
    make_sandbox_model(tmp_path / "model", seed=0, steps=40)
    assert not capfd.readouterr().err  # no bar of files
    losses, pads = [], []
    for folder in (hardly_trained, tmp_path / "model"):
        model, _ = load(folder)
        [(prompt_ids, ids)] = encode_rows(ROWS[1:])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt_ids + ids[:-1]])).logits[0]
        losses.append(cross_entropy(logits[len(prompt_ids) - 1 :], torch.tensor(ids)).item())
        pads.append(logits[-1].softmax(0)[TOKENS.index(PAD_TOKEN)].item())
    assert losses[1] < 0.5 * losses[0]
    assert pads[1] > 0.5 > pads[0]
