"""The vLLM logits processor that lets a model score its own answer while it generates.

For a request that names a score token z_c (see score_request.py), on raw logits l:

    l[z_c] = -inf and l[v] = -inf for v >= vocab_size     in every row
    l = -inf but for l[z_c] = 0                           in the row after an EOS

Requests that name none are untouched. vLLM reads raw log-probs before any processor, so neither
ban nor forced token changes a reported log-prob, and the forced token's own is the score:
log pi(z_c | x, y) at temperature 1, for one more decode step. In process, a request may carry a
`Tempering` for log-probs at its sampling temperature.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import vllm
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor as V1Interface
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from laser_fast.rollout.score_request import (
    EOS_TOKEN_IDS,
    SCORE_TOKEN_ID,
    TEMPERING,
    VOCAB_SIZE,
    Tempering,
    collect,
    row_index,
)

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2Interface
except ImportError:  # before 0.31 the V2 runner has none and vLLM uses V1 for custom processors
    V2Interface = object

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

if not (0, 26) <= vllm.__version_tuple__[:2] <= (0, 32):  # the trainer refuses it, a server goes on
    warnings.warn(f"scores: tested with vLLM 0.26 to 0.32, got {vllm.__version__}", stacklevel=2)

# Score token, vocabulary and EOS ids of a request: rows of one kind are edited together.
_Kind = tuple[int, int | None, frozenset[int]]


@dataclass(frozen=True, slots=True)
class _Request:
    kind: _Kind
    tempering: Tempering | None
    output_ids: Sequence[int] = ()  # V1 only: the runner's own, growing list


class SelfScoreProcessor(V1Interface, V2Interface):
    """Forces and bans as described above; one name for both of vLLM's runners."""

    def __new__(cls, vllm_config: VllmConfig, *args: Any) -> SelfScoreProcessor:
        """Pick the variant by what the runner passes: V1 (device, is_pin_memory), V2 (states,)."""
        return super().__new__(_V1Processor if len(args) == 2 else _V2Processor)

    def __init__(self, vllm_config: VllmConfig, *args: Any) -> None:
        if vllm_config.speculative_config is not None:
            raise ValueError(
                "the self-score needs one logits row a request: switch off speculation"
            )
        self._model_eos_token_ids = _model_eos_token_ids(vllm_config)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse, with HTTP 400, a request that would get no score or would stop the worker."""
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

    def _parse(
        self, params: SamplingParams, _: object = None, output_ids: Sequence[int] = ()
    ) -> _Request | None:
        """What a request asks for; None if it names no score token."""
        asked = params.extra_args or {}
        if SCORE_TOKEN_ID not in asked:
            return None
        eos_token_ids = frozenset(asked.get(EOS_TOKEN_IDS, self._model_eos_token_ids))
        kind = asked[SCORE_TOKEN_ID], asked.get(VOCAB_SIZE), eos_token_ids
        return _Request(kind, asked.get(TEMPERING), output_ids)

    def _ban(
        self, logits: Tensor, requests: dict[int, _Request], num_outputs: dict[int, int]
    ) -> dict[_Kind, list[int]]:
        """Temper and ban in place; returns the rows where a score may be due, by kind."""
        drawn = {row: (r.tempering, num_outputs[row]) for row, r in requests.items() if r.tempering}
        collect(logits, drawn)
        kinds: dict[_Kind, list[int]] = {}
        for row in sorted(requests):
            kinds.setdefault(requests[row].kind, []).append(row)
        for (token_id, vocab_size, _), rows in kinds.items():
            index = row_index(rows, logits)
            logits[index, token_id] = -torch.inf
            if vocab_size is not None:
                logits[index, vocab_size:] = -torch.inf
        # A prompt may end with an EOS id; only a generated one asks for the score.
        return {k: [row for row in rows if num_outputs[row] > 0] for k, rows in kinds.items()}


class _V1Processor(SelfScoreProcessor):
    """For the V1 runner: rows are requests, and token ids are known on the host."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config)
        self._requests: dict[int, _Request] = {}  # by row

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self._requests, batch_update, self._parse)

    def apply(self, logits: Tensor) -> Tensor:
        """Edit raw logits [B, V] in place."""
        requests = self._requests
        num_outputs = {row: len(request.output_ids) for row, request in requests.items()}
        for (token_id, _, eos), rows in self._ban(logits, requests, num_outputs).items():
            forced = [row for row in rows if requests[row].output_ids[-1] in eos]
            if forced:
                logits[forced] = -torch.inf
                logits[forced, token_id] = 0.0
        return logits


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
        request = self._parse(sampling_params)
        if request is not None:
            self._slots[req_idx] = request
        return request is not None

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Edit raw logits [B, V] in place; without speculation a row is a batch position."""
        slots = ctx.idx_mapping_np
        requests = {r: self._slots[s] for r, s in enumerate(slots.tolist()) if s in self._slots}
        # Output tokens so far; the host knows the counts, only the device knows the ids.
        counts = ctx.seq_lens_upper_bound_np[: len(slots)] - self._states.prompt_len.np[slots]
        num_outputs = dict(enumerate(counts.tolist()))
        for (token_id, _, eos), rows in self._ban(logits, requests, num_outputs).items():
            if not rows or not eos:
                continue
            if eos not in self._eos:
                self._eos[eos] = torch.tensor(sorted(eos), device=logits.device)
            index = row_index(rows, logits)
            # Which rows follow an EOS is never read back: that would stall the device.
            is_forced = torch.isin(ctx.input_ids[index], self._eos[eos])  # [n] bool
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


def _model_eos_token_ids(vllm_config: VllmConfig) -> frozenset[int]:
    """Every id that the served model's configurations call an end."""
    config = vllm_config.model_config
    found = [config.try_get_generation_config().get("eos_token_id")]
    found.append(getattr(config.hf_text_config, "eos_token_id", None))
    lists = [ids if isinstance(ids, list) else [ids] for ids in found]
    return frozenset(token_id for ids in lists for token_id in ids if token_id is not None)
