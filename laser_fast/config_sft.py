"""The configuration of a supervised phase, made of the sections that a run has, too."""

from collections.abc import Iterator

from laser_fast.config import (
    CheckpointConfig,
    DashboardConfig,
    ModelConfig,
    UpdateConfig,
    WordingConfig,
)
from laser_fast.config_section import Field, Section, UserPath


class SftDataConfig(WordingConfig):
    """Where the rows of a supervised phase come from."""

    train: UserPath
    """Rows with prompt and response: a hub id, or a jsonl, json, parquet or csv file."""
    train_split: str = "train"
    """Split of a hub data set."""
    answer_field: str = "response"
    """Field of the response, the text to learn: to its first EOS; a missing one is added."""
    max_response_tokens: int = Field(1024, ge=1)
    """Rows with longer responses, EOS included, are dropped and counted."""
    rows_per_step: int = Field(128, ge=1)
    """Rows of one step over all ranks."""


class SftConfig(Section):
    """One reproducible supervised phase, `laser-fast sft`."""

    seed: int = Field(0, ge=0)
    """Names the order of the rows."""
    output_dir: UserPath = Field(min_length=1)
    """The run folder, as of `Config`; the trained model is written to its folder "model"."""
    model: ModelConfig
    data: SftDataConfig
    optim: UpdateConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: DashboardConfig = DashboardConfig()

    def _problems(self) -> Iterator[str]:
        optim, longest = self.optim, self.max_sequence_tokens
        if optim.tokens_per_microbatch < longest:
            yield (
                f"{optim.tokens_per_microbatch = } is less than data.max_prompt_tokens + "
                f"data.max_response_tokens = {longest}; raise it to that"
            )

    @property
    def max_sequence_tokens(self) -> int:
        """Positions of the longest sequence."""
        return self.data.max_prompt_tokens + self.data.max_response_tokens
