"""The kernels inside other trainers."""
