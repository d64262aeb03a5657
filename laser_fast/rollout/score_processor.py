"""The vLLM logits processor that lets a model score its own answer while it generates.

For a request that names a score token z_c (laser_fast/rollout/score_request.py), on raw logits l:

    l[z_c] = -inf and l[v] = -inf for v >= vocab_size     in every row
    l = -inf but for l[z_c] = 0                           in the row after an EOS

Requests that name none are untouched. vLLM reads raw log-probs before any processor, so neither
ban nor forced token changes a reported log-prob, and the forced token's own is the score:
log pi(z_c | x, y) at temperature 1, for one more decode step.

In process, a request may carry a `Tempering` for log-probs at its sampling temperature
(laser_fast/rollout/tempering.py).

vLLM has two runners with different processor interfaces; `SelfScoreProcessor` is both, so one
name serves all supported versions:
    vllm serve MODEL --logits-processors laser_fast.rollout.score_processor:SelfScoreProcessor
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor as V1Interface
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from laser_fast.rollout.score_request import (
    EOS_TOKEN_IDS,
    SCORE_TOKEN_ID,
    TEMPERING,
    VOCAB_SIZE,
)
from laser_fast.rollout.tempering import Tempering, collect, row_index

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2Interface
except ImportError:  # before 0.31 the V2 runner has none and vLLM uses V1 for custom processors
    _INTERFACES: tuple[type, ...] = (V1Interface,)
else:
    _INTERFACES = (V1Interface, V2Interface)

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig


class _Request:
    """What one request asked for."""

    def __init__(self, params: SamplingParams, model_eos_token_ids: frozenset[int]) -> None:
        asked = params.extra_args
        self.token_id = int(asked[SCORE_TOKEN_ID])
        self.vocab_size = int(asked[VOCAB_SIZE]) if VOCAB_SIZE in asked else None
        self.eos_token_ids = frozenset(asked.get(EOS_TOKEN_IDS, model_eos_token_ids))
        self.tempering: Tempering | None = asked.get(TEMPERING)
        self.output_ids: Sequence[int] = ()  # V1 only: the runner's own, growing list

    @property
    def kind(self) -> tuple[int, int | None, frozenset[int]]:
        """Rows of one kind are edited together."""
        return self.token_id, self.vocab_size, self.eos_token_ids


class SelfScoreProcessor(*_INTERFACES):
    """Forces and bans as described above; builds the variant of the runner that asks."""

    def __new__(cls, vllm_config: VllmConfig, *args: Any) -> SelfScoreProcessor:
        """Pick the runner's variant by what the runner passes."""
        # V1 passes (device, is_pin_memory), V2 passes (req_states,).
        return super().__new__(_V1Processor if len(args) == 2 else _V2Processor)

    def __init__(self, vllm_config: VllmConfig, *args: Any) -> None:
        if vllm_config.speculative_config is not None:
            raise ValueError(
                "the self-score needs one logits row per request: switch off speculation"
            )
        self._model_eos_token_ids = _model_eos_token_ids(vllm_config)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request that asks for a score it would not get, or would stop the worker.

        Raises:
            ValueError: answered with HTTP 400 by a server.
        """
        asked = sampling_params.extra_args or {}
        if SCORE_TOKEN_ID not in asked:
            return
        _check_types(asked)
        token_id = asked[SCORE_TOKEN_ID]
        scores = asked.get(EOS_TOKEN_IDS) != []
        # Needed without a score too: vLLM checks stop tokens against the model's vocabulary, which
        # is unknown here.
        stops = token_id in (sampling_params.stop_token_ids or ())
        if not stops or (scores and not sampling_params.ignore_eos):
            raise ValueError(
                f"{SCORE_TOKEN_ID} = {token_id} needs ignore_eos = true and stop_token_ids = "
                f"[{token_id}], so that generation goes one token past the EOS and stops there"
            )
        if scores and sampling_params.logprobs is None:
            raise ValueError(f"{SCORE_TOKEN_ID} needs logprobs: the score is the last token's")

    def is_argmax_invariant(self) -> bool:
        """Bans and forced tokens change what greedy decoding picks."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Learn which rows hold which requests (V1 only)."""

    def _new_request(self, params: SamplingParams) -> _Request | None:
        if SCORE_TOKEN_ID not in (params.extra_args or {}):
            return None
        return _Request(params, self._model_eos_token_ids)


class _V1Processor(SelfScoreProcessor):
    """For the V1 runner: rows are requests, and token ids are known on the host."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config)
        self._requests: dict[int, _Request] = {}  # by row

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self._requests, batch_update, self._enter)

    def apply(self, logits: Tensor) -> Tensor:
        """Edit raw logits [B, V] in place."""
        requests = self._requests.items()
        collect(
            logits, {row: (r.tempering, len(r.output_ids)) for row, r in requests if r.tempering}
        )
        for (token_id, vocab_size, eos_token_ids), rows in _by_kind(self._requests).items():
            _ban(logits, rows, token_id, vocab_size)
            forced = [
                row
                for row in rows
                if (ids := self._requests[row].output_ids) and ids[-1] in eos_token_ids
            ]
            if forced:
                logits[forced] = -torch.inf
                logits[forced, token_id] = 0.0
        return logits

    def _enter(
        self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]
    ) -> _Request | None:
        request = self._new_request(params)
        if request is not None:
            request.output_ids = output_ids
        return request


class _V2Processor(SelfScoreProcessor):
    """For the V2 runner: rows are reordered every step, and token ids stay on the device."""

    def __init__(self, vllm_config: VllmConfig, req_states: Any) -> None:
        super().__init__(vllm_config)
        self._states = req_states
        self._slots: dict[int, _Request] = {}
        self._eos: dict[frozenset[int], Tensor] = {}

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Take over a slot; slots are reused without a sign that the last request left."""
        self._slots.pop(req_idx, None)
        request = self._new_request(sampling_params)
        if request is None:
            return False
        self._slots[req_idx] = request
        return True

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Edit raw logits [B, V] in place; without speculation a row is a batch position."""
        slots = ctx.idx_mapping_np.tolist()
        requests = {row: self._slots[s] for row, s in enumerate(slots) if s in self._slots}
        # Output tokens so far; the host knows the counts, only the device knows the ids.
        num_outputs = (
            ctx.seq_lens_upper_bound_np[: len(slots)]
            - self._states.prompt_len.np[ctx.idx_mapping_np]
        ).tolist()
        tempered = {row: r.tempering for row, r in requests.items() if r.tempering}
        collect(logits, {row: (tempering, num_outputs[row]) for row, tempering in tempered.items()})
        for (token_id, vocab_size, eos_token_ids), rows in _by_kind(requests).items():
            _ban(logits, rows, token_id, vocab_size)
            # A prompt may end with an EOS id; only a generated one asks for the score.
            rows = [row for row in rows if num_outputs[row] > 0]
            if not rows or not eos_token_ids:
                continue
            if eos_token_ids not in self._eos:
                self._eos[eos_token_ids] = torch.tensor(sorted(eos_token_ids), device=logits.device)
            index = row_index(rows, logits)
            # Which rows follow an EOS is never read back: that would stall the device.
            is_forced = torch.isin(ctx.input_ids[index], self._eos[eos_token_ids])  # [n] bool
            edited = logits[index]  # a view where the index is a slice
            edited.masked_fill_(is_forced[:, None], -torch.inf)
            edited[:, token_id] = torch.where(is_forced, 0.0, -torch.inf)
            if isinstance(index, Tensor):
                logits[index] = edited
        return logits


def _check_types(asked: dict[str, Any]) -> None:
    """Refuse fields on which the logits processor would fail, and every request with it."""
    token_id = asked[SCORE_TOKEN_ID]
    if not _is_token_id(token_id):
        raise ValueError(f"{SCORE_TOKEN_ID}: expected a token id, got {token_id!r}")
    ends = asked.get(EOS_TOKEN_IDS, [])
    if not isinstance(ends, list) or not all(map(_is_token_id, ends)):
        raise ValueError(f"{EOS_TOKEN_IDS}: expected a list of token ids, got {ends!r}")
    size = asked.get(VOCAB_SIZE, token_id + 1)
    if not _is_token_id(size) or size <= token_id:
        raise ValueError(f"{VOCAB_SIZE}: expected a number above {token_id}, got {size!r}")
    if not isinstance(asked.get(TEMPERING), Tempering | None):
        raise ValueError(f"{TEMPERING} is for engines in process; leave it out")


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _by_kind(requests: dict[int, _Request]) -> dict[tuple, list[int]]:
    kinds: dict[tuple, list[int]] = {}
    for row in sorted(requests):
        kinds.setdefault(requests[row].kind, []).append(row)
    return kinds


def _ban(logits: Tensor, rows: list[int], token_id: int, vocab_size: int | None) -> None:
    index = row_index(rows, logits)
    logits[index, token_id] = -torch.inf
    if vocab_size is not None and vocab_size < logits.shape[1]:
        logits[index, vocab_size:] = -torch.inf


def _model_eos_token_ids(vllm_config: VllmConfig) -> frozenset[int]:
    """Every id that the served model's configurations call an end."""
    model_config = vllm_config.model_config
    found: set[int] = set()
    for declared in (
        model_config.try_get_generation_config().get("eos_token_id"),
        getattr(model_config.hf_text_config, "eos_token_id", None),
    ):
        if declared is not None:
            found.update(declared if isinstance(declared, list) else [declared])
    return frozenset(found)
