"""Matrices as tensor cores take them: which thread of a warp has which element in which register.

From the PTX ISA's `mma` and `mma.sp` of fp16 with sums in fp32. Of a warp's threads, group `g` is
the number over four and `t` the number in it. A word holds two neighbouring values of fp16, the
first in its low half. All that is multiplied here comes in pieces of 32 taps:

- Weights of 16 channels, dense (two `m16n8k16`): words [taps over 16][taps over 8 % 2][channel
  over 8], of channel g and taps 2t, 2t + 1 of these eight.
- Sparse (`m16n8k32`): the same with the two values that are left of every four taps, 16 in all, so
  four words. `places` says which of the four they are, in 4 bits; a thread has those of channels g
  and g + 8, for 16 taps each. Two neighbours have all of 16 channels, so that the four of a group
  have those of 32; the instruction is told which two to ask.
- Inputs of 8 pixels: words of pixel g and taps 2t, 2t + 1 of each eight.
- Sums of 16 channels and 8 pixels: channel g, pixels 2t and 2t + 1; then those of channel g + 8.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CHANNELS, PIXELS, TAPS = 16, 8, 32  # of a piece
PLACES_CHANNELS = 2 * CHANNELS  # whose places a word in each thread holds
GROUP, OF_GROUP = 4, 2  # neighbouring taps, and how many of them may have weights
INPUT_WORDS = 4  # of a thread, for 8 pixels
SUMS = 4  # of a thread
LARGEST = 65504.0  # in fp16
Words = NDArray[np.int32]


def words_of(sparse: bool) -> int:
    """Words of weights that a thread has of 16 channels and 32 taps."""
    return 4 if sparse else 8


def input_order() -> NDArray[np.int64]:
    """The taps of 32 in the order that brings a thread's words together: [t, word, half]."""
    return np.arange(TAPS).reshape(INPUT_WORDS, 4, 2).transpose(1, 0, 2).ravel()


def weight_words(matrix: NDArray[np.float32]) -> Words:
    """[..., channels, taps] -> [..., taps over 32, channels over 16, threads, words].

    Of a compressed matrix "taps" are the values that are left, half as many.
    """
    *outer, channels, taps = matrix.shape
    pieces = matrix.reshape(*outer, channels // CHANNELS, 2, 8, taps // 16, 2, 4, 2)
    # channel: piece, half, g; taps: sixteen, eight, t, of a word
    m, h, g, k, q, t, e = range(len(outer), len(outer) + 7)
    halves = np.clip(pieces, -LARGEST, LARGEST).astype(np.float16)
    ordered = halves.transpose(*range(len(outer)), k, m, g, t, q, h, e)
    words = np.ascontiguousarray(ordered).view(np.int32)
    return words.reshape(*outer, taps // 16, channels // CHANNELS, 32, 4)


def dense_words(matrix: NDArray[np.float32]) -> Words:
    """As `weight_words`, the two instructions' words of a thread side by side."""
    words = weight_words(matrix)
    *outer, sixteens, pieces, threads, count = words.shape
    paired = words.reshape(*outer, sixteens // 2, 2, pieces, threads, count)
    return np.ascontiguousarray(np.moveaxis(paired, -4, -2)).reshape(
        *outer, sixteens // 2, pieces, threads, 2 * count
    )


def compressed(matrix: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The two values left of every four taps, and where in these they are, rising.

    Raises ValueError where more than two are not zero.
    """
    fours = matrix.reshape(*matrix.shape[:-1], -1, GROUP)
    zero = fours == 0
    if (GROUP - zero.sum(-1) > OF_GROUP).any():
        raise ValueError(f"more than {OF_GROUP} of {GROUP} neighbouring channels have weights")
    places = np.sort(np.argsort(zero, axis=-1, kind="stable")[..., :OF_GROUP], axis=-1)
    values = np.take_along_axis(fours, places, axis=-1)
    return values.reshape(*matrix.shape[:-1], -1), places


def place_words(places: NDArray[np.int64]) -> Words:
    """[..., channels, taps over 4, 2] -> [..., taps over 32, channels over 32, threads]."""
    *outer, channels, fours, _ = places.shape
    bits = places[..., 0] | places[..., 1] << 2
    # channel: 32, which 16 of them, half, g; taps: 32, which 16 of them, four
    pieces = bits.reshape(*outer, channels // PLACES_CHANNELS, 2, 2, 8, fours // 8, 2, 4)
    shifts = 16 * np.arange(2)[:, None, None, None, None] + 4 * np.arange(4)
    word = (pieces << shifts).sum((-5, -1))  # [..., 32 channels, 16, g, 32 taps, 16]
    m, s, g, k, j = range(len(outer), len(outer) + 5)
    ordered = word.transpose(*range(len(outer)), k, m, g, s, j)
    words = np.ascontiguousarray(ordered).astype(np.uint32).view(np.int32)
    return words.reshape(*outer, fours // 8, channels // PLACES_CHANNELS, 32)


_SUMS = '"+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])'


def _inputs(name: str, first: int, count: int) -> str:
    return ", ".join(f'"r"({name}[{first + i}])' for i in range(count))


PAIR_SOURCE = """\
__device__ __forceinline__ int as_halves(float first, float second) {
int word;
asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
return word;
}
"""

DENSE_SOURCE = (
    "__device__ __forceinline__ void multiply(float* s, const int* a, const int* b) {\n"
    + "".join(
        'asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 '
        '{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"\n'
        f": {_SUMS} : {_inputs('a', 4 * i, 4)}, {_inputs('b', 2 * i, 2)});\n"
        for i in range(2)
    )
    + "}\n"
)


def sparse_source(which: int) -> str:
    """`multiply` for the first or second 16 of 32 channels whose places a word holds."""
    return (
        f"__device__ __forceinline__ void multiply_{which}"
        "(float* s, const int* a, const int* b, int places) {\n"
        'asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 '
        f'{{%0,%1,%2,%3}}, {{%4,%5,%6,%7}}, {{%8,%9,%10,%11}}, {{%0,%1,%2,%3}}, %12, {which};"\n'
        f': {_SUMS} : {_inputs("a", 0, 4)}, {_inputs("b", 0, 4)}, "r"(places));\n'
        "}\n"
    )
