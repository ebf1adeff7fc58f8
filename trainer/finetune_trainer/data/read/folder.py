"""A folder of images: directories are the classes, as in `folder/cat/1.jpg`.

Each file is a row {image: bytes, label: name of the directory, path: relative to the folder}, in the order of the keys.
What lies deeper belongs to the class at the top; hidden files (.DS_Store) are left out.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from finetune_trainer.storage import NotFound, ObjectInfo, Store
from finetune_trainer.storage.digests import digest_of

from .base import ROW_LIMIT, DataError, File, Row
from .images import ENDINGS

_AHEAD = 8
"""Images that are fetched at once, as long as they take no more than ROW_LIMIT together."""


def listing(store: Store, prefix: str, file: File) -> tuple[list[ObjectInfo], ObjectInfo]:
    """The files of a folder, and the folder described as one object: total size, a tag that changes with any file.

    Raises DataError where there are none.
    """
    found = [
        info
        for info in store.list(prefix)
        if (info.size or _is_image(info.key))  # stores mark directories by empty objects
        and not any(part.startswith(".") for part in info.key[len(prefix) :].split("/"))
    ]
    if not found:
        raise DataError(
            "NothingMatches", f"{file.uri}: the folder holds no files; correct the address or upload images there."
        )
    tags = hashlib.sha256("".join(f"{info.key}\0{info.size}\0{info.etag}\n" for info in found).encode())
    return found, ObjectInfo(prefix, sum(info.size for info in found), tags.hexdigest(), None)


def rows(
    store: Store, prefix: str, files: Sequence[ObjectInfo], file: File, *, hashed: Callable[[bytes], object]
) -> Iterator[Row | DataError]:
    """A row a file; `hashed` takes what the folder's digest is made of: each path and the digest of its content."""
    file.columns = ["image", "label", "path"]
    for number, info, data in _contents(store, files, file):
        path = info.key[len(prefix) :]
        if isinstance(data, DataError):
            yield data
            continue
        hashed(f"{path}\0{digest_of(data)}\n".encode())
        label, slash, _ = path.partition("/")
        if not slash:
            yield _problem(
                file, path, "the file lies in no directory of a class; move it to folder/class/file"
                + ("." if _is_image(path) else ", or name files of rows by a pattern such as folder/*.jsonl.")
            )  # fmt: skip
        elif not data:
            yield _problem(file, path, "the file is empty; replace or remove it.")
        elif not _is_image(path):
            yield _problem(file, path, f"not an image by its name (.{', .'.join(ENDINGS)}); rename or remove the file.")
        else:
            yield Row(number, {"image": data, "label": label, "path": path}, path)


def _is_image(path: str) -> bool:
    return path.rpartition(".")[2].lower() in ENDINGS


def _problem(file: File, path: str, said: str) -> DataError:
    return DataError("InvalidRow", f"{file.uri}{path}: {said}")


def _contents(
    store: Store, files: Sequence[ObjectInfo], file: File
) -> Iterator[tuple[int, ObjectInfo, bytes | DataError]]:
    """The files with their numbers, fetched a few at a time, in order."""
    pending: deque[tuple[int, ObjectInfo, Future[bytes] | None]] = deque()
    waiting = 0
    with ThreadPoolExecutor(_AHEAD) as pool:
        for number, info in enumerate(files, start=1):
            while pending and (len(pending) >= _AHEAD or waiting + info.size > ROW_LIMIT):
                waiting -= pending[0][1].size
                yield _taken(*pending.popleft(), file)
            fetch = None
            if info.size <= ROW_LIMIT:
                fetch = pool.submit(store.read, info.key, if_match=info.etag)
            pending.append((number, info, fetch))
            waiting += info.size
        while pending:
            yield _taken(*pending.popleft(), file)


def _taken(
    number: int, info: ObjectInfo, fetch: Future[bytes] | None, file: File
) -> tuple[int, ObjectInfo, bytes | DataError]:
    if fetch is None:
        return number, info, file.too_long(number)
    try:
        return number, info, fetch.result()
    except NotFound:
        return number, info, file.bad_row(number, "the image was deleted while it was read; upload it again.")
