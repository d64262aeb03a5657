"""Predicted times of the ops against their targets, for the 7B head: what they launch, summed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil
from typing import NamedTuple

from torch import Tensor

from bench import cost, offline
from bench.compiled import ROWS, code_of, is_gemm, label, triton_kernel
from bench.cost import CARDS, JUDGEMENTS, Card, Judgement, Kernel
from bench.offline import SHAPE, Launch, Op, launches, size

FEW_ROWS = (128, 256, 512, 1024)


class Predictor:
    """Times of ops; every kernel is compiled once."""

    def __init__(self, cuda: dict[str, Kernel]) -> None:
        self.cuda = cuda
        self.triton: dict[str, Kernel] = {}
        self.calls: dict[tuple, list[Launch]] = {}

    def parts(self, op: Op, N: int, impl: str, card: Card, guess: Judgement) -> dict[str, float]:
        """Milliseconds of one call by cause."""
        key = (op, N, impl)
        if key not in self.calls:
            self.calls[key] = launches(op, 90, N, impl=impl)
        return cost.total(self._times(self.calls[key], card, guess))

    def _times(
        self, calls: Sequence[Launch], card: Card, guess: Judgement
    ) -> Iterator[dict[str, float]]:
        done = set()
        for launch in calls:
            yield {"launches": guess.launch_us / 1e3}
            partials = launch.arguments.get(
                "partials_ptr", launch.arguments.get("args", [None])[-1]
            )
            # The pass for rows that overflowed finds none.
            key = (launch.name, id(partials))
            if partials is not None and key in done:
                continue
            done.add(key)
            if launch.kind == "csrc" or is_gemm(launch):
                kernel, out = self._kernel(launch), launch.arguments
                N, (V, D) = len(_matrix(out["hidden"])), _matrix(out["weight"]).shape
                written = sum(size(out.get(name)) for name in ("kept", "out")) + size(partials)
                yield kernel.milliseconds(N, V, D, written, guess, card)
            elif launch.kind == "gemm":
                sizes = launch.arguments
                ms = cost.library_gemm(sizes, launch.num_bytes, guess, card)
                floor = 2e3 * sizes["m"] * sizes["n"] * sizes["k"] / card.gemm
                yield {"GEMM": min(floor, ms), "library GEMMs": ms - min(floor, ms)}
            elif launch.kind == "triton":
                yield {launch.name.removesuffix("_kernel"): small_kernel(launch, card, guess)}
            else:
                # Those of a few bytes a row are not worth a name.
                name = launch.name if launch.num_bytes > 5e7 else "other operators"
                yield {name: 1e3 * launch.num_bytes / card.copy}

    def _kernel(self, launch: Launch) -> Kernel:
        if launch.kind == "triton":
            name = label(launch)
            if name not in self.triton:
                self.triton[name] = triton_kernel(launch, code_of(launch))
            return self.triton[name]
        if launch.name == "statistics_few":
            B = len(launch.arguments["hidden"])
            keep = " keep" if "out" in launch.arguments else ""
            return self.cuda[
                f"last_token_kernel bfloat16 B {16 if B <= 16 else 64 if B <= 64 else 128}{keep}"
            ]
        kept = "kept" if "out" in launch.arguments else "none"
        return self.cuda[f"head_kernel bfloat16 {'dlogits' if launch.name == 'dlogits' else kept}"]


def small_kernel(launch: Launch, card: Card, guess: Judgement) -> float:
    """Milliseconds of a kernel that is limited by memory: by bytes, or by a chain of loads."""
    arguments = launch.arguments
    if launch.name == "_scale_kernel":
        return 0.0  # the upstream of loss.backward() is 1, where it leaves at once
    # One row of W for every row of H.
    sizes = {k: size(v) for k, v in arguments.items()}
    if "weight_ptr" in sizes:
        sizes["weight_ptr"] = sizes["hidden_ptr"]
    chain = ceil(arguments["D"] / arguments["BLOCK_D"]) if "BLOCK_D" in arguments else 1
    if "cp.async" in launch.compiled.asm["ptx"]:
        chain /= launch.compiled.metadata.num_stages - 1
    return max(1e3 * sum(sizes.values()) / card.copy, chain * cost.MEMORY_LATENCY_MS)


def _matrix(x: object) -> Tensor:
    return x if isinstance(x, Tensor) else x.base


class Prediction(NamedTuple):
    """A target: its name in bench/targets.py, its limit, the ops and what bounds each."""

    target: str
    limit: float
    num_rows: int
    ops: tuple[tuple[Op, tuple[int, int]], ...]  # an op; GEMMs and passes over W of its bound


FORWARD, BOTH = (1, 1), (3, 3)
PREDICTIONS = (
    Prediction(
        "linear_logprob_loss fwd+bwd, 7B head, N 8192, over three bare GEMMs",
        1.08,
        ROWS,
        ((offline.loss, (3, 0)),),
    ),
    Prediction(
        "scoring, 7B head, N 8192, over one bare GEMM", 1.10, ROWS, ((offline.scoring, (1, 0)),)
    ),
    Prediction(
        "last_token_loss fwd, 7B head, B 64, over reading W once",
        1.25,
        64,
        ((offline.last_token, (0, 1)),),
    ),
    Prediction(
        "last_token_loss fwd+bwd, 7B head, B 64, over its memory floor",
        1.35,
        64,
        ((offline.last_token_both, (0, 3)),),
    ),
    *(
        Prediction(
            f"last_token_loss, 7B head, B {num_rows}, over the slower of W's stream and GEMMs",
            1.30,
            num_rows,
            ((offline.last_token, FORWARD), (offline.last_token_both, BOTH)),
        )
        for num_rows in FEW_ROWS
    ),
)


def bound(num_rows: int, gemms: int, passes: int, card: Card, guess: Judgement) -> float:
    """Milliseconds of the slower of bare GEMMs (Z, dH, dW) and passes over W."""
    N, V, D = num_rows, SHAPE.vocabulary, SHAPE.hidden_size
    num_bytes = 2 * (N * V + N * D + V * D)
    sizes = [dict(m=m, n=n, k=k) for m, n, k in ((N, V, D), (N, D, V), (V, D, N))][:gemms]
    times = [
        cost.library_gemm(x | {"itemsize": 2, "accumulates": False}, num_bytes, guess, card)
        for x in sizes
    ]
    return max(sum(times), passes * 2e3 * V * D / card.copy)


def predict(predictor: Predictor, impls: Sequence[str]) -> list[dict]:
    """Every target for every card and implementation: the rows of the result."""
    found = []
    for prediction in PREDICTIONS:
        for card in CARDS:
            for impl in impls:
                found.append(_row(predictor, prediction, card, impl))
    return found


def _row(predictor: Predictor, prediction: Prediction, card: Card, impl: str) -> dict:
    ratios = []
    for guess in JUDGEMENTS:
        cases = []
        for op, (gemms, passes) in prediction.ops:
            parts = predictor.parts(op, prediction.num_rows, impl, card, guess)
            floor = bound(prediction.num_rows, gemms, passes, card, guess)
            cases.append((sum(parts.values()) / floor, floor, parts, op.__name__))
        ratios.append(max(cases, key=lambda case: case[0]))
    value, floor, parts, op = ratios[0]
    lowest, *_, highest = sorted(ratio[0] for ratio in ratios)
    return {
        "target": prediction.target,
        "card": card.name,
        "impl": impl,
        "predicted": round(value, 3),
        "lowest": round(lowest, 3),
        "highest": round(highest, 3),
        "target_ratio": prediction.limit,
        "met": value <= prediction.limit,
        "slower_op": op,
        "bound_ms": round(floor, 3),
        "ms": round(sum(parts.values()), 3),
        "by_cause_ms": {cause: round(ms, 3) for cause, ms in parts.items() if ms >= 0.0005},
    }
