"""Kinds of ARM cores: LLVM's name, what Linux calls them by number, and how fast they multiply."""

from __future__ import annotations

from dataclasses import dataclass

ARM, QUALCOMM = 0x41, 0x51  # implementers, as in /proc/cpuinfo


@dataclass(frozen=True)
class Core:
    """A kind of core; `mcpu` is LLVM's name.

    `fma_per_cycle` counts fused multiply-adds of four fp32 values that start in a cycle, from
    ARM's optimization guides where there is one. `parts` are the numbers (implementer, part) that Linux shows.
    """

    mcpu: str
    fma_per_cycle: float
    out_of_order: bool
    parts: tuple[tuple[int, int], ...]
    aarch64: bool = True

    @property
    def title(self) -> str:
        """`cortex-a72` -> `Cortex-A72`."""
        return "-".join(word.capitalize() for word in self.mcpu.split("-"))


CORES = (
    Core("cortex-a7", 0.25, False, ((ARM, 0xC07),), aarch64=False),
    Core("cortex-a15", 1, True, ((ARM, 0xC0F),), aarch64=False),
    Core("cortex-a53", 1, False, ((ARM, 0xD03), (QUALCOMM, 0x801))),
    Core("cortex-a55", 1, False, ((ARM, 0xD05), (QUALCOMM, 0x803), (QUALCOMM, 0x805))),
    Core("cortex-a57", 1, True, ((ARM, 0xD07),)),
    Core("cortex-a72", 1, True, ((ARM, 0xD08),)),
    Core("cortex-a73", 1, True, ((ARM, 0xD09), (QUALCOMM, 0x800))),
    Core("cortex-a75", 1, True, ((ARM, 0xD0A), (QUALCOMM, 0x802))),
    Core("cortex-a76", 2, True, ((ARM, 0xD0B), (QUALCOMM, 0x804))),
    Core("cortex-a77", 2, True, ((ARM, 0xD0D),)),
    Core("cortex-a78", 2, True, ((ARM, 0xD41),)),
    Core("cortex-a78ae", 2, True, ((ARM, 0xD42),)),
    Core("cortex-a78c", 2, True, ((ARM, 0xD4B),)),
    Core("cortex-x1", 4, True, ((ARM, 0xD44),)),
    Core("cortex-x2", 4, True, ((ARM, 0xD48),)),
    Core("neoverse-n1", 2, True, ((ARM, 0xD0C),)),
    Core("neoverse-n2", 2, True, ((ARM, 0xD49),)),
    Core("neoverse-v1", 4, True, ((ARM, 0xD40),)),
    Core("neoverse-v2", 4, True, ((ARM, 0xD4F),)),
)
BY_MCPU = {core.mcpu: core for core in CORES}
BY_PART = {part: core for core in CORES for part in core.parts}
