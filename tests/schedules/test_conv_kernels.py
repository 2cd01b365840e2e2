"""Every convolution kernel against its contract."""

from __future__ import annotations

import pytest

from tests.schedules.kernel_contract import ConvKernelContract
from topiarist.schedules.kernels import CPU_KERNELS


@pytest.mark.parametrize("kernel", CPU_KERNELS, ids=lambda kernel: kernel.name)
class TestConvKernels(ConvKernelContract):
    """A kernel appended to CPU_KERNELS is tested by that."""
