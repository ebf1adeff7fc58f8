"""Write an image of buildah's storage as an OCI archive that leaves out the layers its reader already holds.

`buildah push` compresses and rewrites every layer on every push: three minutes for the trainer image, of which a
change of code touches 1 MB. The storage has all that is needed beside the files themselves: the manifest, the config,
and for each layer the headers of its tar stream (tar-split), from which the stream is put together again bit by bit.
The reader checks its SHA-256.

    export.py STORAGE IMAGE            the digests of the manifest and of the config
    export.py STORAGE IMAGE HELD       the archive on standard output, without the blobs that the folder HELD has
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

CHUNK = 1 << 20


def read_image(storage: Path, name: str) -> tuple[dict[str, Any], bytes, bytes]:
    """Return the storage's entry, the manifest and the config of an image."""
    for image in json.loads((storage / "overlay-images/images.json").read_bytes()):
        if name in (image.get("names") or []):
            folder = storage / "overlay-images" / image["id"]
            manifest = (folder / "manifest").read_bytes()
            key = json.loads(manifest)["config"]["digest"]
            return image, manifest, (folder / ("=" + base64.b64encode(key.encode()).decode())).read_bytes()
    raise SystemExit(f"export: no image {name} in {storage}; build it with: make image")


def layer_ids(storage: Path, top: str) -> dict[str, str]:
    """Map the digest of each layer's tar stream to the layer's id, for the chain that ends in `top`."""
    layers = {layer["id"]: layer for layer in json.loads((storage / "overlay-layers/layers.json").read_bytes())}
    found: dict[str, str] = {}
    while top:
        found[layers[top]["diff-digest"]] = top
        top = layers[top].get("parent", "")
    return found


def layer_stream(storage: Path, layer: str) -> Iterator[bytes]:
    """Yield a layer's tar stream: headers and padding from tar-split, contents from the files."""
    diff = storage / "overlay" / layer / "diff"
    with gzip.open(storage / "overlay-layers" / f"{layer}.tar-split.gz") as entries:
        for line in entries:
            entry = json.loads(line)
            if entry["type"] == 2:
                yield base64.b64decode(entry["payload"])
            elif entry.get("size"):
                raw = entry.get("name_raw")  # a name that is not UTF-8
                name = os.fsdecode(base64.b64decode(raw)) if raw else entry["name"]
                with (diff / name).open("rb") as file:
                    while chunk := file.read(CHUNK):
                        yield chunk


def add(out: BinaryIO, name: str, size: int, chunks: Iterator[bytes]) -> None:
    """Append one file of a known size whose content comes in chunks."""
    info = tarfile.TarInfo(name)
    info.size = size
    out.write(info.tobuf(tarfile.GNU_FORMAT))
    written = 0
    for chunk in chunks:
        out.write(chunk)
        written += len(chunk)
    if written != size:
        raise SystemExit(
            f"export: {name} is {written} bytes long instead of {size}; remove buildah's damaged storage {sys.argv[1]}"
        )
    out.write(bytes(-size % tarfile.BLOCKSIZE))


def export(storage: Path, name: str, held: Path, out: BinaryIO) -> None:
    """Write the archive."""
    image, manifest, config = read_image(storage, name)
    layers = layer_ids(storage, image["layer"])
    digest = "sha256:" + hashlib.sha256(manifest).hexdigest()
    media_type = json.loads(manifest).get("mediaType", "application/vnd.oci.image.manifest.v1+json")
    reference = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name}
    entry = {"mediaType": media_type, "digest": digest, "size": len(manifest), "annotations": reference}
    files = {
        "oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
        "index.json": json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode(),
        f"blobs/sha256/{digest[7:]}": manifest,
        f"blobs/sha256/{hashlib.sha256(config).hexdigest()}": config,
    }
    for path, content in files.items():
        add(out, path, len(content), iter([content]))
    for layer in json.loads(manifest)["layers"]:
        key = layer["digest"][7:]
        if not (held / key).exists():
            add(out, f"blobs/sha256/{key}", layer["size"], layer_stream(storage, layers[layer["digest"]]))
    out.write(bytes(2 * tarfile.BLOCKSIZE))


def main() -> None:
    """Run the command line."""
    storage, name = Path(sys.argv[1]), sys.argv[2]
    if len(sys.argv) > 3:
        export(storage, name, Path(sys.argv[3]), sys.stdout.buffer)
    else:
        _, manifest, _ = read_image(storage, name)
        print("sha256:" + hashlib.sha256(manifest).hexdigest(), json.loads(manifest)["config"]["digest"])


if __name__ == "__main__":
    main()
