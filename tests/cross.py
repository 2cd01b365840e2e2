"""What tests for other machines need: the programs that make and run their code."""

from __future__ import annotations

import shutil

import pytest

from topiarist.targets.toolchain import Toolchain


def needs_compiler(toolchain: Toolchain) -> pytest.MarkDecorator:
    """Skip a test where the cross compiler is not installed, naming its package."""
    return _needs(toolchain.compiler, toolchain.package)


def needs_emulator(toolchain: Toolchain) -> pytest.MarkDecorator:
    """Skip a test where the emulator is not installed, naming its package."""
    return _needs(toolchain.emulator, toolchain.emulator_package)


def _needs(program: str, package: str) -> pytest.MarkDecorator:
    missing = shutil.which(program) is None
    return pytest.mark.skipif(missing, reason=f"needs {program} (Debian package {package})")
