"""What all training shares. Needs PyTorch, and says so where it is missing."""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'training needs PyTorch: pip install "topiarist[train]"', name=error.name
    ) from error
