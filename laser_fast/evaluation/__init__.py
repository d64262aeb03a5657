"""Accuracy, self-verification and voting on held-out prompts."""

import laser_fast.config  # noqa: F401 (it says which extra is missing)
