"""Metrics to console, files and dashboards."""
