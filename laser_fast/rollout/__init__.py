"""Prompts in, sampled completions out: the engine protocol and its engines."""
