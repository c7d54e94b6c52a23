"""How numbers and names are written in every report and table."""

from __future__ import annotations

import os.path
from collections.abc import Sequence

MISSING = "–"


def ms(value: float | None) -> str:
    """Three significant digits, never an exponent.

    Example:
        >>> ms(0.84312), ms(12.345), ms(1234.6), ms(None)
        ('0.843', '12.3', '1235', '–')
    """
    return MISSING if value is None else _significant(value)


def percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f}%"


def points(value: float | None) -> str:
    """A difference of fractions in percentage points, with a true minus sign.

    Example:
        >>> points(0.00333), points(-0.0067), points(-0.000001)
        ('0.33', '−0.67', '0.00')
    """
    if value is None:
        return MISSING
    text = f"{100 * value:.2f}"
    return text.replace("-", "" if float(text) == 0 else "−")


def times(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def size(n_bytes: int | None) -> str:
    """Decimal units, as disks and networks count.

    Example:
        >>> size(3_612_345), size(812), size(1_240_000_000)
        ('3.6 MB', '812 B', '1.24 GB')
    """
    if n_bytes is None:
        return MISSING
    if n_bytes < 1000:
        return f"{n_bytes} B"
    for unit, name, digits in ((1e9, "GB", 2), (1e6, "MB", 1), (1e3, "kB", 1)):
        if n_bytes >= unit:
            return f"{n_bytes / unit:.{digits}f} {name}"
    raise AssertionError(n_bytes)


def millions(n: int) -> str:
    """
    Example:
        >>> millions(183_420_117), millions(17_612_000), millions(4_200), millions(0)
        ('183', '17.6', '0.004', '0')
    """
    return _significant(n / 1e6) if n else "0"


def seconds(value: float) -> str:
    """
    Example:
        >>> seconds(0.004), seconds(4.21), seconds(75), seconds(3725)
        ('0.00 s', '4.2 s', '1 min 15 s', '1 h 02 min')
    """
    if value < 1:
        return f"{value:.2f} s"
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def error(value: float) -> str:
    """A relative error: two significant digits with an exponent, as people compare them."""
    return f"{value:.1e}"


def interval(low: str, high: str) -> str:
    return f"[{low}, {high}]"


def count(n: int, one: str, many: str = "") -> str:
    """
    Example:
        >>> count(1, "step"), count(1200, "picture")
        ('1 step', '1,200 pictures')
    """
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def shortened(names: Sequence[str], length: int) -> list[str]:
    """Names cut to ``length`` so that they stay apart: without their middles, else without what they share in front.

    Example:
        >>> shortened(["fp32", "int8-static-u8s8-minmax"], 12)
        ['fp32', 'int8-s…inmax']
        >>> shortened(["int8-static-99.9-conv-gemm", "int8-static-99.8-conv-gemm"], 12)
        ['…99.9-conv-g', '…99.8-conv-g']
    """
    tail = (length - 1) // 2
    middles = [name if len(name) <= length else f"{name[: length - 1 - tail]}…{name[-tail:]}" for name in names]
    cut = []
    for name, middle in zip(names, middles, strict=True):
        alike = [other for other, same in zip(names, middles, strict=True) if same == middle]
        # From the last whole word that they share: names, not paths, so characters are what is compared.
        shared = os.path.commonprefix(alike).rfind("-") + 1  # noqa: RUF071
        cut.append(middle if len(alike) == 1 else f"…{name[shared:]}"[:length])
    return cut


def _significant(value: float) -> str:
    magnitude = abs(value)
    digits = 0 if magnitude >= 99.95 else 1 if magnitude >= 9.995 else 2 if magnitude >= 0.9995 else 3
    return f"{value:.{digits}f}"
