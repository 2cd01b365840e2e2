"""Pruning: a weight and a budget in, a pattern out."""
