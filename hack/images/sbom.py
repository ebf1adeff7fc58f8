"""Prints what an image is made of as a CycloneDX 1.6 document: Debian's packages, and Python's in this environment.

Runs inside the image while it is built, so with the standard library alone: `sbom.py NAME`. The same packages give the
same document, byte for byte.

https://cyclonedx.org/docs/1.6/json/
"""

import json
import re
import sys
import uuid
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any
from urllib.parse import quote

DPKG = Path("/var/lib/dpkg/status")
NAMESPACE = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")
"""Of names that are URLs, RFC 4122."""


def debian(status: str, distribution: str) -> Iterator[dict[str, Any]]:
    """The installed packages in dpkg's own list."""
    for paragraph in status.split("\n\n"):
        fields = dict(re.findall(r"^([A-Z][\w-]*): (.*)$", paragraph, re.MULTILINE))
        if fields.get("Status") == "install ok installed":
            name, version, arch = fields["Package"], fields["Version"], fields["Architecture"]
            purl = f"pkg:deb/debian/{quote(name)}@{quote(version, safe='')}?arch={arch}&distro={quote(distribution)}"
            yield {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def python(found: Distribution) -> dict[str, Any]:
    """One installed distribution, with its license where it names one in a word."""
    name, version = re.sub(r"[-_.]+", "-", found.name).lower(), found.version
    purl = f"pkg:pypi/{quote(name)}@{quote(version, safe='')}"
    made: dict[str, Any] = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
    expression, words = found.metadata.get("License-Expression"), (found.metadata.get("License") or "").strip()
    if expression:
        made["licenses"] = [{"expression": expression}]
    elif words and len(words) < 80 and "\n" not in words:
        made["licenses"] = [{"license": {"name": words}}]
    return made


def document(image: str, components: list[dict[str, Any]]) -> dict[str, Any]:
    """Sorted; its serial number follows from its content."""
    ordered = [one for _, one in sorted({one["purl"]: one for one in components}.items())]
    serial = uuid.uuid5(NAMESPACE, json.dumps([image, ordered], sort_keys=True))
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {"component": {"type": "container", "bom-ref": image, "name": image}},
        "components": ordered,
    }


def main() -> int:
    release = Path("/etc/os-release").read_text(encoding="utf-8") if Path("/etc/os-release").exists() else ""
    fields = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', release, re.MULTILINE))
    distribution = f"{fields.get('ID', 'debian')}-{fields.get('VERSION_ID', 'unknown')}"
    packages = list(debian(DPKG.read_text(encoding="utf-8"), distribution)) if DPKG.exists() else []
    packages += [python(found) for found in distributions()]
    json.dump(document(sys.argv[1], packages), sys.stdout, indent=1, ensure_ascii=False)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
