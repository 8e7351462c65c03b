"""Sizes and numbers in words: `2GB` and `1.5 TiB` in, `1.34 GB` and `3 shards` out."""

import re

from store.errors import UsageError

UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "PB": 10**15,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "PIB": 2**50,
}
SHOWN = ("B", "KB", "MB", "GB", "TB", "PB")


def parse_size(text: str) -> int:
    """Bytes in `2GB`, `512 MiB` or `1.5GB`; `UsageError` for what is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGTP]?i?B)", text.strip(), re.IGNORECASE)
    if match is None or match[2].upper() not in UNITS:
        raise UsageError(f"{text!r} is no size: write for example 2GB or 512MB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def human_size(size: float | int) -> str:
    """`1.34 GB`: three digits, powers of ten; 999.6 MB are 1 GB and not 1e+03 MB."""
    unit = max((u for u in SHOWN if float(f"{size:.3g}") >= UNITS[u]), key=UNITS.__getitem__, default="B")
    return f"{float(f'{size / UNITS[unit]:.3g}'):g} {unit}"


def picture_size(width: int, height: int, times: str = "x") -> str:
    """`64x64 pixels`, `48x32 pixels (width x height)`: width first everywhere, and said where the two differ."""
    which = "" if width == height else f" (width {times.strip()} height)"
    return f"{width}{times}{height} pixels{which}"


def many(count: int, what: str) -> str:
    """`1 shard`, `1,234 shards`"""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
