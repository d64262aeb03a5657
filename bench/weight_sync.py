"""Measure what it costs to hand the policy's weights to vLLM and to prove that they arrived.

    start    build the colocated engine, once per run; here it compiles nothing
    sync     stream every state_dict entry of the FSDP2 policy into the engine
    check    log-probs of the same tokens from engine and policy, as after every sync of a run
    copy     clone every tensor of the stream, the least that moving the bytes can take

The policy changes between rounds, so that a sync which does nothing would fail its check. Under
torchrun the parameters are sharded over the ranks; times are those of rank 0.

    python -m bench.weight_sync [--smoke] [--json FILE]
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from bench.markdown import page
from bench.provenance import header, save
from bench.random_qwen2 import SMOKE, Sizes, random_qwen2
from bench.runner import base_parser
from laser_fast.config import ModelConfig, RolloutConfig
from laser_fast.model.distributed import World, open_world
from laser_fast.model.logprobs import policy_logprobs
from laser_fast.model.packing import Packer
from laser_fast.model.policy import Policy, build_policy
from laser_fast.records import Completion, Group, Prompt, SpecialTokens
from laser_fast.rollout.engine import check_agreement
from laser_fast.rollout.vllm import import_vllm

SHAPES = {"smoke": SMOKE, "qwen2.5-0.5b": Sizes(896, 4864, 24, 14, 2, 151936)}
SCORE_TOKEN, EOS = 0, 1
CHECK_PROMPTS, CHECK_TOKENS = 4, 64
# Far above the rounding of either dtype on a random model, far below a tensor that did not arrive.
MAX_DISAGREEMENT = {"float32": 1e-4, "bfloat16": 2e-2}


def save_model(folder: Path, shape: str) -> None:
    """A random Qwen2 of that shape, with a tied head."""
    model = random_qwen2(SHAPES[shape], tie_word_embeddings=True, eos_token_id=EOS)
    model.save_pretrained(folder)


def random_tokens(vocab: int) -> list[Group]:
    """Random tokens whose log-probs are compared."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, vocab, (CHECK_PROMPTS, CHECK_TOKENS), generator=generator).tolist()
    return [
        Group(
            prompt=Prompt(prompt_id=str(i), text="", prompt_ids=tuple(row[:1]), answer=""),
            completions=(
                Completion(
                    completion_ids=tuple(row[1:]),
                    rollout_logprobs=(0.0,) * (CHECK_TOKENS - 1),
                    finish_reason="length",
                ),
            ),
        )
        for i, row in enumerate(ids)
    ]


@torch.no_grad()
def change(policy: Policy) -> None:
    """An update that moves every parameter, by a share that every log-prob feels."""
    for parameter in policy.parameters():
        parameter.mul_(1.05)


def measure(
    shape: str, dtype: str, rounds: int, world: World
) -> Iterator[tuple[dict[str, list[float]], int, float]]:
    """Seconds by part, bytes of the stream, and the largest disagreement, after every round."""
    from laser_fast.rollout.vllm import VllmEngine

    vocab = SHAPES[shape].vocabulary
    seconds: dict[str, list[float]] = {"start": [], "sync": [], "check": [], "copy": []}

    def timed(part: str, run: Callable[[], object]) -> object:
        world.barrier()
        started = time.perf_counter()
        result = run()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds[part].append(time.perf_counter() - started)
        return result

    with tempfile.TemporaryDirectory() as folder:
        # Every rank saves the same model for itself; only rank 0 reads its weights.
        save_model(Path(folder), shape)
        policy = build_policy(ModelConfig(path=folder, compute_dtype=dtype), world)
        engine = timed(
            "start",
            lambda: VllmEngine(
                folder,
                RolloutConfig(engine="vllm", max_new_tokens=16, max_num_seqs=4),
                SpecialTokens(
                    score_token_id=SCORE_TOKEN,
                    eos_token_ids=(EOS,),
                    pad_token_id=EOS,
                    vocab_size=vocab,
                ),
                max_model_len=CHECK_TOKENS + 1,
                dtype=dtype,
                enforce_eager=True,  # a sync moves weights, compiled or not
            ),
        )
    packer = Packer(
        budget=CHECK_PROMPTS * CHECK_TOKENS,
        score_token_id=SCORE_TOKEN,
        score_at="eos",
        temperature=1.0,
        device=world.device,
        agree=world.max,
    )
    groups = random_tokens(vocab)

    def check() -> float:
        return check_agreement(
            engine.token_logprobs(groups, temperature=1.0),
            [tokens for tokens, _ in policy_logprobs(policy, groups, packer)],
            max_disagreement=MAX_DISAGREEMENT[dtype],
        )

    def stream():
        return policy.stream_weights(world.device)

    def copy() -> None:
        for _, tensor in stream():
            tensor.clone()

    worst = 0.0
    num_bytes = sum(tensor.nbytes for _, tensor in stream())
    for number in range(rounds + 1):  # the first warms up
        timed("sync", lambda: engine.sync(stream()))
        worst = max(worst, timed("check", check))
        timed("copy", copy)
        change(policy)
        if number:
            yield {part: found[1:] or found for part, found in seconds.items()}, num_bytes, worst
    engine.close()


def main(argv: Sequence[str] | None = None) -> None:
    parser = base_parser(__doc__, smoke="a tiny model, one round")
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=SHAPES)
    parser.add_argument("--dtype", default="bfloat16", choices=MAX_DISAGREEMENT)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    if args.smoke:
        args.shape, args.dtype, args.rounds = "smoke", "float32", 1
    with open_world() as world:
        facts = {"op": "weight_sync"} | header(world.device) | {"vllm": import_vllm().__version__}
        facts["case"] = f"{args.shape}, tied head sent twice, {args.dtype}, {world.size} rank(s)"
        text = ""
        for seconds, num_bytes, worst in measure(args.shape, args.dtype, args.rounds, world):
            rounds = len(seconds["sync"])
            facts["bytes"] = f"{num_bytes / 1e9:.3f} GB per sync"
            facts["disagreement"] = f"{worst:.1e} nats, the largest of {rounds + 1} syncs"
            rows = [
                {"part": part, "median_s": statistics.median(found), "seconds": found}
                for part, found in seconds.items()
            ]
            text = document(facts, rows, num_bytes)
            if args.json and world.is_main:  # after every round: what is cut off keeps what it has
                save(args.json, facts, rows, text)
        if world.is_main:
            print(text)


def document(facts: dict[str, str], rows: list[dict], num_bytes: int) -> str:
    """Header and table as Markdown."""
    cells = []
    for row in rows:
        moved = row["part"] in ("sync", "copy")
        cells.append(
            [
                row["part"],
                f"{row['median_s']:.3f}",
                f"{min(row['seconds']):.3f} to {max(row['seconds']):.3f}",
                f"{num_bytes / 1e9 / row['median_s']:.2f}" if moved else "-",
            ]
        )
    return page(facts, ["part", "median s", "range", "GB/s"], cells)


if __name__ == "__main__":
    main()
