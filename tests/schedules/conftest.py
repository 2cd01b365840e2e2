"""Assertions in the shared modules explain themselves like those in tests."""

import pytest

pytest.register_assert_rewrite("tests.schedules.building", "tests.schedules.kernel_contract")
