"""Convolution kernels and the layers around them for NVIDIA GPUs."""
