"""Kernels for CPUs, written on vectors of one width."""
