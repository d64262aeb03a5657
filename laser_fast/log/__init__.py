"""What a run writes down: its folder, metrics, samples, console and dashboards."""

from laser_fast import needs_train

with needs_train():
    import rich  # noqa: F401
