"""The documents that creation writes: Zarr's metadata of every group and array, and the dataset card.

zarr-python makes them, in memory; they are functions of the StoreMeta alone, so a lost one can be made again.
"""

from typing import Any

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from store import layout
from store.card import card_of
from store.chunks import ZSTD_LEVEL
from store.format import ArraySpec, StoreMeta, array_specs, metadata_files


def documents(meta: StoreMeta) -> dict[str, bytes]:
    """Name and content of every file that creation writes, weights aside, in the order of their names."""
    made = {layout.ROOT: _group({"granary": meta.attributes()}), layout.CARD: card_of(meta).encode()}
    made |= {f"{spec.name}/{layout.ROOT}": _array(spec) for spec in array_specs(meta)}
    plain = _group({})
    return {name: made.get(name, plain) for name in sorted(metadata_files(meta))}


def _group(attributes: dict[str, Any]) -> bytes:
    store = MemoryStore()
    zarr.create_group(store, zarr_format=3, attributes=attributes)
    return _document(store)


def _array(spec: ArraySpec) -> bytes:
    store = MemoryStore()
    zarr.create_array(
        store,
        shape=spec.shape,
        chunks=spec.chunk,
        dtype=spec.dtype,
        fill_value=np.nan if spec.fill == "NaN" else spec.fill,
        serializer=BytesCodec(),
        compressors=[ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()] if spec.codec == "zstd" else [Crc32cCodec()],
        filters=(),
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=("image", "token", "channel")[: len(spec.shape)],
        attributes=spec.attributes,
        zarr_format=3,
    )
    return _document(store)


def _document(store: MemoryStore) -> bytes:
    found = sync(store.get(layout.ROOT, prototype=default_buffer_prototype()))
    assert found is not None
    return bytes(found.to_bytes())
