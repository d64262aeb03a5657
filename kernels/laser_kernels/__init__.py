"""Fused LM-head kernels: log-probabilities, the last-token score and their gradients."""

__version__ = "0.1.0"
