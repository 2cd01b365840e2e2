"""Guided sparsity learning (Park et al., ICLR 2017), trained with PyTorch."""

import topiarist.pruning.training  # noqa: F401  (says what to install where PyTorch is missing)
