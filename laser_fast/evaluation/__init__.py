"""Accuracy, self-verification and voting on held-out prompts."""
