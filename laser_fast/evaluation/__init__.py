"""Accuracy, self-verification and voting on held-out prompts."""

from laser_fast import needs_train

with needs_train():
    import numpy  # noqa: F401
