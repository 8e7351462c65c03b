"""Tables on disk: Parquet, whole or absent, equal bytes for equal tables."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from store.files import write_bytes


def table_bytes(table: pa.Table) -> bytes:
    """A table as Parquet, compressed with zstd."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def write_table(path: Path, table: pa.Table) -> None:
    """Publish a table as Parquet."""
    write_bytes(path, table_bytes(table))
