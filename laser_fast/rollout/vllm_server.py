r"""A vLLM server on other GPUs as the engine: completions over HTTP, weights through its own API.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "nccl"}' \
        --logits-processors laser_fast.rollout.score_processor:SelfScoreProcessor

Every rank sends its own prompts; only rank 0 streams weights: by NCCL between GPUs, while the
server learns names and shapes over HTTP. vLLM moves no tensors between CPU processes; there
its workers reload a folder of safetensors.

Seeds make requests repeatable, so one that fails is simply sent again and no completion is lost or
counted twice. Every sync gives the server's weights a version, and completions count only if that
version is still there after them: a server that was restarted in between has forgotten the weights.
"""

import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from laser_fast.config import ConfigError, RolloutConfig
from laser_fast.records import Completion, Group, Prompt, Sampling, SpecialTokens
from laser_fast.rollout.engine import CopyingEngine, completion_seed
from laser_fast.rollout.score_request import PROCESSOR, parse_completion, request_fields
from laser_fast.rollout.server_http import Http, ServerError
from laser_fast.rollout.vllm import import_vllm
from laser_fast.stopping import poll_until_done

OLDEST, NEWEST = (0, 28), (0, 32)  # the version of the weights is asked for since 0.28
# Groups in flight from one rank; the server batches them as it likes.
_MAX_REQUESTS = 64
# What a request leaves out, the server takes from the model's generation_config.json.
_NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}

Item = TypeVar("Item")
Answer = TypeVar("Answer")
Weights = Iterable[tuple[str, Tensor]]


class VllmServerEngine(CopyingEngine):
    """Client of one vLLM server, whose memory is not the training's.

    A ConfigError says that the server cannot be reached or was not started for this, or that the
    sampling needs an engine in process.
    """

    def __init__(
        self,
        config: RolloutConfig,
        tokens: SpecialTokens,
        *,
        max_model_len: int,  # longest prompt + config.max_new_tokens, and 1 for a score token
    ) -> None:
        if {config.temperature, config.eval_temperature or 1.0} != {1.0}:
            raise ConfigError(
                'rollout.engine = "vllm_server" samples at temperature 1, got '
                f"rollout.temperature = {config.temperature:g} and rollout.eval_temperature = "
                f"{config.eval_temperature or config.temperature:g}: a server reports log-probs of "
                'temperature 1 only; use rollout.engine = "vllm"'
            )
        self._url, self._is_seeded = config.server_url, config.seeded
        self._tokens = tokens
        self._http = Http(self._url, config.timeout_s)
        self._model = self._check_server(max_model_len)
        self._check_processor()
        transfer = NcclTransfer if torch.cuda.is_available() else FileTransfer
        self._transfer: FileTransfer | NcclTransfer | None
        self._transfer = transfer(self._http, config.sync_buffer_mb * 2**20)
        self._weight_version = ""

    def sync(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Rank 0 sends the weights, the others help to gather them; all wait. Collective.

        A server does not list its parameters, so a tensor that is left out stays stale in silence
        here; the agreement check after every sync finds it.
        """
        version = [f"laser-{uuid.uuid4().hex}"]
        if not dist.is_initialized() or dist.get_rank() == 0:
            assert self._transfer is not None, "the engine was closed"
            self._transfer.send(weights)
            self._http.post("/update_weight_version", {"new_version": version[0]})
            answer = self._http.post("/reset_prefix_cache?reset_external=true")  # offloaded, too
            if answer is not None and not answer["success"]:  # older versions say nothing
                raise ServerError(
                    f"the server at {self._url} kept prefixes of the old weights cached: others "
                    "generate on it; give the run a server of its own"
                )
        else:
            for _ in weights:
                pass
        if dist.is_initialized():
            dist.broadcast_object_list(version)  # also the barrier
        (self._weight_version,) = version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Sample the completions of each prompt."""
        assert sampling.temperature == 1.0
        return self._ask(partial(self._sample, sampling), prompts)

    def token_logprobs(self, groups: Sequence[Group], *, temperature: float) -> list[list[float]]:
        """Log-probs of given completion ids."""
        assert temperature == 1.0
        given = [(g.prompt.prompt_ids, c.completion_ids) for g in groups for c in g.completions]
        return self._ask(lambda ids: self._read(*ids), given)

    def close(self) -> None:
        """Give up what is in flight; the server stays up for those who started it."""
        self._http.close()
        self._transfer = None

    def _ask(self, answer: Callable[[Item], Answer], items: Sequence[Item]) -> list[Answer]:
        """The answers to all items, if all came from the synced weights."""
        with ThreadPoolExecutor(_MAX_REQUESTS) as pool:
            futures = [pool.submit(answer, item) for item in items]
            try:
                poll_until_done(futures)
            except BaseException:  # nobody asks again, and the rest is not worth a wait
                pool.shutdown(wait=False, cancel_futures=True)
                self._http.close()
                raise
            answers = [future.result() for future in futures]
        found = self._http.get("/weight_info")["weight_version"]
        if found != self._weight_version:
            raise ServerError(
                f"the server at {self._url} holds weights {found!r} instead of "
                f"{self._weight_version!r}: it was restarted, or another run uses it"
            )
        return answers

    def _sample(self, sampling: Sampling, prompt: Prompt) -> Group:
        fields, vllm_xargs = request_fields(self._tokens, sampling)
        seed = completion_seed(sampling.seed, prompt.prompt_id, 0)  # vLLM adds the index
        fields |= {"n": sampling.group_size, "vllm_xargs": vllm_xargs}
        fields |= {"logprobs": 0, "return_tokens_as_token_ids": True}
        fields |= {"seed": seed} if self._is_seeded else {}
        choices = sorted(self._complete(prompt.prompt_ids, **fields), key=lambda c: c["index"])
        try:
            if len(choices) != sampling.group_size:
                raise ValueError(f"expected {sampling.group_size} completions, got {len(choices)}")
            completions = [self._parse(choice, sampling) for choice in choices]
        except ValueError as error:
            raise ServerError(f"prompt {prompt.prompt_id}: {error}") from None
        return Group(prompt=prompt, completions=tuple(completions))

    def _parse(self, choice: dict[str, Any], sampling: Sampling) -> Completion:
        found = choice["logprobs"]
        logprobs = scores = found["token_logprobs"]
        if sampling.score_at == "last":
            name = f"token_id:{self._tokens.score_token_id}"
            scores = [at[name] for at in found["top_logprobs"]]
        return parse_completion(choice["token_ids"], logprobs, scores, self._tokens, sampling)

    def _read(self, prompt_ids: tuple[int, ...], completion_ids: tuple[int, ...]) -> list[float]:
        (choice,) = self._complete(
            prompt_ids + completion_ids, max_tokens=1, temperature=0.0, prompt_logprobs=0
        )
        found = choice["prompt_logprobs"][len(prompt_ids) :]
        return [at[str(i)]["logprob"] for at, i in zip(found, completion_ids, strict=True)]

    def _complete(self, ids: Sequence[int], **fields: Any) -> list[dict[str, Any]]:
        """The choices of one completion request."""
        fields |= _NEUTRAL
        fields |= {"model": self._model, "prompt": list(ids), "return_token_ids": True}
        return self._http.post("/v1/completions", fields)["choices"]

    def _check_server(self, needed: int) -> str:
        """Everything that a wrong server would show only in mid-run; its model's name."""
        try:
            version = self._http.get("/version")["version"]
            (model,) = self._http.get("/v1/models")["data"][:1]
        except (ServerError, ValueError, KeyError) as error:
            raise ConfigError(f"no vLLM server answers at rollout.server_url: {error}") from None
        if not OLDEST <= tuple(map(int, version.split(".")[:2])) <= NEWEST:
            raise ConfigError(
                f"the server at {self._url} runs vLLM {version}, but rollout.engine = "
                f'"vllm_server" supports 0.{OLDEST[1]} to 0.{NEWEST[1]}'
            )
        if model["max_model_len"] < needed:
            fault = f"has max_model_len {model['max_model_len']}, but the longest prompt with its "
            fault += f"completion and score needs {needed}"
            raise self._unfit(f"--max-model-len {needed}", fault)
        try:
            self._http.get("/weight_info")
        except ValueError:
            raise self._unfit("VLLM_SERVER_DEV_MODE=1", "takes no weights") from None
        return model["id"]

    def _check_processor(self) -> None:
        """Ask for an EOS and see whether the score token is forced after it, with its score."""
        eos, score = self._tokens.eos_token_ids[0], self._tokens.score_token_id
        probe = Sampling(group_size=1, temperature=0.0, max_new_tokens=1, seed=0)
        fields, vllm_xargs = request_fields(self._tokens, probe)
        fields |= {"allowed_token_ids": [eos, score], "logit_bias": {str(score): -100.0}}
        (choice,) = self._complete([eos], vllm_xargs=vllm_xargs, **fields)
        if choice["token_ids"] != [eos, score]:
            raise self._unfit(f"--logits-processors {PROCESSOR}", "does not score completions")
        if choice["logprobs"]["token_logprobs"][-1] >= 0.0:  # that of a forced token
            fault = "reports log-probs of what is left after the logits processors"
            raise self._unfit("--logprobs-mode raw_logprobs", fault)

    def _unfit(self, option: str, fault: str) -> ConfigError:
        return ConfigError(f"the server at {self._url} {fault}; start it with {option}")


def pieces(weights: Weights, buffer_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Consecutive weights in lists of at most `buffer_bytes`, or of one larger tensor."""
    piece: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in weights:
        if piece and size + tensor.nbytes > buffer_bytes:
            yield piece
            piece, size = [], 0
        piece.append((name, tensor))
        size += tensor.nbytes
    if piece:
        yield piece


class FileTransfer:
    """Weights through a temporary folder that the server can read."""

    def __init__(self, http: Http, buffer_bytes: int) -> None:
        self._http, self._buffer_bytes = http, buffer_bytes

    def send(self, weights: Weights) -> None:
        """Write every piece to a file and let the server's workers load the folder."""
        from safetensors.torch import save_file

        with tempfile.TemporaryDirectory(prefix="laser-weights-") as folder:
            for number, piece in enumerate(pieces(weights, self._buffer_bytes)):
                # Copies, since a tied head shares its memory and safetensors refuses that.
                tensors = {name: tensor.to("cpu", copy=True) for name, tensor in piece}
                save_file(tensors, f"{folder}/model-{number:05d}.safetensors")
            call = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
            self._http.post("/collective_rpc", call)


class NcclTransfer:
    """Weights by NCCL broadcast from this process, rank 0, to every worker of the server."""

    def __init__(self, http: Http, buffer_bytes: int) -> None:
        # Without it, opening the group would wait minutes for workers that never come.
        if not http.get("/server_info?config_format=json")["vllm_config"]["weight_transfer_config"]:
            raise ConfigError(
                "the server at rollout.server_url takes no weights by NCCL; start it with "
                """--weight-transfer-config '{"backend": "nccl"}'"""
            )
        self._http, self._buffer_bytes = http, buffer_bytes
        self._group: Any = None

    def send(self, weights: Weights) -> None:
        """Announce each piece over HTTP and broadcast it while the server receives."""
        if self._group is None:
            self._group = self._connect()
        self._http.post("/start_weight_update", attempts=1)
        for piece in pieces(weights, self._buffer_bytes):
            names, tensors = zip(*piece, strict=True)
            described = {
                "names": names,
                "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
                "shapes": [list(tensor.shape) for tensor in tensors],
            }
            with self._meanwhile("/update_weights", {"update_info": described}) as request:
                stream = torch.cuda.current_stream()
                for tensor in tensors:
                    self._group.broadcast(tensor.contiguous(), src=0, stream=stream)
                sent = torch.cuda.Event()
                sent.record(stream)
                while not sent.query():
                    if request.done():
                        request.result()  # after a failure there nobody receives: never wait here
                    time.sleep(1e-3)
        self._http.post("/finish_weight_update", attempts=1)

    def _connect(self) -> Any:
        """Open a group of this process and the server's workers, which wait for each other."""
        import_vllm()
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        with socket.socket() as probe:
            probe.bind(("", 0))
            meeting = {
                "master_address": self._http.own_address(),
                "master_port": probe.getsockname()[1],
                "world_size": 1 + self._http.get("/get_world_size")["world_size"],
            }
        theirs = meeting | {"rank_offset": 1, "packed": False}
        with self._meanwhile("/init_weight_transfer_engine", {"init_info": theirs}):
            return trainer_init(meeting)

    @contextmanager
    def _meanwhile(self, path: str, fields: dict[str, Any]) -> Iterator[Future[Any]]:
        """Post in the background: both sides meet inside the same NCCL calls."""
        pool = ThreadPoolExecutor(1)
        request = pool.submit(self._http.post, path, fields, attempts=1)
        pool.shutdown(wait=False)  # after a failure here the other side would wait forever
        try:
            yield request
        except Exception:
            if request.done():
                request.result()  # if the server failed, it says why
            raise
        request.result()
