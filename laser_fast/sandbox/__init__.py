"""A task and a model small enough for two CPU cores: chains of arithmetic."""
