"""One chunk as it lies in a file, and back: the codecs of a store, byte for byte what zarr-python writes and reads.

none    the values, little endian, row by row; then their CRC-32C in 4 bytes
zstd    the values compressed by zstd at level 1; then the CRC-32C of that

fp8-e4m3 has one more step before: a row is divided by its scale, the least power of two that brings it
within the format's range, and rounded.  Powers of two cost no precision, and times its scale every
stored value is a bfloat16 again, exactly.
"""

import sys
from collections.abc import Sequence
from functools import cache

import crc32c
import ml_dtypes
import numpy as np
import pyarrow as pa
from numcodecs.zstd import Zstd

from store.errors import DamagedError
from store.format import Codec, to_float32
from store.places import Place

TRAILER = 4
ZSTD_LEVEL = 1
E4M3_MAX = 448.0

assert sys.byteorder == "little", "stores are little endian, and so are all machines that torch runs on"


def encode(values: np.ndarray, codec: Codec) -> tuple[memoryview, bytes]:
    """The content of a chunk's file in two pieces, the first without a copy where nothing is compressed."""
    plain = np.ascontiguousarray(values)
    if codec == "zstd":
        payload = memoryview(Zstd(level=ZSTD_LEVEL).encode(plain.reshape(-1).view(np.uint8)))
    else:
        payload = plain.reshape(-1).view(np.uint8).data
    return payload, crc32c.crc32c(payload).to_bytes(TRAILER, "little")


def padded(values: np.ndarray, images: int, fill: int | str) -> np.ndarray:
    """Values filled up to a whole chunk, as Zarr keeps the last one."""
    if len(values) == images:
        return values
    whole = np.full((images, *values.shape[1:]), np.nan if fill == "NaN" else fill, values.dtype)
    whole[: len(values)] = values
    return whole


def read_chunk(
    place: Place,
    name: str,
    shape: Sequence[int],
    dtype: str,
    codec: Codec,
    crc: int | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """A chunk, checked by its CRC-32C, which must be `crc` where that is known.

    It is read into `out`, contiguous and of its shape, without a copy where nothing is compressed.

    `FileNotFoundError` when the file is missing, `DamagedError` when it holds anything but such a chunk.
    """
    values = np.empty(tuple(shape), dtype) if out is None else out
    raw = values.reshape(-1).view(np.uint8).data
    if codec == "none":
        count, trailer = place.read_into(name, raw)
        _check(place, name, raw[:count], trailer, len(raw), crc)
        return values
    data = place.read(name)
    _check(place, name, memoryview(data)[:-TRAILER], data[-TRAILER:], None, crc)
    try:  # into as many bytes as there should be, whatever the data claim
        plain = np.frombuffer(pa.decompress(data[:-TRAILER], decompressed_size=len(raw), codec="zstd"), np.uint8)
    except OSError as error:
        raise DamagedError(f"{place.where(name)} is not {len(raw)} bytes of values compressed: {error}") from None
    values.reshape(-1).view(np.uint8)[:] = plain
    return values


def _check(place: Place, name: str, payload: memoryview, trailer: bytes, expected: int | None, crc: int | None) -> None:
    if expected is not None and (len(payload) != expected or len(trailer) != TRAILER):
        found = len(payload) + len(trailer)
        raise DamagedError(f"{place.where(name)} has {found} bytes where a chunk has {expected + TRAILER}")
    if len(trailer) != TRAILER or crc32c.crc32c(payload) != int.from_bytes(trailer, "little"):
        raise DamagedError(f"{place.where(name)} does not have the CRC-32C that it ends with: it was damaged")
    if crc is not None and crc != int.from_bytes(trailer, "little"):
        raise DamagedError(f"{place.where(name)} is a whole chunk, but not the one that was committed")


def to_e4m3(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bfloat16 (…, d_model) as float8-e4m3 bits, uint8, and the scale of each row, float32 powers of two.

    A row with a NaN or an infinity gets the scale NaN; a row of zeros 1.
    """
    exact = to_float32(values)
    peak = np.abs(exact).max(axis=-1)
    with np.errstate(invalid="ignore"):
        mantissa, exponent = np.frexp(peak / np.float32(E4M3_MAX))
    exponent = np.maximum(exponent - (mantissa == 0.5), -126)  # below, float32 has no normal numbers
    scale = np.where(peak > 0, np.ldexp(np.float32(1), exponent), np.float32(1))
    scale = np.where(np.isfinite(peak), scale, np.float32(np.nan)).astype(np.float32)
    with np.errstate(invalid="ignore"):
        reduced = (exact / scale[..., None]).astype(ml_dtypes.bfloat16)
    return _e4m3_of_bfloat16()[reduced.view(np.uint16)], scale


def from_e4m3(bits: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """bfloat16 (…, d_model) from float8-e4m3 bits and the scale of each row."""
    exact = _float32_of_e4m3()[bits]
    with np.errstate(over="ignore", invalid="ignore"):  # above 3.3e38 rounding gives infinity, which the writer refuses
        exact *= scale[..., None]
    return np.asarray((exact.view(np.uint32) >> 16).astype(np.uint16).view(ml_dtypes.bfloat16))


@cache
def _e4m3_of_bfloat16() -> np.ndarray:
    every = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(every.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


@cache
def _float32_of_e4m3() -> np.ndarray:
    return np.asarray(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32))
