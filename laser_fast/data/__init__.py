"""Prompts in: data sets, their wording and their order."""

from laser_fast import needs_train

with needs_train():
    import datasets  # noqa: F401
