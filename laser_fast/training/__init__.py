"""Policy, packing, checkpoint and the loop."""
