"""Rows out of files from strangers: jsonl, csv, tsv, plain text, parquet, arrow, tar and folders of images.

Text formats and tar are read once, in a stream of bounded memory (as .gz and .zst too), and the object's digest comes
out of the same pass. Tables keep their directory at the end, so they go through a scratch file, hashed while it is
written. A row may have 64 MiB, and what decompresses to more than 200 times its size is refused.

Two kinds of error: a row that cannot be read is *yielded* as a DataError, so that one pass can report many of them; a
file that cannot be read any further *raises* one. No message holds a row's content.
"""

from .base import MIB, ROW_LIMIT, DataError, Row
from .locate import Located, locate
from .rows import Format, Rows, format_of

__all__ = ["MIB", "ROW_LIMIT", "DataError", "Format", "Located", "Row", "Rows", "format_of", "locate"]
