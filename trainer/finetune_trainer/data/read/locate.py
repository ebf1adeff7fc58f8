"""One address in a document -> the objects it stands for: a file, the files a pattern matches, or a folder.

In patterns `*` and `?` stay within a name, `**` crosses slashes and `[a-c]` is one of these characters. An object that
has the very name is taken before any that match it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.parse import quote

from finetune_trainer.storage import StorageSettings, Store, open_store, split_uri
from finetune_trainer.storage.base import parse_uri

from .base import DataError, some

FILES_LIMIT = 10_000
_MAGIC = re.compile(r"[*?\[]")
_SHOWN = 5


@dataclass(frozen=True)
class Located:
    """An object to read rows from. The key of a folder ends with a slash."""

    store: Store
    key: str
    uri: str


def locate(uri: str, settings: StorageSettings) -> list[Located]:
    """What `uri` stands for, in the order of the keys.

    Raises DataError NothingMatches, StorageError where the store fails; whether a file exists is found when it is read.
    """
    scheme, bucket, path = parse_uri(uri)
    root = f"{scheme}://{bucket}" if bucket else "file://"
    if uri.endswith("/"):
        return [_folder(uri, settings)]
    if not _MAGIC.search(path):
        store_uri, key = split_uri(uri)
        return [Located(open_store(store_uri, settings), key, uri)]
    if _is_there(uri, settings):
        store_uri, key = split_uri(uri)
        return [Located(open_store(store_uri, settings), key, uri)]
    fixed = path[: _MAGIC.search(path).start()].rpartition("/")[0]  # type: ignore[union-attr]
    pattern = path[len(fixed) :].lstrip("/")
    store_uri = Path(fixed or "/").as_uri() if scheme == "file" else "/".join(filter(None, (root, fixed)))
    return _matches(open_store(store_uri, settings), pattern, uri)


def _folder(uri: str, settings: StorageSettings) -> Located:
    """A folder is listed by its own name, below the store of the directory it lies in."""
    scheme, bucket, path = parse_uri(uri)
    if scheme == "file":
        return Located(open_store(uri.rstrip("/"), settings), "", uri)
    return Located(open_store(f"{scheme}://{bucket}", settings), f"{path}/" if path else "", uri)


def _is_there(uri: str, settings: StorageSettings) -> bool:
    store_uri, key = split_uri(uri)
    return open_store(store_uri, settings).head(key) is not None


def _matches(store: Store, pattern: str, uri: str) -> list[Located]:
    wanted = re.compile(translate(pattern))
    beginning = pattern[: _MAGIC.search(pattern).start()]  # type: ignore[union-attr]
    found = list(islice((info.key for info in store.list(beginning) if wanted.fullmatch(info.key)), FILES_LIMIT + 1))
    if len(found) > FILES_LIMIT:
        raise DataError(
            "TooManyFiles", f"{uri}: more than {FILES_LIMIT} files match; join them, or narrow the pattern."
        )
    if not found:
        raise DataError("NothingMatches", f"{uri}: no file matches; {_lies(store)}.")
    quoted = quote if store.uri.startswith("file:") else str
    return [Located(store, key, f"{store.uri.rstrip('/')}/{quoted(key)}") for key in found]


def _lies(store: Store) -> str:
    keys = list(islice((info.key for info in store.list()), 1000))
    if not keys:
        return f"there is nothing below {store.uri}; upload the files or correct the pattern"
    return f"below {store.uri} lies {some(keys, _SHOWN)}; correct the pattern"


def translate(pattern: str) -> str:
    """A regular expression that matches, as a whole, the keys that a pattern means."""
    return "".join(_pieces(pattern))


def _pieces(pattern: str) -> Iterator[str]:
    at = 0
    while at < len(pattern):
        if pattern.startswith("**/", at):
            yield "(?:.*/)?"
            at += 3
        elif pattern.startswith("**", at):
            yield ".*"
            at += 2
        elif pattern[at] in "*?":
            yield "[^/]*" if pattern[at] == "*" else "[^/]"
            at += 1
        elif pattern[at] == "[" and (end := pattern.find("]", at + 2)) > 0:
            inside = pattern[at + 1 : end].replace("\\", "\\\\")
            negated = inside.startswith(("!", "^"))
            # every character but the hyphen of a range stands for itself
            body = re.sub(r"([\[\]&~|^])", r"\\\1", inside[1:] if negated else inside)
            yield f"[{'^/' if negated else ''}{body}]"
            at = end + 1
        else:
            yield re.escape(pattern[at])
            at += 1
