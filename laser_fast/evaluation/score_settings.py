"""laser_fast.json beside a model's weights: the score that it was trained to give.

A score means something only with the token, beta and c_ref of its training; an exported model
carries them, so that nobody has to remember them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from laser_fast.config import ConfigError
from laser_fast.observe.jsonl import replace_text, to_text

FILE_NAME = "laser_fast.json"
_KEYS = {"token": str, "beta": float, "ref_logprob": float}


def write_score_settings(
    folder: str | Path, *, token: str, beta: float, ref_logprob: float
) -> None:
    """Write the score's settings into a model folder."""
    score = {"token": token, "beta": float(beta), "ref_logprob": float(ref_logprob)}
    replace_text(Path(folder) / FILE_NAME, to_text({"score": score}))


def read_score_settings(model: str | Path) -> dict[str, Any]:
    """Return `token`, `beta` and `ref_logprob` of a model folder; empty where it has no such file.

    Raises:
        ConfigError: a file that is not what `write_score_settings` writes.
    """
    path = Path(model) / FILE_NAME
    if not path.is_file():
        return {}
    try:
        score = json.loads(path.read_text(encoding="utf-8"))["score"]
        settings = {key: kind(score[key]) for key, kind in _KEYS.items()}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{path}: expected a score with token, beta and ref_logprob; restore the file, or "
            "remove it and give the three yourself"
        ) from None
    return settings
