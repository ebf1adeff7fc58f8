"""Storage behind a certificate of a private authority, which pods trust by a ConfigMap of their namespace."""

from pathlib import Path
from typing import Any

import pytest
from hack.seaweed import serve
from tests.e2e.real import becomes
from tests.storage.network import authority

pytestmark = [pytest.mark.e2e, pytest.mark.together, pytest.mark.timeout(600)]


def test_preflight_and_trainer_trust_the_authority_of_the_config_map(world: Any) -> None:
    """Nobody else knows it; what comes out is what the same documents give over plain HTTP."""
    host, name = world.endpoint.removeprefix("http://").partition(":")[0], "authority"
    ca = authority(directory(world, "authority"), host=host)
    with (
        serve(directory(world, "secure"), ca.tls, host=host) as server,
        world.profile(allowedEndpoints=[f"https://{host}:*"]) as profile,
    ):
        fill(world, server.client())
        keys = {path.name: path.read_text() for path in server.admin.iterdir()}
        namespace, data = world.namespace(name, secret=keys), {"ca.crt": ca.ca_file.read_text()}
        world.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "company"}, "data": data}, namespace)
        storage = {"endpoint": server.secure, "credentialsSecret": "s3-credentials", "caConfigMap": "company"}
        with world.trainings:
            world.apply(world.small_job(name, profile=profile, storage=storage), namespace)
            world.succeeded(namespace, name)
        job = becomes(world, namespace, name, "undisturbed", "Succeeded", "Trained")
        world.kubectl("delete", "finetunejob", name, "-n", namespace)
    assert job["status"]["model"]["digest"] == world.reference().digest


def directory(world: Any, name: str) -> Path:
    made = Path(world.scratch / f"tls-{name}")
    made.mkdir()
    return made


def fill(world: Any, client: Any) -> None:
    """Puts there what the small document reads, and the bucket that it writes to."""
    for bucket in ("models", "data", "runs"):
        client.create_bucket(Bucket=bucket)
    for bucket, prefix in (("models", "minilm/"), ("data", "small/")):
        for entry in world.s3.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]:
            body = world.s3.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()
            client.put_object(Bucket=bucket, Key=entry["Key"], Body=body)
