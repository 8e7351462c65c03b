"""Tables on disk: Parquet, whole or absent, equal bytes for equal tables."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from store.files import publish


def write_table(path: Path, table: pa.Table) -> None:
    """Publish a table as Parquet, compressed with zstd."""
    publish(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))
