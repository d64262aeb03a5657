"""vLLM inside the training processes: one engine per tensor-parallel group, weights streamed in.

Under torchrun every rank builds its engine once (`external_launcher`); without torchrun it is an
ordinary engine in one process. Weights start as noise (`load_format = "dummy"`), so a tensor that
the sync misses shows in the first agreement check instead of hiding behind the base model.

    step:  wake weights -> stream every tensor -> wake KV cache -> forget cached prefixes
           -> generate -> sleep (level 2: weights and KV cache give up their memory)

Completion i of a prompt draws from its own seed, so it depends on weights, prompt and seed but
not on its neighbours or the world size (up to the rounding of batched matmuls).
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from laser_fast.config import ConfigError, RolloutConfig
from laser_fast.records import Completion, Group, Prompt, Sampling, SpecialTokens
from laser_fast.rollout.engine import draw_seed
from laser_fast.rollout.score_request import (
    EOS_TOKEN_IDS,
    SCORE_TOKEN_ID,
    TEMPERING,
    VOCAB_SIZE,
    read_completion,
)
from laser_fast.rollout.tempering import Tempering
from laser_fast.rollout.vllm_setup import first_line, import_vllm, keep_random_state
from laser_fast.rollout.weight_sync import account_for, checkpoint_names

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

PROCESSOR = "laser_fast.rollout.score_processor:SelfScoreProcessor"
# Prompt tokens of one forward: bounds the [tokens, vocabulary] logits of `token_logprobs`.
_MAX_BATCHED_TOKENS = 4096

Item = TypeVar("Item")


class VllmEngine:
    """Colocated vLLM; implements `rollout.engine.Engine`. Every rank builds one, once per run.

    Args:
        model_path: Hugging Face id or folder; only its config.json is read.
        config: the `rollout` section.
        tokens: the ids that end, are banned, or carry the score.
        max_model_len: longest prompt + `config.max_new_tokens` + 1 for the score.
        dtype: of the engine's weights and cache; "auto" is bfloat16 on a GPU, else float32.
        enforce_eager: compile nothing on a GPU: starts sooner, generates more slowly.

    Raises:
        ConfigError: vLLM is missing or of an unsupported version, or the model, the lengths or
            the parallelism do not fit; known before any weight is loaded.
    """

    def __init__(
        self,
        model_path: str,
        config: RolloutConfig,
        tokens: SpecialTokens,
        *,
        max_model_len: int,
        dtype: Literal["auto", "bfloat16", "float32"] = "auto",
        enforce_eager: bool = False,
    ) -> None:
        if max_model_len < config.max_new_tokens + 2:
            raise ConfigError(
                f"max_model_len = {max_model_len} cannot hold one prompt token, "
                f"rollout.max_new_tokens = {config.max_new_tokens} and the score token; raise it "
                f"to at least {config.max_new_tokens + 2}"
            )
        self._config = config
        self._score_token_id = tokens.score_token_id
        self._eos_token_ids = tokens.eos_token_ids
        self._vocab_size = tokens.vocab_size
        self._max_model_len = max_model_len
        self._group = _tensor_parallel_group(config.tensor_parallel)
        self._on_gpu = self._can_sleep = torch.cuda.is_available()
        self._is_asleep = False
        self._is_synced = False
        if dtype == "auto":
            dtype = "bfloat16" if self._on_gpu else "float32"
        self._llm = self._start(model_path, dtype, enforce_eager=enforce_eager)
        self._names = set(self._llm.apply_model(checkpoint_names)[0])

    def sync(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Take every state_dict entry, a tied head under both names. Collective.

        Raises:
            ValueError: names the tensors that are missing or unknown; the engine then refuses to
                generate until a complete sync.
        """
        self._is_synced = False
        # Weights before KV cache: the sync's own peak must fit where the cache will be.
        self._wake("weights")
        self._llm.collective_rpc(
            "reload_weights",
            kwargs={
                "weights_iterator": account_for(weights, self._names),
                "is_checkpoint_format": True,
            },
        )
        self._wake("kv_cache")
        self._is_asleep = False
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept prefixes of the old weights cached")
        self._is_synced = True

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Sample `sampling.group_size` completions of each prompt, in the order of `prompts`.

        Raises:
            ValueError: a prompt that does not fit with its completion and score.
        """
        self._check_ready()
        for prompt in prompts:
            self._check_fits(prompt, sampling)
        prompts, own = self._join(prompts)
        rows = [prompt for prompt in prompts for _ in range(sampling.group_size)]
        params = [
            self._sampling_params(prompt, sample, sampling)
            for prompt in prompts
            for sample in range(sampling.group_size)
        ]
        outputs = self._run([prompt.prompt_ids for prompt in rows], params)
        completions = [
            self._read(output, asked, sampling)
            for output, asked in zip(outputs, params, strict=True)
        ]
        if sampling.needs_score and self._config.score == "request":
            completions = self._request_scores(rows, completions)
        groups = [
            Group(
                prompt=prompt, completions=tuple(completions[start : start + sampling.group_size])
            )
            for prompt, start in zip(prompts, range(0, len(rows), sampling.group_size), strict=True)
        ]
        return groups[own]

    def token_logprobs(self, groups: Sequence[Group], *, temperature: float) -> list[list[float]]:
        """Log-probs of held completion ids, one list each, flattened over `groups`.

        A fresh forward of the whole sequence: vLLM computes prompt log-probs without its prefix
        cache.
        """
        self._check_ready()
        held = [(g.prompt.prompt_ids, c.completion_ids) for g in groups for c in g.completions]
        held, own = self._join(held)
        with self._logits_divided_by(temperature):
            outputs = self._run(
                [prompt_ids + completion_ids for prompt_ids, completion_ids in held],
                [self._plain_params(prompt_logprobs=0, flat_logprobs=True) for _ in held],
            )
        # The first id has no log-prob.
        return [
            output.prompt_logprobs.logprobs[len(prompt_ids) - 1 :]
            for output, (prompt_ids, _) in zip(outputs, held, strict=True)
        ][own]

    def sleep(self) -> None:
        """Give up the memory of weights and KV cache until the next `sync`."""
        if self._can_sleep and not self._is_asleep:
            self._llm.sleep(level=2)
            self._is_asleep = True
            self._is_synced = False

    def close(self) -> None:
        """Stop the engine and free its memory; the training's process group stays."""
        core = self._llm.llm_engine.engine_core.engine_core
        core.model_executor.shutdown()
        core.scheduler.shutdown()
        del self._llm, core
        gc.unfreeze()  # vLLM froze what lived at its start, itself included
        gc.collect()

    def _start(self, model_path: str, dtype: str, *, enforce_eager: bool) -> LLM:
        config = self._config
        llm_class = import_vllm().LLM
        arguments: dict[str, Any] = {
            "enforce_eager": enforce_eager or not self._on_gpu,
            "enable_sleep_mode": self._on_gpu,
        }
        if self._on_gpu:
            arguments["gpu_memory_utilization"] = config.gpu_memory_fraction
        else:
            arguments["block_size"] = 32  # the smallest that the CPU attention takes
            # vLLM cannot take back a seeded draw of a half-read prompt on a CPU.
            arguments["enable_chunked_prefill"] = False
        if "RANK" in os.environ and dist.is_initialized():
            arguments["distributed_executor_backend"] = "external_launcher"
        try:
            # vLLM seeds every global generator of the process, which belongs to the training.
            with keep_random_state():
                llm = llm_class(
                    model=model_path,
                    skip_tokenizer_init=True,
                    load_format="dummy",
                    dtype=dtype,
                    tensor_parallel_size=config.tensor_parallel,
                    max_model_len=self._max_model_len,
                    max_num_seqs=config.max_num_seqs,
                    max_num_batched_tokens=max(
                        _MAX_BATCHED_TOKENS, config.max_num_seqs, self._max_model_len
                    ),
                    enable_prefix_caching=True,
                    generation_config="vllm",  # sampling defaults are ours, not the checkpoint's
                    logprobs_mode="raw_logprobs",
                    logits_processors=[PROCESSOR],
                    seed=0,
                    **arguments,
                )
        except ValueError as error:
            raise ConfigError(f'vLLM cannot run "{model_path}": {first_line(error)}') from error
        # A collected engine would take the process group of the training with it.
        if finalizer := getattr(llm.llm_engine.engine_core, "_finalizer", None):
            finalizer.detach()
        return llm

    def _wake(self, tag: str) -> None:
        if self._is_asleep:
            self._llm.wake_up(tags=[tag])

    @contextmanager
    def _logits_divided_by(self, temperature: float) -> Iterator[None]:
        """Temper the log-probs of given tokens, to which vLLM applies no sampling temperature."""
        if temperature == 1.0:
            yield
            return

        def set_scale(model: nn.Module, scale: float | None = None) -> float:
            layer = model.logits_processor
            previous = layer.scale
            layer.scale = previous / temperature if scale is None else scale
            return previous

        (previous,) = self._llm.apply_model(set_scale)
        try:
            yield
        finally:
            self._llm.apply_model(partial(set_scale, scale=previous))

    def _check_ready(self) -> None:
        if not self._is_synced:
            raise RuntimeError("the engine holds no complete weights: call sync first")

    def _check_fits(self, prompt: Prompt, sampling: Sampling) -> None:
        needed = len(prompt.prompt_ids) + sampling.max_new_tokens + 1
        if not prompt.prompt_ids or needed > self._max_model_len:
            raise ValueError(
                f"prompt {prompt.prompt_id}: expected 1 to "
                f"{self._max_model_len - sampling.max_new_tokens - 1} ids, so that max_new_tokens "
                f"= {sampling.max_new_tokens} and the score token fit into max_model_len = "
                f"{self._max_model_len}; got {len(prompt.prompt_ids)}"
            )

    def _scores_inline(self, sampling: Sampling) -> bool:
        return sampling.needs_score and self._config.score in ("auto", "inline")

    def _sampling_params(self, prompt: Prompt, sample: int, sampling: Sampling) -> SamplingParams:
        """Parameters of one completion, `sample` of its group."""
        inline = self._scores_inline(sampling)
        asked: dict[str, Any] = {
            SCORE_TOKEN_ID: self._score_token_id,
            EOS_TOKEN_IDS: list(self._eos_token_ids) if inline else [],
            VOCAB_SIZE: self._vocab_size,
        }
        if sampling.temperature != 1.0:
            asked[TEMPERING] = Tempering(sampling.temperature)
        return import_vllm().SamplingParams(
            temperature=sampling.temperature,
            seed=completion_seed(sampling.seed, prompt.prompt_id, sample),
            max_tokens=sampling.max_new_tokens + int(inline),
            ignore_eos=True,
            stop_token_ids=[self._score_token_id, *(() if inline else self._eos_token_ids)],
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            extra_args=asked,
        )

    def _plain_params(self, **asked: Any) -> SamplingParams:
        """One greedy token that nobody reads: the log-probs asked for are the result."""
        return import_vllm().SamplingParams(
            max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False, **asked
        )

    def _read(
        self, output: RequestOutput, params: SamplingParams, sampling: Sampling
    ) -> Completion:
        (drawn,) = output.outputs
        ids, logprobs = list(drawn.token_ids), drawn.logprobs.logprobs
        completion = read_completion(
            ids,
            logprobs,
            eos_token_ids=self._eos_token_ids,
            max_new_tokens=sampling.max_new_tokens,
            score_token_id=self._score_token_id if self._scores_inline(sampling) else None,
        )
        if sampling.temperature == 1.0:
            return completion
        tempered = params.extra_args[TEMPERING].apply(completion.rollout_logprobs)
        return replace(completion, rollout_logprobs=tuple(tempered))

    def _request_scores(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> list[Completion]:
        """Score finished completions by a second request each, over their cached prefixes."""
        finished = [i for i, completion in enumerate(completions) if completion.is_finished]
        asked = self._plain_params(logprob_token_ids=[self._score_token_id])
        outputs = self._run(
            [prompts[i].prompt_ids + completions[i].completion_ids for i in finished],
            [asked] * len(finished),
        )
        scored = list(completions)
        for i, output in zip(finished, outputs, strict=True):
            score = output.outputs[0].logprobs[0][self._score_token_id].logprob
            scored[i] = replace(scored[i], score_logprob=score)
        return scored

    def _run(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        if not prompts:
            return []
        return self._llm.generate(
            [{"prompt_token_ids": list(ids)} for ids in prompts], list(params), use_tqdm=False
        )

    def _join(self, items: Sequence[Item]) -> tuple[list[Item], slice]:
        """The items of all ranks that share this engine, which must run in step; ours by slice."""
        if self._group is None:
            return list(items), slice(None)
        parts: list[list[Item]] = [[] for _ in range(dist.get_world_size(self._group))]
        dist.all_gather_object(parts, list(items), group=self._group)
        start = sum(len(part) for part in parts[: dist.get_rank(self._group)])
        return [item for part in parts for item in part], slice(start, start + len(items))


def completion_seed(seed: int, prompt_id: str, sample: int) -> int:
    """Seed of one completion: neighbours in a group are consecutive, as in vLLM's own `n`."""
    return (draw_seed(seed, prompt_id) >> 1) + sample


def _tensor_parallel_group(size: int) -> dist.ProcessGroup | None:
    """The ranks that share this rank's engine, `size` consecutive ones. Collective."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size % size:
        raise ConfigError(
            f"rollout.tensor_parallel = {size} does not divide the world size {world_size}"
        )
    if size == 1:
        return None
    ranks = [list(range(start, start + size)) for start in range(0, world_size, size)]
    group, _ = dist.new_subgroups_by_enumeration(ranks)
    return group
