"""Tables on disk: Parquet, whole or absent, equal bytes for equal tables."""

import io
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from store.errors import DamagedError
from store.files import write_bytes


def table_bytes(table: pa.Table) -> bytes:
    """A table as Parquet, compressed with zstd."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def write_table(path: Path, table: pa.Table) -> None:
    """Publish a table as Parquet."""
    write_bytes(path, table_bytes(table))


def read_table(path: Path, again: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The table of a Parquet file, or some of its columns; `DamagedError`, which ends in `again`, where it cannot be read."""
    try:
        return pq.read_table(path, columns=None if columns is None else list(columns), partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise DamagedError(f"{path} cannot be read ({error}): {again}") from None
