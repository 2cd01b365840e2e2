"""Topiarist compiles pruned convolutional networks so that they are really faster."""

__version__ = "0.1.0"
