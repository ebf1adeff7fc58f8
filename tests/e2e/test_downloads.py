"""What pods download: a base once for all pods that share a cache, and never more into memory than they have."""

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from finetune_api.contract import WORK_PATH
from finetune_trainer.storage.digests import Hasher, digest_of, hex_of

pytestmark = [pytest.mark.e2e, pytest.mark.together, pytest.mark.timeout(900)]

GIB = 2**30


def test_of_two_pods_that_share_a_cache_one_downloads_the_base(world: Any) -> None:
    """They begin together, so that one waits for what the other downloads; what they train is not waited for."""
    namespace, names = world.namespace("cache"), ("left", "right")
    stored = world.s3.get_object(Bucket="models", Key="minilm/model.safetensors")["Body"].read()
    with world.trainings, cached_profile(world, namespace) as profile:  # one place for both: they train next to nothing
        for seed, name in enumerate(names):
            world.apply(world.small_job(name, profile=profile, training={"epochs": 1, "seed": seed}), namespace)
        told = lambda: said_of(world, namespace, digest_of(stored))  # noqa: E731
        world.until(lambda: len(told()) > 1, what="two pods to have the base", seconds=400)
        lines = told()
        world.kubectl("delete", "finetunejobs", "--all", "-n", namespace)
    assert len(lines) == 2, lines
    assert sum("downloaded into the cache" in line for line in lines) == 1, lines
    assert sum("is in the cache" in line for line in lines) == 1, lines


def said_of(world: Any, namespace: str, digest: str) -> list[str]:
    """What the namespace's train pods have logged of a file."""
    selector = "finetune.dev/role=train"
    logs = world.kubectl.run("logs", "-n", namespace, "-l", selector, "--tail=-1").stdout
    return [line for line in logs.splitlines() if hex_of(digest)[:16] in line]


@contextmanager
def cached_profile(world: Any, namespace: str) -> Iterator[str]:
    """A profile whose cache is a directory of the node that any user may write, as a claim of the namespace."""
    name = f"bases-{secrets.token_hex(3)}"
    directory, labels = f"/var/tmp/finetune-{name}", {"finetune-e2e": "true"}
    world.on_node("mkdir", "-m", "0777", directory)
    what = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    volume = {"capacity": {"storage": "1Gi"}, "hostPath": {"path": directory, "type": "Directory"}}
    volume |= {"claimRef": {"namespace": namespace, "name": "bases"}}
    claim = {"volumeName": name, "resources": {"requests": {"storage": "1Gi"}}}
    made = [("PersistentVolume", name, {**what, **volume}), ("PersistentVolumeClaim", "bases", {**what, **claim})]
    try:
        for kind, called, spec in made:
            meta = {"name": called, "labels": labels}
            world.apply({"apiVersion": "v1", "kind": kind, "metadata": meta, "spec": spec}, namespace)
        with world.profile(cache={"claimName": "bases"}) as profile:
            yield profile
    finally:
        world.kubectl.run("delete", "persistentvolume", name, "--wait=false")
        world.on_node("rm", "-rf", directory)


# --- a model that is larger than the pod's memory ---

DOWNLOAD = """
import json, pathlib, resource, sys
from finetune_trainer.storage import StorageSettings, open_store

uri, endpoint, region, digest, work = sys.argv[1:]
store = open_store(uri, StorageSettings(endpoint, region, None))
target, size = pathlib.Path(work, "model"), 0
target.mkdir()
for info in list(store.list()):
    size += store.download(info.key, target / info.key, digest=digest).size
print(json.dumps({"bytes": size, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


@pytest.mark.slow
def test_four_gigabytes_download_in_a_pod_with_one(world: Any) -> None:
    """With the code and the image of a train pod; the kernel would kill it at the limit."""
    namespace, bucket = world.namespace("large"), f"large-{secrets.token_hex(3)}"
    world.s3.create_bucket(Bucket=bucket)
    with world.trainings:
        try:
            digest = fill(world, bucket, files=4)
            world.apply(downloader(world, f"s3://{bucket}", digest), namespace)
            status = world.until(lambda: ended(world, namespace), what="the download", seconds=400)
            log = world.kubectl("logs", "download", "-n", namespace)
            assert status["phase"] == "Succeeded", json.dumps(status) + log
        finally:
            world.kubectl.run("delete", "pod", "download", "-n", namespace, "--grace-period=1")
            for number in range(4):
                world.s3.delete_object(Bucket=bucket, Key=f"model-{number}.safetensors")
            world.s3.delete_bucket(Bucket=bucket)
    said = json.loads(log.splitlines()[-1])
    world.took(f"(MiB of memory that the download of 4 GiB took, of 1024: {said['peak'] >> 20})", 0)
    assert said["bytes"] == 4 * GIB
    assert said["peak"] < GIB / 4


def fill(world: Any, bucket: str, *, files: int) -> str:
    """Puts files of 1 GiB of zeros there, in parts; returns the digest of each."""
    part = bytes(64 * 2**20)
    for number in range(files):
        where = {"Bucket": bucket, "Key": f"model-{number}.safetensors"}
        upload = {**where, "UploadId": world.s3.create_multipart_upload(**where)["UploadId"]}
        tags = [
            {"PartNumber": n, "ETag": world.s3.upload_part(**upload, PartNumber=n, Body=part)["ETag"]}
            for n in range(1, GIB // len(part) + 1)
        ]
        world.s3.complete_multipart_upload(**upload, MultipartUpload={"Parts": tags})
    hasher = Hasher()
    for _ in range(GIB // len(part)):
        hasher.update(part)
    return hasher.digest()


def downloader(world: Any, uri: str, digest: str) -> dict[str, Any]:
    """A pod with 1 GiB of memory that runs DOWNLOAD."""
    container = {
        "name": "trainer",
        "image": "localhost/finetune-trainer:dev",
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-c", DOWNLOAD, uri, world.endpoint, world.keys["AWS_REGION"], digest, WORK_PATH],
        "envFrom": [{"secretRef": {"name": "s3-credentials"}}],
        "resources": {"requests": {"cpu": "400m"}, "limits": {"memory": "1Gi"}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "work", "mountPath": WORK_PATH}],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "download"},
        "spec": {
            "restartPolicy": "Never",
            "securityContext": {"runAsNonRoot": True, "fsGroup": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [container],
            "volumes": [{"name": "work", "emptyDir": {}}],
        },
    }


def ended(world: Any, namespace: str) -> dict[str, Any] | None:
    status = world.look(f"/api/v1/namespaces/{namespace}/pods/download")["status"]
    return status if status.get("phase") in ("Succeeded", "Failed") else None
