"""The file of a shard: a safetensors header, then the columns, the widest items first, so that every column is aligned."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from store.files import json_bytes
from store.packing.sink import Advance, Sink, as_bytes
from store.shards import METADATA_KEY, SAFETENSORS_NAMES, columns_of, crc32c_hex
from store.sites import Point, Stream


def row_bytes(stream: Stream, points: tuple[Point, ...], d_model: int, dtype: Any) -> int:
    """Bytes of a row in a shard."""
    columns = columns_of(stream, points, dtype)
    return sum(np.dtype(kind).itemsize * (d_model if name in points else 1) for name, kind in columns.items())


def write_shard(
    path: Path,
    about: Mapping[str, Any],
    activations: Mapping[Point, np.ndarray],
    order: np.ndarray,
    provenance: Mapping[str, np.ndarray],
    block: np.ndarray,
    advance: Advance,
) -> dict[str, Any]:
    """Write a shard: the rows `order` of `activations` (row, d_model), and `provenance` as it is; its length and CRC-32C."""
    columns: dict[str, np.ndarray] = {**{str(point): column for point, column in activations.items()}, **provenance}
    dtypes = {name: column.dtype for name, column in columns.items()}
    names = sorted(dtypes, key=lambda name: (-dtypes[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: json_bytes(about).decode()}}
    end = 0
    for name in names:
        shape = [len(order), *columns[name].shape[1:]]
        begin, end = end, end + dtypes[name].itemsize * int(np.prod(shape))
        header[name] = {"dtype": SAFETENSORS_NAMES[dtypes[name].type], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with Sink(path, block, advance) as sink:
        sink.put(np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8))
        for name in names:
            if name in provenance:
                sink.put(provenance[name])
            else:
                sink.gather(as_bytes(columns[name]), order)
    return {"bytes": sink.bytes, "crc32c": f"{sink.crc:08x}"}


def entry_of(data: bytes) -> dict[str, Any]:
    """What the manifest says of a small file."""
    return {"bytes": len(data), "crc32c": crc32c_hex(data)}
