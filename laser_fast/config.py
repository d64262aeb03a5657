"""The configuration of a run: frozen, typed, one TOML file plus `section.key=value` overrides.

Every key is documented once, here, and read somewhere; a wrong file is refused in one sentence.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from laser_fast.config_algorithm import AdvantageConfig, LossConfig, ScoreConfig
from laser_fast.config_errors import ConfigError as ConfigError  # of wrong values of the keys
from laser_fast.config_section import Field, Section, UserPath
from laser_fast.config_section import all_keys as all_keys
from laser_fast.config_section import dump_config as dump_config

_Share = Annotated[float, Field(ge=0, le=1)]
_DecayRate = Annotated[float, Field(ge=0, lt=1)]


class ModelConfig(Section):
    """What is trained and how it is laid out on the devices."""

    path: UserPath = Field(min_length=1)
    """Hugging Face id or folder of a causal LM; "sandbox" and "sandbox-hard" make a small one."""
    attention: Literal["sdpa", "varlen", "flash_attention_2"] = "sdpa"
    """Attention over packed sequences; "varlen" is torch's own, flash needs the extra [flash]."""
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of forward and backward; master weights stay float32. auto: bfloat16 on a GPU."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward instead of keeping its activations."""
    activation_offload: bool = False
    """Keep in host memory what the blocks save for their backward, weights excepted."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory between uses."""
    compile: bool = False
    """Run torch.compile on every transformer block."""
    liger: bool = False
    """Use Liger's RMSNorm, SwiGLU and rotary layers; needs the extra [liger] and a GPU."""
    replicas: int = Field(1, ge=1)
    """HSDP: number of groups that each hold a full copy; one per node keeps gathers inside it."""
    reshard_after_forward: bool = True
    """False: blocks stay gathered until their backward (ZeRO-2), for one gather less."""
    lora_rank: int = Field(0, ge=0)
    """Train adapters of this rank beside frozen weights; 0: train the weights. Extra [lora]."""
    lora_alpha: float = Field(32.0, gt=0)
    """Scale of what the adapters add, over their rank."""
    lora_targets: tuple[str, ...] = Field((), strict=False)
    """Linear layers, such as "q_proj", that get adapters; empty: all. Experts are none."""
    lora_4bit: bool = False
    """QLoRA: the blocks' frozen linear layers in 4 bits, whole on each GPU. Extra [qlora]."""
    router_aux_loss_coef: float = Field(0.0, ge=0)
    """Weight of the experts' load-balancing loss, formed in each microbatch apart; 0: off."""

    def _problems(self) -> Iterator[str]:
        for key in ("lora_targets", "lora_4bit"):
            if getattr(self, key) and not self.lora_rank:
                yield f"model.{key} is for adapters, and model.lora_rank is 0; set a rank"
        if self.compile and self.router_aux_loss_coef:
            yield "model.compile hides the routers from model.router_aux_loss_coef; leave one out"


class WordingConfig(Section):
    """How the rows of a data set become prompts."""

    prompt_field: str = "auto"
    """Field of the question, text or messages; auto: problem, prompt, question, ... of the data."""
    answer_field: str = "auto"
    """Field of the gold answer; auto: answer, reward_model.ground_truth, ... of the data."""
    template: str = "chat"
    """The word chat for the tokenizer's chat template, or a text with {prompt} in it."""
    chat_template_kwargs: dict[str, bool | int | float | str] = {}
    """What the chat template is told, such as {enable_thinking = false}."""
    prompt_suffix: str = ""
    """Appended to the question before the template."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Longer prompts are dropped and counted."""

    def _problems(self) -> Iterator[str]:
        if self.template != "chat" and self.chat_template_kwargs:
            yield 'data.chat_template_kwargs are read by data.template = "chat" only; remove them'
        if self.template != "chat" and "{prompt}" not in self.template:
            yield (
                f"data.template = {self.template!r} has no place for the question; put {{prompt}} "
                'into it, or set it to "chat"'
            )


class PromptConfig(WordingConfig):
    """The prompts that measuring and training with rewards both read."""

    eval_split: str = "test"
    """Split of a hub data set with held-out prompts."""


class DataConfig(PromptConfig):
    """Where a run's prompts come from."""

    train: UserPath | dict[UserPath, Annotated[float, Field(gt=0)]]
    """Hub id, jsonl, json, parquet or csv file, "sandbox", "sandbox-hard"; or {"FILE" = weight}."""
    train_split: str = "train"
    """Split of a hub data set."""
    where: dict[str, list[bool | str | int | float]] = {}
    """Train on rows that have these values of a field only, such as {level = [4, 5]}."""
    pass_rate: tuple[_Share, _Share] = Field((0.0, 1.0), strict=False)
    """A prompt whose share of correct completions lies outside is left out of its next epoch."""
    eval: UserPath = ""
    """Held-out prompts, given like `train`; empty: no evaluation."""
    eval_prompt_field: str = ""
    """Field of the held-out question; empty: like `prompt_field`."""
    eval_answer_field: str = ""
    """Field of the held-out answer; empty: like `answer_field`."""
    prompts_per_step: int = Field(128, ge=1)
    """Prompts of one step over all ranks; the world size must divide it."""
    eval_samples: int = Field(8, ge=1)
    """Completions per held-out prompt."""
    eval_limit: int = Field(0, ge=0)
    """Evaluate only this many prompts, the first ones; 0: all."""
    eval_every: int = Field(0, ge=0)
    """Steps between evaluations; 0: only before the first and after the last step."""

    @property
    def skips_prompts(self) -> bool:
        """Whether some pass rate is outside."""
        return self.pass_rate != (0.0, 1.0)


class RolloutConfig(Section):
    """How completions are sampled."""

    engine: Literal["hf", "vllm", "vllm_server"] = "hf"
    """Sampler: transformers in process, vLLM in process, or a vLLM server on other GPUs."""
    group_size: int = Field(8, ge=2)
    """Completions per prompt (G)."""
    temperature: float = Field(1.0, gt=0, le=2)
    """Sampling temperature; policy log-probs are of the same tempered distribution."""
    max_new_tokens: int = Field(1024, ge=1)
    """Longest completion, EOS included."""
    eval_temperature: float | None = Field(None, gt=0, le=2)
    """Sampling temperature of evaluations; left out: that of training."""
    eval_max_new_tokens: int | None = Field(None, ge=1)
    """Longest completion of evaluations; left out: that of training."""
    eval_top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus of evaluations; training samples the whole distribution, as its ratios assume."""
    eval_top_k: int = Field(0, ge=0)
    """Most probable tokens of which evaluations draw; 0: all."""
    eval_min_p: float = Field(0.0, ge=0, lt=1)
    """Least probability of a token in evaluations, as a share of the most probable one's."""
    max_num_seqs: int = Field(256, ge=1)
    """Completions sampled at once by one engine."""
    score: Literal["auto", "inline", "off"] = "auto"
    """How the engine reads the score; "off" leaves it to a policy forward."""
    max_disagreement: float = Field(0.1, gt=0)
    """Stop above this mean |policy - engine| log-prob of a group of 16's tokens, in nats."""
    resample_rounds: int = Field(0, ge=0)
    """DAPO's dynamic sampling: rounds in which groups without reward spread get new prompts."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs per vLLM engine."""
    gpu_memory_fraction: float = Field(0.6, gt=0, le=1)
    """Share of the device that a vLLM engine in process may use."""
    server_url: str = ""
    """Base URL of the vLLM server, for engine "vllm_server"."""
    steps_ahead: int = Field(0, ge=0, le=1)
    """1: the server samples the next step during this one, but never across a checkpoint."""
    seeded: bool = True
    """False: vLLM draws a batch at once, faster; completions then depend on the number of ranks."""
    timeout_s: float = Field(1800.0, gt=0, le=1e8)
    """Longest wait of a rank for another one, and for an answer of the server."""
    sync_buffer_mb: int = Field(512, ge=1)
    """Largest piece of weights gathered at once while streaming to vLLM."""

    def _problems(self) -> Iterator[str]:
        rollout, but = self, f'and rollout.engine is "{self.engine}"'
        uses_server = rollout.engine == "vllm_server"
        if uses_server and not rollout.server_url.startswith(("http://", "https://")):
            got = f'got "{rollout.server_url}"'
            yield f'rollout.server_url: engine "vllm_server" needs http://HOST:PORT, {got}'
        if rollout.steps_ahead and not uses_server:
            yield f'{rollout.steps_ahead = } needs the engine "vllm_server", {but}; set it to 0'
        if rollout.steps_ahead and rollout.resample_rounds:
            yield (
                f"{rollout.steps_ahead = } draws the next prompts before the rewards are there "
                f"that {rollout.resample_rounds = } asks for; set one to 0"
            )
        if not rollout.seeded and rollout.engine == "hf":
            yield f"{rollout.seeded = } is for vLLM, {but}; set it to true"
        if rollout.tensor_parallel > 1 and rollout.engine != "vllm":
            yield f'{rollout.tensor_parallel = } splits only the engine "vllm", {but}; set it to 1'


class RewardConfig(Section):
    """How completions are graded."""

    kind: str = "math"
    """One of math, gsm8k, exact, sandbox, or "module:function" of yours."""
    extra: dict[str, float] = {}
    """Weights of further functions, {"module:function" = 0.2}, for advantages; no score target."""
    timeout_s: float = Field(10.0, gt=0, le=1e8)
    """Deadline of one answer; one that misses it is wrong if its gold is readable, else None."""
    batch_timeout_s: float = Field(300.0, gt=0, le=1e8)
    """Deadline of a call of your function with all completions of a rank."""
    range: tuple[float, float] = Field((0.0, 1.0), strict=False)
    """Lowest and highest reward of your function, which the score learns; mapped to [0, 1]."""
    max_failed: float = Field(1.0, ge=0, le=1)
    """Stop when a larger share of a step's grades failed; without any grade it has no update."""
    workers: int = Field(2, ge=1)
    """Grading processes per rank."""
    format_gate: bool = False
    """Reward "math" only in the format of the released code: exactly one boxed answer."""
    overlong: Literal["score", "mask", "penalty"] = "score"
    """Truncated completions: grade as they are, leave out of the loss, or DAPO's soft penalty."""
    overlong_buffer: int = Field(0, ge=0)
    """Tokens before the limit over which the soft penalty falls from 0 to -1."""

    def _problems(self) -> Iterator[str]:
        low, high = self.range
        if not low < high:
            yield f"reward.range = [{low:g}, {high:g}] must be [lowest, highest], such as [-1, 1]"


class ForwardConfig(Section):
    """The budget of the policy's forwards."""

    tokens_per_microbatch: int = Field(16384, ge=1)
    """Token budget of one forward and backward; changes results with a router loss only."""


class UpdateConfig(ForwardConfig):
    """Updates and their budget."""

    steps: int = Field(ge=1)
    """Training steps, each with its updates."""
    lr: float = Field(1e-6, gt=0)
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after its warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear learning-rate warm-up."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Final learning rate relative to the peak, for linear and cosine."""
    betas: tuple[_DecayRate, _DecayRate] = Field((0.9, 0.999), strict=False)
    """AdamW's moment decay rates."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's decoupled weight decay."""
    state_bits: Literal[8, 32] = 32
    """Bits of each of AdamW's moments; 8: quantized in blocks of 256, by the extra [torchao]."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Clip of the global gradient norm."""

    def _problems(self) -> Iterator[str]:
        optim = self
        if optim.warmup_steps > optim.steps:
            yield f"{optim.warmup_steps = } exceeds {optim.steps = }; lower it or train for longer"


class OptimConfig(UpdateConfig):
    """Updates of a training with rewards: a step is one rollout and its updates."""

    max_bad_steps: int = Field(3, ge=0)
    """Steps in a row that may be skipped for a gradient that is no finite number."""
    minibatches: int = Field(1, ge=1)
    """Optimizer updates per pass; if a step has several, old log-probs are recomputed once."""
    epochs: int = Field(1, ge=1)
    """Passes over a step's completions; each trains the score, too, on the same rewards."""


class CheckpointConfig(Section):
    """When a run is saved."""

    every: int = Field(50, ge=0)
    """Steps between checkpoints; 0: only the last."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints to keep."""


class RunCheckpointConfig(CheckpointConfig):
    """When a training with rewards is saved, given away and ended."""

    asynchronous: bool = False
    """Go on with the next step while a copy of the state, in host memory, is written."""
    best: str = ""
    """Number of an evaluation, such as "accuracy", whose best checkpoint is kept, too."""
    patience: int = Field(0, ge=0)
    """Evaluations in a row without a new `best` that end the run; 0: off."""
    export_every: int = Field(0, ge=0)
    """Steps between Hugging Face models in output_dir/exports, of which `keep` stay; 0: none."""
    hub_repo: str = ""
    """Hub repository, "user/name", for exports and the last model; private if it is new."""


class DashboardConfig(Section):
    """What is written besides metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: str = ""
    """Weights & Biases project; empty: off. Needs the extra [wandb]."""
    trackio: str = ""
    """Trackio project; empty: off. Needs the extra [trackio]."""


class LogConfig(DashboardConfig):
    """What a training with rewards writes besides."""

    samples_per_step: int = Field(2, ge=0)
    """Completions per step written to samples.jsonl."""


class MeasureConfig(Section):
    """What sampling and scoring a model reads; a training run has all of it, and more."""

    seed: int = Field(0, ge=0)
    """Names every draw of the run: data order and sampling."""
    model: ModelConfig
    data: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    score: ScoreConfig = ScoreConfig()
    optim: ForwardConfig = ForwardConfig()

    @property
    def max_sequence_tokens(self) -> int:
        """Positions of the longest sequence: prompt, completion and a score token after it."""
        rollout = self.rollout
        longest = max(rollout.max_new_tokens, rollout.eval_max_new_tokens or 0)
        return self.data.max_prompt_tokens + longest + (self.score.position == "eos")


class Config(MeasureConfig):
    """One reproducible run."""

    output_dir: UserPath = Field(min_length=1)
    """The run folder; must hold no run but the one that `--resume` continues."""
    data: DataConfig
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig
    checkpoint: RunCheckpointConfig = RunCheckpointConfig()
    log: LogConfig = LogConfig()

    def _problems(self) -> Iterator[str]:
        data, rollout, reward, optim = self.data, self.rollout, self.reward, self.optim
        if isinstance(self.score.ref_logprob, float):
            self.score.check_target(self.score.ref_logprob)
        longest, key = rollout.max_new_tokens, "max_new_tokens"
        if data.eval and rollout.score == "off" and (rollout.eval_max_new_tokens or 0) > longest:
            longest, key = rollout.eval_max_new_tokens or 0, "eval_max_new_tokens"
        longest += data.max_prompt_tokens
        if optim.tokens_per_microbatch < longest:
            yield (
                f"{optim.tokens_per_microbatch = } is less than data.max_prompt_tokens + "
                f"rollout.{key} = {longest}; raise it to that"
            )
        if self.advantage.score_coef > 0 and self.score.loss_coef == 0:
            yield (
                "advantage.score_coef > 0 mixes in a score that score.loss_coef = 0 never trains; "
                "set advantage.score_coef = 0 or train the score"
            )
        if 0 < self.loss.clip_dual <= 1:
            dual = f"loss.clip_dual = {self.loss.clip_dual:g}"
            yield f"{dual} would cut the gradient of every unlikely completion; set it to 3.0, or 0"
        if rollout.steps_ahead and self.loss.tis_cap == 0:
            yield f"{rollout.steps_ahead = } needs loss.tis_cap, got 0; set that to 2.0"
        if rollout.steps_ahead and data.skips_prompts:
            yield f"{rollout.steps_ahead = } draws before data.pass_rate knows; leave one out"
        if data.pass_rate[0] > data.pass_rate[1]:
            yield f"data.pass_rate = {[*data.pass_rate]} must be [lowest, highest]"
        if data.eval_every > 0 and not data.eval:
            yield f"{data.eval_every = } has nothing to evaluate; name held-out rows in data.eval"
        if self.checkpoint.asynchronous and self.optim.state_bits == 8:
            yield "checkpoint.asynchronous cannot copy moments of 8 bits; leave one of both out"
        if self.checkpoint.best and not data.eval:
            yield "checkpoint.best needs evaluations; name held-out prompts in data.eval"
        if self.checkpoint.patience and not (self.checkpoint.best and data.eval_every):
            yield "checkpoint.patience needs checkpoint.best and data.eval_every; set both"
        buffer, limit = reward.overlong_buffer, rollout.max_new_tokens
        if reward.overlong == "penalty" and not 0 < buffer <= limit:
            needed = f"needs overlong_buffer from 1 to {rollout.max_new_tokens = }, got {buffer}"
            yield f'reward.overlong = "penalty" {needed}'
        if optim.minibatches > data.prompts_per_step:
            yield f"{optim.minibatches = } exceeds {data.prompts_per_step = }; lower it"


load_config = Config.load
