"""Policy, packing, checkpoint and the loop."""

import laser_fast.config  # noqa: F401 (it says which extra is missing)
