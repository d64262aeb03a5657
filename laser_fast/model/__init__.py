"""The policy and how it is read: Hugging Face body, fused head, FSDP2, packing, special tokens."""
