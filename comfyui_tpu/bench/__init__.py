"""Benchmarks that need no TPU: kernels compiled for described devices, their schedules counted."""
