"""Parquet: only the wanted columns are read, batch by batch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .base import MIB, ROW_LIMIT, DataError, File, Row, weight

_BATCH = 256
_RATIO_LIMIT = 1000
"""Times its own size a file may decompress to, once it has passed ROW_LIMIT."""


def rows(path: Path, file: File) -> Iterator[Row | DataError]:
    """A row a row. Raises where the file is not whole."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as table:
            file.columns = list(table.schema_arrow.names)
            present = [name for name in dict.fromkeys(file.wanted) if name in file.columns]
            _refuse_huge_groups(table.metadata, path.stat().st_size, file)
            number = 0
            for batch in table.iter_batches(batch_size=_BATCH, columns=present, use_threads=False):
                for values in cells(batch):
                    number += 1
                    yield Row(number, values) if weight(values) <= ROW_LIMIT else file.too_long(number)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise file.invalid(f"not a whole parquet file ({type(error).__name__}); write it again.") from error


def cells(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow record batch as Python values."""
    values = [column.to_pylist() for column in batch.columns]
    names = batch.schema.names
    for row in zip(*values, strict=True) if values else ((),) * batch.num_rows:
        yield dict(zip(names, row, strict=True))


def _refuse_huge_groups(metadata: Any, size: int, file: File) -> None:
    """Row groups alone are looked at: pyarrow ends the process where a damaged file's column chunks are asked for."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    total = sum(group.total_byte_size for group in groups)
    if total > ROW_LIMIT and total > _RATIO_LIMIT * size:
        raise DataError(
            "DecompressionBomb",
            f"{file.uri}: decompresses to {total // MIB} MiB, more than {_RATIO_LIMIT} times its size; write it "
            "without compression.",
        )
    for number, group in enumerate(groups, start=1):
        if group.total_byte_size > ROW_LIMIT * max(1, group.num_rows):
            raise file.invalid(f"rows of row group {number} are longer than {ROW_LIMIT // MIB} MiB; split them.")
