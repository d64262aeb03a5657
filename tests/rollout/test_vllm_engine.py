"""The real engine against transformers, on the tiny model of conftest.py."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from laser_fast.config import ConfigError
from laser_fast.model.logprobs import policy_logprobs
from laser_fast.model.packing import Packer
from laser_fast.model.policy import Policy
from laser_fast.records import Prompt, Sampling
from laser_fast.stopping import StopRun, listening

pytestmark = pytest.mark.vllm
# float32, against a float64 softmax of transformers' float32 logits; a GPU may multiply in TF32.
TOLERANCE = 1e-2 if torch.cuda.is_available() else 2e-5


def make_prompts(num=6):
    # Different lengths; one ends with an EOS id, which asks for no score.
    prompts = [tuple(range(10, 12 + i)) for i in range(num - 1)] + [(20, 21, 2)]
    return [
        Prompt(prompt_id=f"p{i}", text="", prompt_ids=ids, answer="")
        for i, ids in enumerate(prompts)
    ]


def make_sampling(**changes):
    options = {"group_size": 8, "temperature": 1.0, "max_new_tokens": 32, "seed": 3}
    return Sampling(**{**options, **changes})


def pairs(groups):
    return [(group, completion) for group in groups for completion in group.completions]


@pytest.mark.parametrize("score_at", ["eos", "last"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_logprobs_and_scores_equal_transformers(engine, tiny, temperature, score_at):
    sampling = make_sampling(temperature=temperature, score_at=score_at)
    groups = engine.generate(make_prompts(), sampling)
    expected = tiny.token_logprobs(groups, temperature)
    num_scores = 0
    for (group, completion), logprobs in zip(pairs(groups), expected, strict=True):
        assert completion.rollout_logprobs == pytest.approx(logprobs, abs=TOLERANCE)
        if completion.is_finished:
            # At temperature 1, whatever the completion was drawn at.
            score = tiny.score_logprob(group, completion, score_at)
            assert completion.score_logprob == pytest.approx(score, abs=TOLERANCE)
            num_scores += 1
        else:
            assert completion.score_logprob is None
    assert num_scores > 8


def test_a_score_of_the_last_row_is_what_the_policy_reads_there(engine, tiny):
    hf = AutoModelForCausalLM.from_pretrained(tiny.path, attn_implementation="laser_torch")
    policy = Policy(hf, compute_dtype=torch.float32)
    packer = Packer(
        budget=256,
        score_token_id=tiny.score_token,
        score_at="last",
        temperature=0.7,
        device=torch.device("cpu"),
    )
    groups = engine.generate(make_prompts(), make_sampling(temperature=0.7, score_at="last"))
    read = policy_logprobs(policy, groups, packer)
    for (_, completion), (tokens, score) in zip(pairs(groups), read, strict=True):
        assert completion.rollout_logprobs == pytest.approx(tokens, abs=TOLERANCE)
        if score is None:
            assert completion.score_logprob is None
        else:
            assert completion.score_logprob == pytest.approx(score, abs=TOLERANCE)


def test_completions_keep_the_protocol(engine, tiny):
    prompts = make_prompts()
    groups = engine.generate(prompts, make_sampling(max_new_tokens=20))
    assert [group.prompt for group in groups] == prompts
    assert {len(group.completions) for group in groups} == {8}
    reasons = set()
    for _, completion in pairs(groups):
        *body, last = completion.completion_ids
        assert not set(body) & set(tiny.eos)
        assert completion.is_finished == (last in tiny.eos)
        assert completion.is_finished or len(completion.completion_ids) == 20
        assert (completion.score_logprob is not None) == completion.is_finished
        reasons.add((completion.finish_reason, last if completion.is_finished else None))
    assert {("length", None), ("stop", 2), ("stop", 3)} <= reasons


@pytest.mark.parametrize("score_at", ["last", None])
def test_score_token_and_padding_are_never_sampled(engine, tiny, score_at):
    groups = engine.generate(make_prompts(), make_sampling(group_size=40, score_at=score_at))
    drawn = [i for _, completion in pairs(groups) for i in completion.completion_ids]
    rows = torch.cat(
        [tiny.logprobs(g.prompt.prompt_ids, c.completion_ids)[:-1] for g, c in pairs(groups)]
    )
    banned = [tiny.score_token, *range(tiny.vocab, tiny.vocab + 8)]
    assert rows[:, banned].exp().sum() > 50  # this many are expected without the ban
    assert not set(drawn) & set(banned)


@pytest.mark.parametrize(("score_at", "extra"), [("eos", 1), ("last", 0)])
def test_a_score_costs_one_token_after_the_eos_and_none_before(engine, tiny, score_at, extra):
    seen = []
    run = engine._llm.generate
    engine._llm.generate = lambda *args, **options: seen.append(run(*args, **options)) or seen[-1]
    try:
        scored = engine.generate(make_prompts(), make_sampling(score_at=score_at))
        plain = engine.generate(make_prompts(), make_sampling(score_at=None))
    finally:
        engine._llm.generate = run
    with_score, without = (
        [len(output.outputs[0].token_ids) for output in outputs] for outputs in seen
    )
    for (_, completion), long, short in zip(pairs(scored), with_score, without, strict=True):
        assert short == len(completion.completion_ids)
        # A completion without an EOS is not known to be one before its last step.
        assert long == short + extra
    # Asking for the score changes nothing else.
    stripped = [dataclasses.replace(c, score_logprob=None) for _, c in pairs(scored)]
    for ours, theirs in zip(stripped, [c for _, c in pairs(plain)], strict=True):
        assert theirs.score_logprob is None
        assert ours.completion_ids == theirs.completion_ids
        assert ours.rollout_logprobs == pytest.approx(theirs.rollout_logprobs, abs=TOLERANCE)


def test_eos_in_the_last_slot_of_the_model_gets_its_score(engine, tiny):
    long = engine.generate(make_prompts(), make_sampling(group_size=24))
    group, completion = next(
        (g, c) for g, c in pairs(long) if c.is_finished and len(c.completion_ids) > 3
    )
    # Fill the window: prompt + completion + score is all that fits.
    num = len(completion.completion_ids)
    filler = random.Random(0).choices(range(10, 100), k=tiny.max_model_len - num - 1)
    prompt = Prompt(prompt_id="long", text="", prompt_ids=tuple(filler), answer="")
    found = None
    for seed in range(40):
        sampling = make_sampling(group_size=64, max_new_tokens=num, seed=seed)
        (again,) = engine.generate([prompt], sampling)
        found = next(
            (c for c in again.completions if c.is_finished and len(c.completion_ids) == num), None
        )
        if found:
            break
    assert found.score_logprob == pytest.approx(tiny.score_logprob(again, found), abs=TOLERANCE)


def test_a_completion_does_not_depend_on_its_neighbours(engine):
    together = engine.generate(make_prompts(), make_sampling())
    for prompt, expected in zip(make_prompts(), together, strict=True):
        (alone,) = engine.generate([prompt], make_sampling())
        assert [c.completion_ids for c in alone.completions] == [
            c.completion_ids for c in expected.completions
        ]
    assert len({c.completion_ids for _, c in pairs(together)}) > len(pairs(together)) // 2
    (other,) = engine.generate(make_prompts()[:1], make_sampling(seed=4))
    assert other.completions[0] != together[0].completions[0]


def test_more_prompt_tokens_than_one_forward_takes(engine, tiny):
    # 50 prompts of 140 tokens: vLLM must not sample from a prompt it has read in part.
    draw = random.Random(1)
    prompts = [
        Prompt(
            prompt_id=str(i),
            text="",
            prompt_ids=tuple(draw.choices(range(10, 99), k=140)),
            answer="",
        )
        for i in range(50)
    ]
    groups = engine.generate(prompts, make_sampling(group_size=2, max_new_tokens=8))
    for (_, completion), logprobs in zip(pairs(groups), tiny.token_logprobs(groups), strict=True):
        assert completion.rollout_logprobs == pytest.approx(logprobs, abs=TOLERANCE)


def test_no_prompts_no_groups(engine):
    assert engine.generate([], make_sampling()) == []
    assert engine.token_logprobs([], temperature=1.0) == []


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_equal_transformers(engine, tiny, temperature):
    groups = engine.generate(make_prompts(), make_sampling(group_size=3))
    found = engine.token_logprobs(groups, temperature=temperature)
    for ours, theirs in zip(found, tiny.token_logprobs(groups, temperature), strict=True):
        assert ours == pytest.approx(theirs, abs=TOLERANCE)


def test_a_tempered_reading_leaves_no_trace(engine):
    groups = engine.generate(make_prompts(), make_sampling())
    engine.token_logprobs(groups, temperature=0.3)
    assert engine.generate(make_prompts(), make_sampling()) == groups


@pytest.mark.parametrize(("score_at", "extra"), [("eos", 1), ("last", 0)])
def test_the_window_has_room_for_the_longest_prompt(engine, tiny, score_at, extra):
    room = tiny.max_model_len - 32 - extra
    prompt = Prompt(prompt_id="long", text="", prompt_ids=(9,) * room, answer="")
    [group] = engine.generate([prompt], make_sampling(score_at=score_at))
    assert all(c.is_finished or len(c.completion_ids) == 32 for c in group.completions)


def test_a_model_that_is_too_short_is_refused_by_name(tiny):
    short = dataclasses.replace(tiny)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tiny), "max_model_len", 300)
        with pytest.raises(ConfigError, match="vLLM cannot run.*max_model_len"):
            short.engine()


def test_heads_that_do_not_divide_are_refused_by_name(tmp_path, tiny, monkeypatch):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny.path)
    config.num_attention_heads = config.num_key_value_heads = 3
    config.hidden_size = 96
    config.save_pretrained(tmp_path)
    # As if a second rank shared this engine: vLLM looks at the heads before it starts anything.
    monkeypatch.setattr("torch.distributed.new_subgroups", lambda size: (None, []))
    with pytest.raises(ConfigError, match=r"vLLM cannot run.*attention heads \(3\).*\(2\)"):
        dataclasses.replace(tiny, path=tmp_path).engine(tensor_parallel=2)


def test_building_an_engine_leaves_the_random_state_alone(tiny):
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = torch.rand(3).tolist(), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    tiny.engine().close()
    assert (torch.rand(3).tolist(), random.random(), np.random.rand()) == expected


def test_an_unseeded_draw_is_its_own_and_leaves_the_random_state_alone(engine, monkeypatch):
    seeds, run = [], engine._run

    def seen_run(*given):
        seeds.append(np.random.randint(2**31))  # as the runner of a GPU does for every row
        return run(*given)

    def draw(seed, turn=1):
        groups = engine.generate(make_prompts()[::turn], make_sampling(seed=seed))
        return [c.completion_ids for _, c in pairs(groups)]

    monkeypatch.setattr(engine, "_run", seen_run)
    engine._is_seeded = False
    try:
        state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
        first, again, other = draw(1), draw(1), draw(2)
        draw(1, turn=-1)  # another chunk of an evaluation
        assert torch.equal(torch.get_rng_state(), state)
        assert np.random.get_state()[1].tolist() == numpy_state
        engine._number = 1  # another engine of the run
        elsewhere = draw(1)
    finally:
        engine._is_seeded, engine._number = True, 0
    assert first == again != other
    assert first != elsewhere != other
    assert len(set(first)) > len(first) / 2
    assert seeds[0] == seeds[1] and len({*seeds}) == 4


def test_generation_is_left_where_a_run_is_asked_to_stop(engine):
    asked = iter([False, False, True])
    steps = []
    with listening(lambda: steps.append(None) or next(asked)), pytest.raises(StopRun):
        engine.generate(make_prompts(), make_sampling())
    assert len(steps) == 3
    llm = engine._llm.llm_engine  # a run does not use it again, but other tests do
    llm.abort_request(list(llm.output_processor.request_states), internal=True)
