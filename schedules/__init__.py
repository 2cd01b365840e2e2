"""Sparse and dense convolution kernels: layouts, formats, compute, knobs."""
