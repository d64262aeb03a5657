"""Prompts in: data sets, their wording and their order."""
