"""The commands of the READMEs are right as they stand there: what they name exists, and Helm takes their arguments."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.validate import load_job, load_profile

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
READMES = ["README.md", "examples/README.md"]
ENDPOINT = "http://10.244.0.1:8333"  # of hack/cluster


def commands(readme: str) -> list[str]:
    """Every command of the shell blocks, continued lines joined, without comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / readme).read_text(encoding="utf-8"), re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [found for line in lines if (found := re.sub(r"(^|\s)#.*", "", line).strip())]


def rendered(command: str) -> list[dict[str, Any]]:
    """What a command `... install ...` of Helm would install."""
    assert command.count('helm)" install ') == 1, command
    done = subprocess.run(
        ["bash", "-euc", command.replace('helm)" install ', 'helm)" template ')],
        cwd=ROOT,
        env={**os.environ, "AWS_ENDPOINT_URL": ENDPOINT},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def test_helm_takes_the_arguments_of_the_walk_through() -> None:
    (command,) = (command for command in commands("README.md") if "helm" in command)
    (profile,) = (document for document in rendered(command) if document["kind"] == "FineTuneProfile")
    assert profile["spec"] == {
        "storage": {"endpoint": ENDPOINT, "credentialsSecret": "s3-credentials"},
        "resources": {"perNode": {"cpu": "1", "memory": "4Gi"}},
        "startTimeout": "10m",
    }
    assert any(line.startswith("kubectl create secret generic s3-credentials ") for line in commands("README.md"))


@pytest.mark.parametrize("readme", READMES)
def test_every_file_and_target_that_a_command_names_exists(readme: str) -> None:
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for command in commands(readme):
        for path in re.findall(r"\b(?:examples|hack|charts)/[\w./*-]+", command):
            assert list(ROOT.glob(path)), command
        if command.startswith("make "):
            assert {word for word in command.split()[1:] if "=" not in word} <= set(targets), command


def test_the_examples_are_valid_and_reach_the_server_of_the_walk_through() -> None:
    job, problems = load_job((ROOT / "examples/text-classification.yaml").read_bytes(), name="")
    assert not problems
    assert job is not None
    assert any(job.metadata["name"] in command for command in commands("README.md"))
    profile, problems = load_profile((ROOT / "examples/profile.yaml").read_bytes(), name="")
    assert not problems
    assert profile is not None
    assert profile.spec.storage is not None
    assert profile.spec.storage.endpoint == ENDPOINT


def test_a_command_line_tool_is_on_the_path_before_it_is_called() -> None:
    """`finetune` and kubectl come from folders that the same README has put on the PATH."""
    for readme in READMES:
        known: set[str] = set()
        for command in commands(readme):
            if command.startswith("export PATH="):
                known |= {"finetune", "python"} if ".venv/bin" in command else set()
                known |= {"kubectl"} if "hack/kubectl" in command else set()
            tool = command.split()[0]
            # The examples refer to the walk-through for what a cluster needs.
            assert tool not in {"finetune", "python", "kubectl"} - known or (tool, readme) == ("kubectl", READMES[1])
