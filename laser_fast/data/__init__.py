"""Prompts in: data sets, their wording and order, and the sandbox task."""
