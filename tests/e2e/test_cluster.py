"""The test cluster, its scripts and the images: what hack/cluster/README.md and the Dockerfile promise."""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
STATE = Path(os.environ.get("STATE", Path.home() / ".local/state/finetune-operator/cluster"))
IMAGES = {"operator": "finetune-operator", "preflight": "finetune", "trainer": "finetune"}
"""The image's name and the program that it starts."""


def processes() -> dict[str, tuple[str, str]]:
    """Pid and start time (in ticks since boot) of each process that the scripts have started."""
    pids = {path.stem: path.read_text().strip() for path in (STATE / "run").glob("*.pid")}
    return {
        name: (pid, Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[19]) for name, pid in pids.items()
    }


def run(*command: object, timeout: float = 120, path: str | None = None) -> str:
    environment = {**os.environ, **({} if path is None else {"PATH": path})}
    line = [str(part) for part in command]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.together
@pytest.mark.hurts
def test_up_again_is_quick_and_touches_nothing_that_runs(world: Any) -> None:
    before, written = processes(), (STATE / "kubeconfig").stat().st_mtime_ns
    assert before
    started = time.monotonic()
    run("hack/cluster/up")
    run("hack/cluster/seaweedfs", "up")
    assert time.monotonic() - started < 15
    assert processes() == before
    assert (STATE / "kubeconfig").stat().st_mtime_ns == written


def test_a_process_is_known_by_its_pid_when_its_programs_file_is_gone(tmp_path: Path) -> None:
    """make clean takes the S3 server's program away under it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "log").mkdir()
    program = shutil.copy("/bin/sleep", tmp_path / "server")
    steps = f". hack/cluster/lib.sh; start it {program} 60; await 5 it pid_of it; rm {program}; pid_of it; stop it"
    done = subprocess.run(
        ["bash", "-euc", f"{steps}; ! pid_of it"],
        cwd=ROOT,
        env={**os.environ, "STATE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1].isdigit()


def test_a_node_offers_four_gpus(world: Any) -> None:
    for node in world.look("/api/v1/nodes")["items"]:
        assert node["status"]["capacity"]["nvidia.com/gpu"] == "4"
        assert node["status"]["allocatable"]["nvidia.com/gpu"] == "4"


def test_the_operators_image_is_smaller_than_200_mb(world: Any) -> None:
    sizes = {
        name.rpartition("/")[2]: image["sizeBytes"]
        for node in world.look("/api/v1/nodes")["items"]
        for image in node["status"]["images"]
        for name in image["names"]
    }
    assert sizes["finetune-operator:dev"] < 200_000_000, sizes


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_any_user_on_a_read_only_root_without_rights(world: Any, image: str) -> None:
    namespace = world.namespace("image")
    program = IMAGES[image]
    container = {
        "name": "it",
        "image": f"localhost/finetune-{image}:dev",
        "imagePullPolicy": "IfNotPresent",
        "args": ["--help"],
        "resources": {"requests": {"cpu": "200m"}},  # else it starves beside trainings
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    listing = {**container, "name": "sbom", "command": ["cat", "/opt/sbom.cdx.json"], "args": []}
    user = {"runAsNonRoot": True, "runAsUser": 12345, "runAsGroup": 54321, "seccompProfile": {"type": "RuntimeDefault"}}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "it"},
        "spec": {"containers": [container, listing], "securityContext": user, "restartPolicy": "Never"},
    }
    world.apply(pod, namespace)

    def ended() -> dict[str, Any] | None:
        status = world.look(f"/api/v1/namespaces/{namespace}/pods/it")["status"]
        return status if status.get("phase") in ("Succeeded", "Failed") else None

    status = world.until(ended, what=f"the pod of {image} to end", seconds=120)
    words = world.kubectl("logs", "it", "-c", "it", "-n", namespace)
    assert status["phase"] == "Succeeded", json.dumps(status) + words
    assert words.startswith(f"usage: {program} ")
    found = json.loads(world.kubectl("logs", "it", "-c", "sbom", "-n", namespace))["components"]
    versions = {component["purl"].partition("@")[0]: component["version"] for component in found}
    locked = re.findall(r"^([a-z0-9-]+)==([^ ]+) \\", (ROOT / f"requirements/{image}.lock").read_text(), re.MULTILINE)
    assert dict(locked)["pydantic"] == versions["pkg:pypi/pydantic"]
    assert "pkg:deb/debian/libc6" in versions


@pytest.mark.parametrize("account", ["finetune-system:finetune-operator", "NAMESPACE:default"])
def test_a_service_account_may_do_what_the_golden_file_says_and_nothing_else(world: Any, account: str) -> None:
    """The operator's, and the one that pods of jobs run as. UPDATE_GOLDEN=1 writes the files anew."""
    namespace = world.namespace("rights")
    user = f"system:serviceaccount:{account.replace('NAMESPACE', namespace)}"
    words = world.kubectl("auth", "can-i", "--list", "-n", namespace, f"--as={user}")
    heading, *rights = [" ".join(line.split()) for line in words.splitlines()]
    found = "\n".join([heading, *sorted(rights)]) + "\n"
    golden = ROOT / f"tests/e2e/golden/rights-{'operator' if 'operator' in account else 'pods'}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(found)
    assert found == golden.read_text()


def test_kubectl_is_found_in_the_cache_where_the_machine_has_none(tmp_path: Path) -> None:
    """A PATH without kubectl, and a cache that holds one."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "mkdir", "env", "chmod"):
        (tools / name).symlink_to(str(shutil.which(name)))
    version = run("bash", "-c", '. hack/cluster/lib.sh; echo "$VERSION"').strip()
    cached = tmp_path / "cache/kube" / version / "kubectl"
    cached.parent.mkdir(parents=True)
    cached.symlink_to(run("hack/kubectl").strip())
    # The cache's folder ends the PATH: the machine's own kubectl comes first wherever there is one.
    found = run("env", f"FINETUNE_CACHE={tmp_path / 'cache'}", "hack/kubectl", path=str(tools))
    assert found.strip() == str(cached)
    assert "gitVersion" in run(found.strip(), "version", "--client", "-o", "yaml")
