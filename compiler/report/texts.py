"""Numbers as the page writes them."""

from __future__ import annotations


def us_text(us: float | None) -> str:
    """Microseconds as a column has them: `1360.6`, an en dash where nobody knows."""
    return "–" if us is None else f"{us:.1f}"


def time_text(us: float) -> str:
    """With its unit, to three digits: `7.50 µs`, `254 µs`, `13.4 ms`."""
    if us >= 999.5e3:
        return f"{_digits(us / 1e6)} s"
    if us >= 999.5:
        return f"{_digits(us / 1e3)} ms"
    return f"{_digits(us)} µs"


def axis_time(us: float) -> str:
    """On an axis: `0`, `50 µs`, `2.5 ms`."""
    if us == 0:
        return "0"
    return f"{us / 1e3:.4g} ms" if us >= 1000 else f"{us:.4g} µs"


def share_text(share: float | None) -> str:
    """`10 %`; a digit more where it is small, and an en dash where nobody knows."""
    if share is None:
        return "–"
    percent = 100 * share
    if percent >= 99.95 or percent == 0:
        return f"{percent:.0f} %"
    return f"{percent:.1f} %" if percent >= 0.1 else "< 0.1 %"


def accuracy_text(share: float) -> str:
    """`91.65 %`: a hundredth of a percent is an image of ten thousand."""
    return f"{100 * share:.2f} %"


def count_text(count: int | None) -> str:
    """`940`, `12 k`, `1.2 M`; an en dash where nobody knows."""
    if count is None:
        return "–"
    if count >= 999_500:
        return f"{count / 1e6:.1f} M"
    return f"{count / 1e3:.0f} k" if count >= 10_000 else f"{count}"


def axis_share(share: float) -> str:
    """On an axis: `100 %`, `0.5 %`."""
    return f"{100 * share:.4g} %"


def gain_text(gain: float | None) -> str:
    """`3.9×`."""
    if gain is None:
        return "–"
    return f"{gain:.1f}×" if gain < 99.95 else f"{gain:.0f}×"


def factor_text(factor: float) -> str:
    """`1.25×`: what was asked for, and what came of it."""
    return f"{factor:.2f}×"


def error_text(error: float | None) -> str:
    """`+4.1 %`, with a real minus sign."""
    return "–" if error is None else f"{100 * error:+.1f} %".replace("-", "−")


def _digits(value: float) -> str:
    """Three of them: `7.50`, `13.4`, `254`."""
    return f"{value:#.3g}".rstrip(".")
