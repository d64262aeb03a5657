"""LaSeR and GRPO as pure functions on tensors: no I/O, no collectives, no state."""
