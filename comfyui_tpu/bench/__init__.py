"""Benchmarks: kernels compiled for TPUs that need not be there (estimates), and models timed on this machine."""
