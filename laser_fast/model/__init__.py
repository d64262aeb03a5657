"""The policy and how it is read: Hugging Face body, fused head, FSDP2, packing, special tokens."""

from laser_fast import needs_train

with needs_train():
    import transformers  # noqa: F401
