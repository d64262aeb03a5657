r"""A vLLM server on other GPUs as the engine: completions over HTTP, weights through its own API.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "nccl"}' \
        --logits-processors laser_fast.rollout.score_processor:SelfScoreProcessor

Every rank sends its own prompts; rank 0 alone streams weights. Seeds make requests repeatable, so
one that fails is simply sent again and no completion is lost or counted twice. Every sync gives
the server's weights a version, and completions count only if that version is still there after
them: a server that was restarted in between has forgotten the weights.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from laser_fast.config import ConfigError, RolloutConfig
from laser_fast.records import Group, Prompt, Sampling, SpecialTokens
from laser_fast.rollout.score_request import (
    EOS_TOKEN_IDS,
    SCORE_TOKEN_ID,
    VOCAB_SIZE,
    read_completion,
)
from laser_fast.rollout.server_http import Http, ServerError
from laser_fast.rollout.vllm import completion_seed
from laser_fast.rollout.weight_transfer import FileTransfer, NcclTransfer

OLDEST, NEWEST = (0, 28), (0, 32)  # the version of the weights is asked for since 0.28
# Groups in flight from one rank; the server batches them as it likes.
_MAX_REQUESTS = 64
# The distribution that is trained. What a request leaves out, the server takes from the model's
# generation_config.json.
_NEUTRAL = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class VllmServerEngine:
    """Client of one vLLM server; implements `rollout.engine.Engine`.

    Args:
        config: the `rollout` section; `server_url` is where the server listens.
        tokens: the ids that end, are banned, or carry the score.
        max_model_len: longest prompt + `config.max_new_tokens` + 1 for the score.
        timeout_s: longest wait for one answer, a group of completions or a piece of weights.

    Raises:
        ConfigError: the server cannot be reached or was not started for this, or the sampling
            needs an engine in process.
    """

    def __init__(
        self,
        config: RolloutConfig,
        tokens: SpecialTokens,
        *,
        max_model_len: int,
        timeout_s: float = 1800.0,
    ) -> None:
        self._config = config
        self._score_token_id = tokens.score_token_id
        self._eos_token_ids = tokens.eos_token_ids
        self._vocab_size = tokens.vocab_size
        self._http = Http(config.server_url, timeout_s)
        self._model = self._check_server(max_model_len)
        self._is_sender = not dist.is_initialized() or dist.get_rank() == 0
        transfer = NcclTransfer if torch.cuda.is_available() else FileTransfer
        self._transfer = transfer(self._http, config.sync_buffer_mb * 2**20)
        self._weight_version = ""

    def sync(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Rank 0 sends the weights, the others help to gather them; all wait. Collective.

        A server does not list its parameters, so a tensor that is left out stays stale in silence
        here; the agreement check after every sync finds it.

        Raises:
            ServerError: the weights did not arrive, or others generate on the server.
        """
        version = [f"laser-{uuid.uuid4().hex}"]
        if self._is_sender:
            self._transfer.send(weights)
            self._http.post("/update_weight_version", {"new_version": version[0]})
            self._forget_prefixes()
        else:
            for _ in weights:
                pass
        if dist.is_initialized():
            dist.broadcast_object_list(version)  # also the barrier
        (self._weight_version,) = version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Sample `sampling.group_size` completions of each prompt, in the order of `prompts`.

        Raises:
            ServerError: no answer after several attempts, or none that is whole and from the
                synced weights.
        """
        self._check_temperature(sampling.temperature)
        with ThreadPoolExecutor(_MAX_REQUESTS) as pool:
            groups = list(pool.map(lambda prompt: self._sample(prompt, sampling), prompts))
        self._check_weight_version()
        return groups

    def token_logprobs(self, groups: Sequence[Group], *, temperature: float) -> list[list[float]]:
        """Log-probs of held completion ids, one list each, flattened over `groups`."""
        self._check_temperature(temperature)
        held = [(g.prompt.prompt_ids, c.completion_ids) for g in groups for c in g.completions]
        with ThreadPoolExecutor(_MAX_REQUESTS) as pool:
            logprobs = list(pool.map(lambda ids: self._read(*ids), held))
        self._check_weight_version()
        return logprobs

    def sleep(self) -> None:
        """Do nothing: the server's memory is not the training's."""

    def close(self) -> None:
        """Give up what is in flight; the server stays up for whoever started it."""
        self._http.close()
        self._transfer.close()

    def _sample(self, prompt: Prompt, sampling: Sampling) -> Group:
        inline = sampling.needs_score and self._config.score != "off"
        answer = self._complete(
            prompt.prompt_ids,
            n=sampling.group_size,
            seed=completion_seed(sampling.seed, prompt.prompt_id, 0),  # vLLM adds the index
            temperature=sampling.temperature,
            max_tokens=sampling.max_new_tokens + int(inline),
            ignore_eos=True,
            stop_token_ids=[self._score_token_id, *(() if inline else self._eos_token_ids)],
            logprobs=0,
            vllm_xargs={
                SCORE_TOKEN_ID: self._score_token_id,
                EOS_TOKEN_IDS: list(self._eos_token_ids) if inline else [],
                VOCAB_SIZE: self._vocab_size,
            },
        )
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if len(choices) != sampling.group_size:
            raise ServerError(
                f"prompt {prompt.prompt_id}: expected {sampling.group_size} completions, got "
                f"{len(choices)}"
            )
        try:
            completions = tuple(
                read_completion(
                    choice["token_ids"],
                    choice["logprobs"]["token_logprobs"],
                    eos_token_ids=self._eos_token_ids,
                    max_new_tokens=sampling.max_new_tokens,
                    score_token_id=self._score_token_id if inline else None,
                )
                for choice in choices
            )
        except ValueError as error:
            raise ServerError(f"prompt {prompt.prompt_id}: {error}") from None
        return Group(prompt=prompt, completions=completions)

    def _read(self, prompt_ids: tuple[int, ...], completion_ids: tuple[int, ...]) -> list[float]:
        answer = self._complete(
            prompt_ids + completion_ids, max_tokens=1, temperature=0.0, prompt_logprobs=0
        )
        found = answer["choices"][0]["prompt_logprobs"][len(prompt_ids) :]
        return [
            position[str(token_id)]["logprob"]
            for position, token_id in zip(found, completion_ids, strict=True)
        ]

    def _complete(self, ids: Sequence[int], **fields: Any) -> dict[str, Any]:
        fields |= _NEUTRAL
        fields |= {"model": self._model, "prompt": list(ids), "return_token_ids": True}
        return self._http.post("/v1/completions", fields)

    def _forget_prefixes(self) -> None:
        answer = self._http.post("/reset_prefix_cache")
        if answer is not None and not answer["success"]:  # older versions say nothing
            raise ServerError(
                f"the server at {self._config.server_url} kept prefixes of the old weights cached: "
                "others generate on it; give the run a server of its own"
            )

    def _check_weight_version(self) -> None:
        found = self._http.get("/weight_info")["weight_version"]
        if found != self._weight_version:
            raise ServerError(
                f"the server at {self._config.server_url} holds weights {found!r} instead of "
                f"{self._weight_version!r}: it was restarted, or another run uses it"
            )

    def _check_temperature(self, temperature: float) -> None:
        if temperature != 1.0:
            raise ValueError(f"vllm_server works at temperature 1, got {temperature}")

    def _check_server(self, max_model_len: int) -> str:
        """Everything that a wrong server would show only in mid-run; its model's name."""
        url = self._config.server_url
        if self._config.temperature != 1.0:
            raise ConfigError(
                f'rollout.engine = "vllm_server" samples at temperature 1, got '
                f"rollout.temperature = {self._config.temperature:g}: a server reports log-probs "
                'of temperature 1 only; use rollout.engine = "vllm"'
            )
        if self._config.score == "request":
            raise ConfigError(
                'rollout.score = "request" needs rollout.engine = "vllm"; a server scores inline'
            )
        try:
            version = self._http.get("/version")["version"]
            (model,) = self._http.get("/v1/models")["data"][:1]
        except (ServerError, ValueError, KeyError) as error:
            raise ConfigError(f"no vLLM server answers at rollout.server_url: {error}") from None
        if not OLDEST <= tuple(map(int, version.split(".")[:2])) <= NEWEST:
            raise ConfigError(
                f"the server at {url} runs vLLM {version}, but rollout.engine = "
                f'"vllm_server" supports 0.{OLDEST[1]} to 0.{NEWEST[1]}'
            )
        if model["max_model_len"] < max_model_len:
            raise ConfigError(
                f"the server at {url} has max_model_len {model['max_model_len']}, but the longest "
                f"prompt, completion and score token need {max_model_len}; start it with "
                f"--max-model-len {max_model_len}"
            )
        try:
            self._http.get("/weight_info")
        except ValueError:
            raise ConfigError(
                f"the server at {url} takes no weights; start it with VLLM_SERVER_DEV_MODE=1"
            ) from None
        self._model = model["id"]
        self._check_processor()
        return self._model

    def _check_processor(self) -> None:
        """Ask for an EOS and see whether the score token is forced after it, with its score."""
        eos, score = self._eos_token_ids[0], self._score_token_id
        answer = self._complete(
            [eos],
            max_tokens=2,
            temperature=0.0,
            allowed_token_ids=[eos, score],
            logit_bias={str(score): -100.0},
            ignore_eos=True,
            stop_token_ids=[score],
            logprobs=0,
            vllm_xargs={SCORE_TOKEN_ID: score, EOS_TOKEN_IDS: [eos]},
        )
        (choice,) = answer["choices"]
        if choice["token_ids"] != [eos, score]:
            raise ConfigError(
                f"the server at {self._config.server_url} does not score completions; start it "
                "with --logits-processors laser_fast.rollout.score_processor:SelfScoreProcessor"
            )
        if choice["logprobs"]["token_logprobs"][-1] >= 0.0:  # that of a forced token
            raise ConfigError(
                f"the server at {self._config.server_url} reports log-probs of what is left after "
                "the logits processors; start it with --logprobs-mode raw_logprobs"
            )
