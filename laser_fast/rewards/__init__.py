"""Completion text and gold answer in, reward out, in killable workers."""
