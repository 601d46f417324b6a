"""Conversions at the border; inside finefit there are only bytes, seconds, FLOPs and money with its currency."""

from __future__ import annotations

KIB = 2**10
MIB = 2**20
GIB = 2**30
MINUTE_S = 60.0
HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
MONTH_S = 730 * HOUR_S
"""As clouds bill a month: 365 / 12 days."""
KWH_JOULES = 3.6e6

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes per element of the dtypes that a TrainSetup may name."""


def gib(num_bytes: float) -> float:
    """Bytes as GiB (2**30)."""
    return num_bytes / GIB


def gib_to_bytes(value_gib: float) -> int:
    """GiB (2**30) as whole bytes."""
    return round(value_gib * GIB)


def format_bytes(num_bytes: float) -> str:
    """Bytes as people read them: GiB with one decimal, MiB below a tenth of a GiB.

    >>> format_bytes(25 * 2**30), format_bytes(3 * 2**20)
    ('25.0 GiB', '3 MiB')
    """
    if abs(num_bytes) >= 0.1 * GIB:
        return f"{num_bytes / GIB:.1f} GiB"
    return f"{num_bytes / MIB:.0f} MiB"


def format_bytes_finely(num_bytes: float) -> str:
    """Bytes where a prediction's error should show: GiB with two decimals, MiB with one below a GiB.

    >>> format_bytes_finely(25 * 2**30), format_bytes_finely(3.25 * 2**20)
    ('25.00 GiB', '3.2 MiB')
    """
    if abs(num_bytes) >= GIB:
        return f"{num_bytes / GIB:.2f} GiB"
    return f"{num_bytes / MIB:.1f} MiB"


def format_count(count: float) -> str:
    """A large count as people read it.

    >>> format_count(8_030_261_248), format_count(134_515_008), format_count(4096)
    ('8.03 B', '134.5 M', '4096')
    """
    if count >= 1e9:
        return f"{count / 1e9:.2f} B"
    if count >= 1e6:
        return f"{count / 1e6:.1f} M"
    return f"{count:.0f}"


def format_duration(seconds: float) -> str:
    """Seconds as people read them.

    >>> format_duration(42), format_duration(7325), format_duration(200000)
    ('42 s', '2 h 02 min', '55 h 33 min')
    """
    if seconds < 90:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"
