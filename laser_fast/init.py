"""`laser-fast init`: the configuration of a run, found out where it need not be asked.

Fields, wording and lengths come from the prompts, the layout from the devices and from `plan`, the
score from `calibrate`. The rest is a start, as in the runs of this project; the file says which.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from laser_fast import needs_train

with needs_train():
    import tomli_w

from laser_fast.config import Config, ConfigError, DataConfig, ModelConfig, PromptConfig
from laser_fast.config_errors import apply_override
from laser_fast.data.fields import AUTO, answer_text, find_fields, kept
from laser_fast.data.prompts import PromptSource, held_out_prompts, train_prompts
from laser_fast.data.rows import RowSource, open_rows
from laser_fast.evaluation.benchmarks import PROMPT_SUFFIX, Benchmark
from laser_fast.evaluation.calibrate import calibrate
from laser_fast.model.families import position_limit
from laser_fast.model.policy import check_lengths, load_model_config
from laser_fast.model.vocabulary import load_vocabulary
from laser_fast.model.weights import has_weights
from laser_fast.plan import WORKSPACE_MB, Plan, advise, plan_run, verdict
from laser_fast.plan.advice import SWITCHES

Devices = tuple[bool, int, float]  # whether GPUs, how many ranks, GB of each
LORA_RANK = 32
HELD_OUT = ("test", "validation", "valid", "val", "dev", "eval")  # the first that is there
_CPU_BYTES = 8e9  # of float32 weights, twice; a CPU samples a larger model for hours
_SECTIONS = ("model", "data", "rollout", "reward", "score", "advantage", "optim")


class _Draft:
    """Values by section and why they are so; what is there first, as what was typed, stands."""

    def __init__(self, overrides: Sequence[str]) -> None:
        self.values: dict[str, Any] = {name: {} for name in _SECTIONS}  # as the file shows them
        self.reasons: dict[str, str] = {}
        for override in overrides:
            apply_override(self.values, override)
        for name in _SECTIONS:
            if not isinstance(self.values[name], dict):
                raise ConfigError(f'override "{name}": a section, not a value; set its keys')

    def add(self, key: str, value: Any, reason: str = "") -> Any:
        section, _, name = key.rpartition(".")
        part = self.values[section] if section else self.values
        if name not in part:
            part[name], self.reasons[key] = value, reason
        return part[name]

    def to_toml(self) -> str:
        lines, section = list[str](), ""
        for line in tomli_w.dumps(self.values).splitlines():
            name, is_value, _ = line.partition(" = ")
            if line.startswith("["):
                section = f"{line.strip('[]')}."
            elif is_value and (reason := self.reasons.get(section + name, "typed")):
                lines.append(f"# {reason}")
            lines.append(line)
        return "\n".join(lines) + "\n"


def write_config(
    model: str, data: str, output: Path, devices: Devices, *, measures: bool, typed: Sequence[str]
) -> tuple[str, str]:
    """Write a new file; returns what `plan` says of it, and the command that runs it.

    What is `typed`, as overrides, stands where it fits. A ConfigError says what cannot run, or that
    nothing here makes it fit.
    """
    if output.exists():
        raise ConfigError(f"{output} is there already; remove it, or name another with --output")
    output.parent.mkdir(parents=True, exist_ok=True)  # fails before all that is measured
    is_gpu, num_ranks, memory_gb = devices
    draft = _Draft(typed)
    draft.add("output_dir", f"runs/{output.stem}", "must hold no run yet")
    path, _ = draft.add("model.path", model), draft.add("data.train", data)
    model_config = load_model_config(ModelConfig(path=path))
    token = draft.values["score"].get("token")
    vocabulary = load_vocabulary(path, score_token=token, model_config=model_config)
    if is_gpu and getattr(model_config, "attn_logit_softcapping", None) is None:
        draft.add("model.attention", "varlen", "torch's own kernel for packed sequences")
    if not is_gpu:
        draft.add("model.compute_dtype", "float32", "no GPU")
    has_vllm = is_gpu and find_spec("vllm") is not None
    draft.add("rollout.engine", "vllm" if has_vllm else "hf", "vllm if it and GPUs are here")
    positions = position_limit(model_config)
    count = _choose_data(draft, data, vocabulary.tokenizer, positions, is_gpu=is_gpu)
    _choose_steps(draft, count, num_ranks, most=128 if is_gpu else 8)
    asked = Config.parse(draft.values, source="init")
    check_lengths(asked, positions)
    train_prompts(asked.data, vocabulary.tokenizer, seed=asked.seed)  # what a run would refuse
    if asked.data.eval:
        held_out_prompts(asked.data, vocabulary.tokenizer)
    plan = fit(asked, num_gpus=num_ranks, memory_gb=memory_gb, is_gpu=is_gpu)
    for section in ("model", "rollout", "optim"):
        for name, value in getattr(plan.config, section):
            if value != getattr(getattr(asked, section), name):
                draft.values[section].pop(name, None)
                draft.add(f"{section}.{name}", value, "plan: so that it fits")
    rate = (1e-6, 1e-5, 1e-4)[(plan.num_parameters < 1e9) + (plan.num_adapter_parameters > 0)]
    reason = "a start: 1e-6 above 1B parameters, as the paper, 1e-5 below; ten times that for LoRA"
    draft.add("optim.lr", rate, reason)
    room = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else _CPU_BYTES
    if measures and has_weights(path) and 8 * plan.num_parameters < room:
        _measure(draft, data, plan.config)
    token = vocabulary.tokenizer.convert_ids_to_tokens(vocabulary.special.score_token_id)
    draft.add("score.token", token, "not measured: `laser-fast calibrate` finds the best one")
    draft.add("score.ref_logprob", "auto", "measured when the run starts")
    Config.parse(draft.values, source="init")
    file = shlex.quote(str(output))
    command = f"torchrun --nproc-per-node {num_ranks} -m laser_fast train {file}"
    if plan.workspace_mb < WORKSPACE_MB:
        command = f"LASER_KERNELS_WORKSPACE_MB={plan.workspace_mb:g} {command}"
    with output.open("x", encoding="utf-8") as new:
        new.write(f"# Written by `laser-fast init`.\n# Run: {command}\n\n{draft.to_toml()}")
    return verdict(plan), command


def fit(config: Config, *, num_gpus: int, memory_gb: float, is_gpu: bool = True) -> Plan:
    """The plan of a configuration with as little changed as makes it fit, or a ConfigError.

    What `advise` proposes goes first, then adapters; only with these, weights in host memory. That
    is a CPU's own, which 4 bits do not spare either: weights are loaded there in 32.
    """
    model = config.model
    switches = [name for name in SWITCHES if is_gpu or not name.endswith(("offload", "4bit"))]
    for rank in dict.fromkeys((model.lora_rank, model.lora_rank or LORA_RANK)):
        new = config.model_copy(update={"model": model.model_copy(update={"lora_rank": rank})})
        plan = plan_run(new, num_gpus=num_gpus, memory_gb=memory_gb)
        after = advise(plan, switches)[1]
        offloads = after.config.model.cpu_offload and not (rank or model.cpu_offload)
        if not (after.misfits() or after.num_gpus > num_gpus or offloads):
            return after
    if not is_gpu:
        raise ConfigError(f"{model.path} is too large for {memory_gb:g} GB a rank of this CPU")
    raise ConfigError(f"{model.path}: {verdict(plan)}")


def find_devices(gpus: int | None, memory: float | None) -> Devices:
    """The GPUs that a user names, or those here, or one or two ranks on this CPU."""
    here = torch.cuda.device_count()
    if here and memory is None:
        memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(here)) / 1e9
    if memory is not None:
        return True, gpus or here or 1, round(memory, 1)
    if gpus is not None:
        raise ConfigError("--gpus: none is here to be asked for its memory; add --memory GB")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    num_ranks = 2 if (os.cpu_count() or 1) > 1 and total > 16 else 1
    return False, num_ranks, round(total / num_ranks, 1)


def _choose_data(draft: _Draft, name: str, tokenizer: Any, positions: int, *, is_gpu: bool) -> int:
    """Fields, wording, reward and lengths; returns how many prompts there are."""
    data = draft.values["data"]
    rows = open_rows(name, split=data.get("train_split", "train"))
    _find_held_out(draft, name, rows)
    fields = find_fields(rows, *(data.get(f"{k}_field", AUTO) for k in ("prompt", "answer")))
    for kind, field in zip(("prompt", "answer"), fields, strict=True):
        is_typed = f"{kind}_field" in data
        draft.add(f"data.{kind}_field", field, "found in the first row")
        if data.get("eval") and not is_typed:
            draft.add(f"data.eval_{kind}_field", AUTO, "found in the first row of its own")
    template = "{prompt}" if tokenizer.chat_template is None else "chat"
    draft.add("data.template", template, "chat if the tokenizer has a template")
    plain = {"max_prompt_tokens": positions, "prompt_suffix": ""}
    whole = DataConfig.parse(data | plain, source="init")
    prompts = PromptSource(whole, tokenizer, kept(rows, whole.where), name="train").all()
    count, told = len(prompts), sum("boxed" in p.text or "####" in p.text for p in prompts)
    reason = f"{told} of {count} prompts say how to write the answer"
    suffix = draft.add("data.prompt_suffix", PROMPT_SUFFIX if told < count / 2 else "", reason)
    has_marks = any("####" in prompt.text + prompt.answer for prompt in prompts)
    draft.add("reward.kind", "gsm8k" if has_marks else "math", "gsm8k if the rows have its ####")
    more = len(tokenizer(suffix)["input_ids"])
    lengths = sorted(len(prompt.prompt_ids) + more for prompt in prompts)
    most = lengths[99 * (count - 1) // 100]
    reason = f"99 of 100 prompts have at most {most} tokens, the longest has {lengths[-1]}"
    most = draft.add("data.max_prompt_tokens", min(-(-most // 16) * 16, positions // 2), reason)
    room = positions - most - 1
    reason = f"a start; the {positions} positions of the model leave {room}"
    most += draft.add("rollout.max_new_tokens", min(1024 if is_gpu else 256, room), reason)
    draft.add("optim.tokens_per_microbatch", max(16384 if is_gpu else 2048, most), "a start")
    return count


def _find_held_out(draft: _Draft, name: str, rows: RowSource) -> None:
    """A split, or a file beside that of training; a typed data.eval stands, an empty one too."""
    path, data = Path(name).expanduser(), draft.values["data"]
    for word in HELD_OUT if "eval" not in data else ():
        beside = path.with_name(path.name.replace("train", word))
        if word in rows.splits and word not in data.get("train_split", ""):
            found, reason = name, f'it has a split "{word}"'
        elif beside != path and beside.is_file():
            found, reason = str(beside), f"a file beside {path.name}"
        else:
            continue
        if _has_answer(found, word, data):
            draft.add("data.eval", found, f"found: {reason}")
            if found == name:
                draft.add("data.eval_split", word)
            return


def _has_answer(name: str, split: str, data: Mapping[str, Any]) -> bool:
    """Whether the first row has one: contests keep those of their test sets."""
    kinds = ("prompt", "answer")
    typed = [data.get(f"eval_{k}_field", data.get(f"{k}_field", AUTO)) for k in kinds]
    try:
        rows = open_rows(name, split=split)
        _, answer = find_fields(rows, *typed)
        place, row = next(rows.read({}), ("", None))
        answer_text(row, {answer: "data.answer_field"}, answer, place)
    except ConfigError:
        return False
    return True


def _choose_steps(draft: _Draft, count: int, num_ranks: int, *, most: int) -> None:
    """How many of the prompts a step has, how many steps, and what follows from them."""
    size = min(most, count) // num_ranks * num_ranks or num_ranks
    size = draft.add("data.prompts_per_step", size, f"of {count}; {num_ranks} ranks divide it")
    steps = min(max(2 * count // size, 30), 300)
    reason = f"a start: each prompt {steps * size / count:.1f} times"
    steps = draft.add("optim.steps", steps, reason)
    if draft.values["data"].get("eval"):
        draft.add("data.eval_limit", size, "an evaluation samples as much as a step")
        draft.add("data.eval_every", max(1, steps // 5))
    draft.add("advantage.score_warmup_steps", steps // 5, "scores say nothing at first")
    draft.add("score.loss_coef", 1.0, "learns in tens of steps, as in configs/quickstart.toml ...")
    draft.add("score.max_grad_ratio", 1.0, "... without pulling more than the policy loss")


def _measure(draft: _Draft, name: str, config: Config) -> None:
    """Token, beta and c_ref on completions of this machine's."""
    own = {key: getattr(config.data, key) for key in PromptConfig.model_fields}
    parts = {
        "model": ModelConfig(path=config.model.path),
        "rollout": config.rollout.model_copy(update={"engine": "hf", "tensor_parallel": 1}),
        "data": PromptConfig(**own | {"eval_split": config.data.train_split}),
    }
    prompts, samples = (64, 4) if torch.cuda.is_available() else (16, 2)
    data, token = Benchmark("train", name), draft.values["score"].get("token")
    config = config.model_copy(update=parts)
    found = calibrate(config, data, token=token, prompts=prompts, samples=samples)
    assert found is not None  # on the only rank
    reason = f"calibrate: {found.num_finished} of {found.num_completions} completions ended"
    for key, value in found.candidates[0].score(found.candidates[0].beta).items():
        draft.add(f"score.{key}", value, reason)
