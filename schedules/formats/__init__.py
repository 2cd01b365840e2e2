"""Sparse weights and activations as tensors, and operators on them: the fine-grained baseline."""
