"""Prompts in: data sets, their wording and their order."""

import laser_fast.config  # noqa: F401 (it says which extra is missing)
