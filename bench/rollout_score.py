"""What the self-score costs in generation, with the real vLLM.

Ways to get log pi(z_c | x, y) for every finished completion, in one process, in rotating order:

    off        only generation, the baseline; score token and padding banned, one seed each
    bare       vLLM's own sampling: nothing banned, no seeds
    inline     the score token is forced after the EOS: one more decode step
    last       the score of the row before is read in the step that draws the EOS: no more step
    request    a second request per completion over its cached prefix
    released   the released method: every sequence again, with prompt log-probs

The model is a counter: its layers add nothing to the residual stream but cost what they cost, and
the head sends token t to t + 1, so that every completion ends after exactly --length tokens.
A user waits for the wall time; the CPU time of the process is the steadier number on a shared
machine without a GPU.

    python -m bench.rollout_score [--smoke] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.markdown import page
from bench.provenance import header, save
from bench.random_qwen2 import SMOKE, Sizes, random_qwen2
from bench.runner import base_parser
from laser_fast.config import RolloutConfig
from laser_fast.records import Group, Prompt, Sampling, SpecialTokens
from laser_fast.rollout.vllm import VllmEngine, import_vllm

SCORE_TOKEN, EOS = 0, 1
FIRST_COUNT = 2  # ids below are special; above, counting down to EOS is counting up to the top
SHAPES = {"smoke": SMOKE, "10m": Sizes(256, 1024, 6, 8, 4, 8192)}


@dataclass(frozen=True)
class Timing:
    """Seconds of one way over all rounds, and tokens it generated per completion."""

    wall: list[float]
    cpu: list[float]
    extra_tokens: float


def counter_model(folder: Path, shape: str):
    """A Qwen2 of that shape which counts: after token t comes t + 1, after the last comes EOS."""
    sizes = SHAPES[shape]
    model = random_qwen2(
        sizes, max_position_embeddings=4096, tie_word_embeddings=False, eos_token_id=EOS
    )
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        embedding = torch.randn(sizes.vocabulary, sizes.hidden)
        embedding /= embedding.norm(dim=1, keepdim=True)
        model.model.embed_tokens.weight.copy_(embedding)
        # Normed hidden states have length sqrt(hidden): a logit of 40 for the next count.
        head = 40 * sizes.hidden**-0.5 * embedding.roll(1, 0)
        head[SCORE_TOKEN] = 0.0
        head[EOS] = 40 * sizes.hidden**-0.5 * embedding[-1]
        model.lm_head.weight.copy_(head)
    model.save_pretrained(folder)
    return model.state_dict()


def make_prompts(num: int, *, length: int, vocab: int, prompt_length: int) -> list[Prompt]:
    """Different prompts whose last token is `length` steps before EOS."""
    generator = torch.Generator().manual_seed(0)
    start = vocab - length  # then vocab - length + 1, ..., vocab - 1, EOS: `length` tokens
    bodies = torch.randint(FIRST_COUNT, start, (num, prompt_length - 1), generator=generator)
    return [
        Prompt(prompt_id=str(i), text="", prompt_ids=(*body, start), answer="")
        for i, body in enumerate(bodies.tolist())
    ]


def read_again(engine: VllmEngine, groups: list[Group], *suffix: int, **asked: object) -> None:
    """A second request for every completion, followed by `suffix`; its own token is not read."""
    from vllm import SamplingParams

    ids = [g.prompt.prompt_ids + c.completion_ids + suffix for g in groups for c in g.completions]
    params = SamplingParams(
        max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False, **asked
    )
    engine._run(ids, [params] * len(ids))


def bare_generation(engine: VllmEngine, prompts: list[Prompt], sampling: Sampling) -> None:
    """Sample the same completions with vLLM's own defaults."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=sampling.max_new_tokens,
        stop_token_ids=[EOS],
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
    )
    ids = [prompt.prompt_ids for prompt in prompts for _ in range(sampling.group_size)]
    engine._run(ids, [params] * len(ids))


def measure(args: argparse.Namespace) -> Iterator[dict[str, Timing]]:
    """Time every way `args.rounds` times, in rotating order; yields all timings so far."""
    vocab = SHAPES[args.shape].vocabulary
    sampling = Sampling(group_size=2, temperature=1.0, max_new_tokens=args.length, seed=0)
    unscored, last = (replace(sampling, score_at=score_at) for score_at in (None, "last"))
    prompts = make_prompts(
        args.completions // sampling.group_size,
        length=args.length,
        vocab=vocab,
        prompt_length=args.prompt_length,
    )
    with tempfile.TemporaryDirectory() as folder:
        weights = counter_model(Path(folder), args.shape)
        engine = VllmEngine(
            folder,
            RolloutConfig(engine="vllm", max_new_tokens=args.length, max_num_seqs=args.completions),
            SpecialTokens(
                score_token_id=SCORE_TOKEN, eos_token_ids=(EOS,), pad_token_id=EOS, vocab_size=vocab
            ),
            max_model_len=args.prompt_length + args.length + 2,
        )
    engine.sync(iter(weights.items()))
    generated = [0]
    run = engine._run

    def counting_run(prompts, params):
        outputs = run(prompts, params)
        generated[0] += sum(len(output.outputs[0].token_ids) for output in outputs)
        return outputs

    engine._run = counting_run
    ways: dict[str, Callable[[], object]] = {
        "off": lambda: engine.generate(prompts, unscored),
        "bare": lambda: bare_generation(engine, prompts, sampling),
        "inline": lambda: engine.generate(prompts, sampling),
        "last": lambda: engine.generate(prompts, last),
        "request": lambda: read_again(
            engine, engine.generate(prompts, unscored), logprob_token_ids=[SCORE_TOKEN]
        ),
        # As the released code does: prompt, answer and score token.
        "released": lambda: read_again(
            engine,
            engine.generate(prompts, unscored),
            SCORE_TOKEN,
            prompt_logprobs=0,
            flat_logprobs=True,
        ),
    }
    for scored in (sampling, last):
        check(engine.generate(prompts, scored), args.length)
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, float] = {}
    for number in range(args.rounds + 1):  # the first warms up
        names = list(ways)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            engine._llm.reset_prefix_cache()
            generated[0] = 0
            started, cpu_started = time.perf_counter(), time.process_time()
            ways[name]()
            if number:
                wall[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - cpu_started)
            tokens[name] = generated[0] / args.completions
        if number:
            yield {
                name: Timing(wall[name], cpu[name], tokens[name] - tokens["off"]) for name in ways
            }
    engine.close()


def check(groups: list[Group], length: int) -> None:
    """Assert that the counter counts, since otherwise the ways would do different work."""
    for group in groups:
        for completion in group.completions:
            assert completion.is_finished and len(completion.completion_ids) == length
            assert completion.score_logprob is not None


def main() -> None:
    parser = base_parser(__doc__, smoke="a tiny model, one round")
    parser.add_argument("--shape", default="10m", choices=SHAPES)
    parser.add_argument("--completions", type=int, default=64)
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if args.smoke:
        args.shape, args.rounds = "smoke", 1
        args.completions, args.length, args.prompt_length = 4, 20, 16

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = {"op": "rollout_score"} | header(device) | {"vllm": import_vllm().__version__}
    facts["case"] = (
        f"{args.completions} completions of {args.length} tokens after prompts of "
        f"{args.prompt_length}, shape {args.shape}"
    )
    for timings in measure(args):
        rows = [as_row(name, timing, timings["off"]) for name, timing in timings.items()]
        facts["rounds"] = str(len(timings["off"].wall))
        text = document(facts, rows)
        if args.json:  # after every round: a run that is cut off keeps what it has
            save(args.json, facts, rows, text)
    print(text)


def as_row(name: str, timing: Timing, baseline: Timing) -> dict[str, object]:
    """Medians, and the cost over the baseline as the median of per-round ratios."""
    row: dict[str, object] = {"way": name, "extra_tokens_per_completion": timing.extra_tokens}
    for clock in ("wall", "cpu"):
        seconds, base = getattr(timing, clock), getattr(baseline, clock)
        ratios = [ours / off for ours, off in zip(seconds, base, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        row[clock] = {
            "median_s": statistics.median(seconds),
            "extra": statistics.median(ratios) - 1,
            "extra_quartiles": [low - 1, high - 1],
            "seconds": seconds,
        }
    return row


def document(facts: dict[str, str], rows: list[dict]) -> str:
    """Header and table as Markdown."""
    columns = ["score", "extra tokens per completion"]
    for clock in ("wall", "CPU"):
        columns += [f"{clock} s", f"extra {clock} time (quartiles)"]
    cells = []
    for row in rows:
        line = [row["way"], f"{row['extra_tokens_per_completion']:.2f}"]
        for clock in ("wall", "cpu"):
            found = row[clock]
            low, high = found["extra_quartiles"]
            line += [
                f"{found['median_s']:.2f}",
                f"{found['extra']:+.1%} ({low:+.1%} to {high:+.1%})",
            ]
        cells.append(line)
    return page(facts, columns, cells)


if __name__ == "__main__":
    main()
