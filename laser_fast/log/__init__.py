"""What a run writes down: its folder, metrics, samples, console and dashboards."""
