"""The engine over HTTP: a real server, its weights replaced by files, and servers that fail."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from laser_fast.config import ConfigError, RolloutConfig
from laser_fast.records import Prompt, Sampling, SpecialTokens
from laser_fast.rollout import server_http
from laser_fast.rollout.engine import check_agreement
from laser_fast.rollout.server_http import Http, ServerError
from laser_fast.rollout.vllm_server import VllmServerEngine

SAMPLING = Sampling(group_size=6, temperature=1.0, max_new_tokens=24, seed=0)
PROMPTS = [
    Prompt(prompt_id=str(i), text="", prompt_ids=tuple(range(8, 12 + i)), answer="")
    for i in range(5)
]


def connect(url, served, **changes):
    rollout = {"engine": "vllm_server", "server_url": url, "max_new_tokens": 24, "timeout_s": 60.0}
    return VllmServerEngine(RolloutConfig(**rollout | changes), served.tokens, max_model_len=64)


def url_of(server):
    return f"http://127.0.0.1:{server.server_address[1]}"


def probe_reply(ids, logprobs):
    choice = {"token_ids": ids, "logprobs": {"token_logprobs": logprobs}}
    return 200, json.dumps({"choices": [choice]})


def completions(groups):
    return [c for group in groups for c in group.completions]


@pytest.fixture
def served_ids():
    """The ids of the served model, for servers that only pretend."""
    tokens = SpecialTokens(score_token_id=2, eos_token_ids=(1,), pad_token_id=0, vocab_size=33)
    return SimpleNamespace(tokens=tokens)


@pytest.fixture(scope="module")
def other(tmp_path_factory, served):
    return type(served).make(tmp_path_factory.mktemp("served-other"), seed=1)


@pytest.mark.vllm
@pytest.mark.slow
def test_the_server_samples_from_the_synced_weights(server, served, other):
    engine = connect(server[0], served, sync_buffer_mb=1)
    for policy in (other, served):
        engine.sync(policy.weights())
        groups = engine.generate(PROMPTS, SAMPLING)
        assert [group.prompt for group in groups] == PROMPTS
        expected = policy.token_logprobs(groups)
        rollout = [c.rollout_logprobs for c in completions(groups)]
        assert check_agreement(rollout, expected) < 1e-5
        assert check_agreement(engine.token_logprobs(groups, temperature=1.0), expected) < 1e-5
        finished = [(g, c) for g in groups for c in g.completions if c.is_finished]
        assert len(finished) > 2
        for group, completion in finished:
            score = policy.score_logprob(group, completion)
            assert completion.score_logprob == pytest.approx(score, abs=2e-5)
        for completion in completions(groups):
            assert served.score_token not in completion.completion_ids
            assert max(completion.completion_ids) < served.vocab
    assert engine.generate(PROMPTS, SAMPLING) == groups  # the same draw, so a retry is harmless
    plain, last = (
        engine.generate(PROMPTS, replace(SAMPLING, score_at=score_at))
        for score_at in (None, "last")
    )
    for other_way in (plain, last):
        assert [c.completion_ids for c in completions(other_way)] == [
            c.completion_ids for c in completions(groups)
        ]
    assert {c.score_logprob for c in completions(plain)} == {None}
    for group in last:
        for completion in group.completions:
            score = None
            if completion.is_finished:
                score = pytest.approx(served.score_logprob(group, completion, "last"), abs=2e-5)
            assert completion.score_logprob == score
    engine.sleep()
    engine.close()
    with pytest.raises(ServerError, match="was closed"):
        engine.generate(PROMPTS, SAMPLING)


@pytest.mark.vllm
@pytest.mark.slow
def test_samples_are_of_the_policy_whatever_defaults_the_model_has(server, served):
    # E[-log p(y)] over y ~ p is the entropy of p, at every token: a sum of martingale differences.
    engine = connect(server[0], served)
    engine.sync(served.weights())
    total = variance = 0.0
    for group in engine.generate(PROMPTS, replace(SAMPLING, group_size=32)):
        for completion in group.completions:
            ids = torch.tensor(completion.completion_ids)
            logits = served.logprobs(group.prompt.prompt_ids, completion.completion_ids)[:-1]
            logits[:, [served.score_token, *range(served.vocab, logits.shape[1])]] = -1e9
            logprobs = logits.log_softmax(-1)
            probs = logprobs.exp()
            entropy = -(probs * logprobs).sum(-1)
            total += (-logprobs.gather(1, ids[:, None])[:, 0] - entropy).sum().item()
            variance += ((probs * logprobs**2).sum(-1) - entropy**2).sum().item()
    assert abs(total) < 3.5 * variance**0.5


@pytest.mark.vllm
@pytest.mark.slow
def test_a_restarted_server_is_noticed(server, served):
    engine = connect(server[0], served)
    engine.sync(served.weights())
    engine.generate(PROMPTS[:1], SAMPLING)
    connect(server[0], served).sync(served.weights())  # someone else's weights, or the first ones
    with pytest.raises(ServerError, match="restarted, or another run uses it"):
        engine.generate(PROMPTS[:1], SAMPLING)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.7}, "samples at temperature 1, got rollout.temperature = 0.7"),
        ({"server_url": "http://127.0.0.1:9"}, "no vLLM server answers at rollout.server_url"),
    ],
)
def test_what_a_server_cannot_do_is_refused_at_the_start(server, served, changes, message):
    with pytest.raises(ConfigError, match=message):
        connect(server[0], served, **changes)


@pytest.mark.vllm
@pytest.mark.slow
def test_a_window_that_is_too_short_is_refused_at_the_start(server, served):
    with pytest.raises(ConfigError, match="--max-model-len 1000"):
        VllmServerEngine(
            RolloutConfig(engine="vllm_server", server_url=server[0]),
            served.tokens,
            max_model_len=1000,
        )


@pytest.mark.vllm
@pytest.mark.slow
def test_a_server_that_dies_stops_the_run_with_a_sentence(server, served):
    # Last of those that share the server: it takes it down.
    base_url, process = server
    engine = connect(base_url, served)
    engine.sync(served.weights())
    process.terminate()
    process.wait(60)
    with pytest.raises(ServerError, match="did not answer in 3 attempts.*resume from the last"):
        engine.generate(PROMPTS, SAMPLING)


@pytest.mark.parametrize(
    ("page", "reply", "message"),
    [
        ("/version", (200, '{"version": "0.27.1"}'), r"runs vLLM 0\.27\.1.*supports 0\.28 to"),
        ("/version", (200, "{}"), "no vLLM server answers"),
        ("/weight_info", (404, ""), "takes no weights; start it with VLLM_SERVER_DEV_MODE=1"),
    ],
)
def test_a_server_that_was_not_started_for_training_is_refused(
    scripted, served_ids, page, reply, message
):
    server, _ = scripted
    server.pages[page] = reply
    with pytest.raises(ConfigError, match=message):
        connect(f"http://127.0.0.1:{server.server_address[1]}", served_ids)


def test_a_server_that_does_not_score_is_refused(scripted, served_ids):
    server, _ = scripted
    server.replies = [probe_reply([1, 1], [-0.5, -0.5])]
    with pytest.raises(ConfigError, match="start it with --logits-processors laser_fast.rollout"):
        connect(url_of(server), served_ids)


def test_a_server_that_reports_processed_logprobs_is_refused(scripted, served_ids):
    server, _ = scripted
    server.replies = [probe_reply([1, 2], [-0.5, 0.0])]
    with pytest.raises(ConfigError, match="start it with --logprobs-mode raw_logprobs"):
        connect(url_of(server), served_ids)


@pytest.mark.skipif(torch.cuda.is_available(), reason="sends by NCCL there")
@pytest.mark.parametrize("reply", ["", '{"success": true}', '{"success": false}'])
def test_prefixes_of_old_weights_that_stay_cached_are_an_error(scripted, served_ids, reply):
    server, _ = scripted
    server.replies = [probe_reply([1, 2], [-0.5, -7.0])]
    engine = connect(url_of(server), served_ids)
    server.replies = [(200, '{"results": [null]}'), (200, "{}"), (200, reply)]
    if "false" in reply:
        with pytest.raises(ServerError, match="kept prefixes of the old weights"):
            engine.sync(iter([("w", torch.zeros(1))]))
    else:
        engine.sync(iter([("w", torch.zeros(1))]))
    assert server.posted[-1] == "/reset_prefix_cache?reset_external=true"


def test_an_aborted_completion_is_the_servers_failure(scripted, served_ids):
    server, _ = scripted
    server.replies = [probe_reply([1, 2], [-0.5, -7.0])]
    engine = connect(url_of(server), served_ids)
    choice = {"index": 0, "finish_reason": "abort", "token_ids": [9, 9]}
    choice["logprobs"] = {"token_logprobs": [-1.0, -1.0]}
    server.replies = [(200, json.dumps({"choices": [choice]}))]
    with pytest.raises(ServerError, match="prompt 0: expected an EOS or 24 tokens, got 2 "):
        engine.generate(PROMPTS[:1], replace(SAMPLING, group_size=1))


def test_a_request_that_fails_does_not_wait_for_the_others(scripted, served_ids):
    server, _ = scripted
    server.replies = [probe_reply([1, 2], [-0.5, -7.0])]
    engine = connect(url_of(server), served_ids)
    server.replies = [(400, "bad prompt"), *[("late", "")] * 4]
    started = time.monotonic()
    with pytest.raises((ServerError, ValueError)):
        engine.generate(PROMPTS, SAMPLING)
    assert time.monotonic() - started < 8  # the late ones hang up after 10 s, and are sent again


def test_a_failed_request_is_sent_again(scripted):
    server, client = scripted
    server.replies = [(None, ""), (500, "busy"), (200, '{"answer": 1}'), (200, '{"answer": 2}')]
    assert client.post("/x", {"a": 1}) == {"answer": 1}
    assert server.replies == [(200, '{"answer": 2}')]


def test_an_empty_answer_is_none(scripted):
    server, client = scripted
    server.replies = [(200, "")]
    assert client.post("/x") is None


@pytest.mark.parametrize("status", [400, 307])
def test_a_refused_request_is_not_sent_again(scripted, status):
    server, client = scripted
    server.replies = [(status, "bad prompt"), (200, "{}")]
    with pytest.raises(ValueError, match=f"refused: {status} bad prompt"):
        client.post("/x", {})
    assert len(server.replies) == 1


def test_a_server_that_answers_late_is_given_up(scripted):
    server, _ = scripted
    client = Http(url_of(server), timeout_s=0.5)
    server.replies = [("late", "")] * 3
    with pytest.raises(ServerError, match=r"1 attempts of up to 0\.5 s: .*timed out"):
        client.post("/x", {})
    assert len(server.replies) == 2


def test_closing_ends_the_pause_before_another_attempt(scripted, monkeypatch):
    server, client = scripted
    monkeypatch.setattr(server_http, "_PAUSE_S", 60.0)
    server.replies = [(503, "starting")] * 3
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.post, "/x")
        while len(server.replies) == 3:
            time.sleep(0.01)
        time.sleep(0.2)
        assert not waiting.done()
        client.close()
        with pytest.raises(ServerError, match="was closed"):
            waiting.result(60)
    assert len(server.replies) == 2


def test_the_path_of_the_url_and_the_query_are_kept(scripted):
    server, _ = scripted
    server.pages["/proxy/x?a=1"] = (200, "7")
    assert Http(url_of(server) + "/proxy/", timeout_s=5).get("/x?a=1") == 7


def test_closing_hangs_up_on_what_is_in_flight(scripted):
    server, _ = scripted
    client = Http(f"http://127.0.0.1:{server.server_address[1]}", timeout_s=60)
    server.replies = [("late", "")] * 4
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(client.post, "/x") for _ in range(3)]
        while len(server.replies) > 1:
            time.sleep(0.01)
        client.close()
        for request in waiting:
            with pytest.raises(ServerError, match="was closed"):
                request.result(60)
    with pytest.raises(ServerError, match="was closed"):
        client.get("/version")
    assert len(server.replies) == 1  # nothing was sent again


def test_what_must_not_happen_twice_is_tried_once(scripted):
    server, client = scripted
    server.replies = [(503, "no"), (200, "{}")]
    with pytest.raises(ServerError, match="1 attempts"):
        client.post("/x", {}, attempts=1)
    assert len(server.replies) == 1


def test_the_key_of_the_environment_opens_the_server(scripted, monkeypatch):
    server, _ = scripted
    Http(url_of(server), timeout_s=60).get("/version")
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    http = Http(url_of(server), timeout_s=60)
    http.get("/version")
    server.replies = [(200, ""), (401, "no")]
    http.post("/v1/completions")
    with pytest.raises(ValueError, match="refused: 401") as refused:
        http.post("/v1/completions")
    assert server.keys == [None, *["Bearer secret"] * 3]
    assert "secret" not in str(refused.value)


def test_the_own_address_is_that_on_the_way_to_the_server(scripted, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert scripted[1].own_address() == "127.0.0.1"


@pytest.mark.parametrize("seeded", [True, False])
def test_requests_have_seeds_unless_they_are_not_wanted(scripted, served_ids, seeded):
    server, _ = scripted
    tokens = served_ids.tokens
    choice = {"index": 0, "token_ids": [5, 1, 2], "logprobs": {"token_logprobs": [-1.0] * 3}}
    probe = probe_reply([tokens.eos_token_ids[0], tokens.score_token_id], [0.0, -3.0])
    server.replies = [probe, (200, json.dumps({"choices": [choice]}))]
    engine = connect(url_of(server), served_ids, seeded=seeded)
    engine._weight_version = "0"
    engine.generate(PROMPTS[:1], replace(SAMPLING, group_size=1))
    assert ("seed" in server.bodies[-1]) == seeded
