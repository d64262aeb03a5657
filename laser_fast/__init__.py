"""LaSeR as real software: a lean GRPO trainer whose model learns to grade its own answers.

Importing this package imports neither torch, transformers nor vLLM.
"""

__version__ = "0.1.0"
