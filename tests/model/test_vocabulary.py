"""Which ids end a completion, and which tokens can carry the score."""

import json

import pytest
from tiny_models import make_model
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from laser_fast.config import ConfigError
from laser_fast.model.vocabulary import load_tokenizer, load_vocabulary, written_eos

SPECIAL = ["<pad>", "<end>", "<stop>", "<spare_0>", "<spare_1>"]  # ids 10 to 14
END, STOP, SPARE = 11, 12, 13


@pytest.fixture(scope="module")
def config():
    """A Llama, whose tokenizer transformers takes as the folder says it."""
    return make_model("llama").config


@pytest.fixture
def folder(tmp_path, config):
    """A function that writes a model folder without weights and returns its path."""

    def write(*, eos="<end>", pad="<pad>", model_eos=END, generation_eos=None):
        tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(10)}, unk_token="0"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
        wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=pad)
        wrapped.save_pretrained(tmp_path)
        values = {**config.to_dict(), "eos_token_id": model_eos}
        (tmp_path / "config.json").write_text(json.dumps(values))
        if generation_eos is not None:
            text = json.dumps({"eos_token_id": generation_eos})
            (tmp_path / "generation_config.json").write_text(text)
        return str(tmp_path)

    return write


def load(path, *, score_token="<spare_0>"):
    config = AutoConfig.from_pretrained(path)
    return load_vocabulary(path, score_token=score_token, model_config=config)


def test_ids(folder):
    vocabulary = load(folder())
    assert vocabulary.special.score_token_id == SPARE
    assert vocabulary.special.eos_token_ids == (END,)
    assert vocabulary.special.pad_token_id == 10
    assert vocabulary.special.vocab_size == 15  # the tokenizer's, not the model's 97
    assert vocabulary.decode((3, 4, END)) == "3 4"


def test_an_ordinary_token_carries_the_score_under_protest(folder, recwarn):
    path = folder()
    tokenizer = load_tokenizer(path)
    tokenizer.add_tokens([AddedToken("<unused0>", special=False)])  # as Gemma's are
    tokenizer.save_pretrained(path)
    for reserved in ("<spare_0>", "<unused0>"):
        load(path, score_token=reserved)
    assert not [warning for warning in recwarn if "score.token" in str(warning.message)]
    message = 'score.token: "7" is an ordinary token.* special one, such as <stop> <spare_0>'
    with pytest.warns(UserWarning, match=message):
        assert load(path, score_token="7").special.score_token_id == 7


def test_several_eos_ids(folder):
    # The model's own defaults and the tokenizer name different ends; both end a completion.
    vocabulary = load(folder(generation_eos=[STOP, 9], model_eos=[STOP, 9]))
    assert vocabulary.special.eos_token_ids == (STOP, 9, END)


def test_a_text_ends_as_the_chat_template_ends_it(folder):
    tokenizer = load_tokenizer(folder())
    assert tokenizer.chat_template is None and written_eos(tokenizer, (STOP, END)) == END
    message = "{{ messages[0].content }}"
    for end, written in (("<stop>", STOP), ("<stop><end>", END), ("{{ eos_token }}", END)):
        tokenizer.chat_template = message + end
        assert written_eos(tokenizer, (STOP, END)) == written
    assert written_eos(tokenizer, (STOP, 9)) == STOP  # its own ends no completion


def test_eos_of_the_tokenizer_alone(folder):
    assert load(folder(model_eos=None)).special.eos_token_ids == (END,)


def test_eos_of_the_model_alone(folder):
    assert load(folder(eos=None, model_eos=STOP)).special.eos_token_ids == (STOP,)


def test_eos_of_the_model_beside_silent_generation_defaults(folder, tmp_path):
    path = folder(eos=None, model_eos=STOP)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    assert load(path).special.eos_token_ids == (STOP,)


def test_without_padding_an_end_pads(folder):
    assert load(folder(pad=None)).special.pad_token_id == END


def test_no_eos_at_all(folder):
    with pytest.raises(ConfigError, match="declares no EOS token; set eos_token_id in its gen"):
        load(folder(eos=None, model_eos=None))


def test_an_eos_beyond_the_head_ends_nothing(folder, config):
    beyond = config.vocab_size
    assert load(folder(model_eos=beyond)).special.eos_token_ids == (END,)
    with pytest.raises(ConfigError, match="declares no EOS token"):
        load(folder(eos=None, model_eos=beyond))


def test_missing_score_token_suggests_reserved_ones(folder):
    with pytest.raises(ConfigError) as error:
        load(folder(generation_eos=STOP), score_token="<|vision_start|>")
    assert 'score.token: "<|vision_start|>" is not in the tokenizer' in str(error.value)
    # Neither padding nor one of the two ends.
    assert str(error.value).endswith("such as <spare_0> <spare_1>")


@pytest.mark.parametrize("score_token", ["<end>", "<stop>"])
def test_an_end_cannot_carry_the_score(folder, score_token):
    with pytest.raises(ConfigError, match="ends completions of .* such as <spare_0> <spare_1>"):
        load(folder(generation_eos=STOP), score_token=score_token)


def test_score_token_beyond_the_rows_of_the_head(folder, tmp_path, config):
    path = folder()
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "vocab_size": 12}))
    message = "has id 13, beyond the 12 rows of the model's head; .* another token$"
    with pytest.raises(ConfigError, match=message):  # <stop>, at 12, is beyond as well
        load(path)


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # of the second an empty one is made
def test_no_tokenizer(tmp_path, family):
    make_model(family).config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no usable tokenizer"):
        load(str(tmp_path))


def test_an_eos_that_the_tokenizer_does_not_have_is_refused(folder):
    with pytest.raises(ConfigError, match="id 60, which its tokenizer of 15 ids does not have"):
        load(folder(generation_eos=[60], model_eos=60))
