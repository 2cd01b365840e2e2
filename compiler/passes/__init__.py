"""Rewrites of the Relax module, one pass a file."""
