"""What a run writes down: its folder, metrics, samples, console and dashboards."""

import laser_fast.config  # noqa: F401 (it says which extra is missing)
