"""DPPNet: dynamic pattern-based pruning (Lee, Shin and Woo, CIKM 2022), trained with PyTorch."""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'topiarist.pruning.dppnet needs PyTorch: pip install "topiarist[train]"', name=error.name
    ) from error
