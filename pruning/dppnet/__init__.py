"""DPPNet: dynamic pattern-based pruning (Lee, Shin and Woo, CIKM 2022), trained with PyTorch."""

import topiarist.pruning.training  # noqa: F401  (says what to install where PyTorch is missing)
