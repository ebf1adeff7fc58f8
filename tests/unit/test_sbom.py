"""What an image says it is made of. The images' own lists are read in tests/e2e/test_cluster.py."""

import json
import re
import subprocess
import sys
from importlib.metadata import distribution, distributions
from pathlib import Path

import pytest
from hack.images import sbom

ROOT = Path(__file__).resolve().parents[2]
STATUS = """\
Package: libc6
Status: install ok installed
Architecture: amd64
Version: 2.36-9+deb12u10
Description: a library
 Version: 3 of nothing

Package: gone
Status: deinstall ok config-files
Architecture: all
Version: 1:2.0~rc1-1

Package: tzdata
Status: install ok installed
Architecture: all
Version: 1:2024a-0+deb12u1
"""


def test_packages_that_are_installed_are_listed_with_their_addresses() -> None:
    assert [(one["name"], one["version"], one["purl"]) for one in sbom.debian(STATUS, "debian-12")] == [
        ("libc6", "2.36-9+deb12u10", "pkg:deb/debian/libc6@2.36-9%2Bdeb12u10?arch=amd64&distro=debian-12"),
        ("tzdata", "1:2024a-0+deb12u1", "pkg:deb/debian/tzdata@1%3A2024a-0%2Bdeb12u1?arch=all&distro=debian-12"),
    ]


def test_a_python_distribution_has_its_normalised_name_and_its_license() -> None:
    found = sbom.python(distribution("prometheus_client"))
    assert found["purl"] == f"pkg:pypi/prometheus-client@{distribution('prometheus_client').version}"
    assert "Apache" in json.dumps(found["licenses"])


def test_it_lists_every_distribution_once_and_is_always_the_same() -> None:
    command = [sys.executable, str(ROOT / "hack/images/sbom.py"), "finetune-operator"]
    first, second = (subprocess.run(command, capture_output=True, check=True, timeout=60).stdout for _ in range(2))
    assert first == second
    document = json.loads(first)
    references = [component["bom-ref"] for component in document["components"]]
    assert len(references) == len(set(references))
    assert references == sorted(references)
    names = {one["name"] for one in document["components"] if one["purl"].startswith("pkg:pypi/")}
    assert names == {re.sub(r"[-_.]+", "-", found.name).lower() for found in distributions()}


@pytest.mark.parametrize(("other", "same"), [("finetune-operator", True), ("finetune-trainer", False)])
def test_the_serial_number_follows_from_the_content(other: str, same: bool) -> None:
    packages = list(sbom.debian(STATUS, "debian-12"))
    one = sbom.document("finetune-operator", packages)["serialNumber"]
    assert (one == sbom.document(other, packages[::-1])["serialNumber"]) is same
    assert one != sbom.document("finetune-operator", packages[:1])["serialNumber"]
