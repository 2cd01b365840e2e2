"""Every convolution kernel against its contract."""

from __future__ import annotations

import pytest

from tests.schedules.kernel_contract import ConvKernelContract
from topiarist.schedules.kernels import CONV_KERNELS


@pytest.mark.parametrize("kernel", CONV_KERNELS, ids=lambda kernel: kernel.name)
class TestConvKernels(ConvKernelContract):
    """A kernel appended to CONV_KERNELS is tested by that."""
