"""The manifests as whole documents. UPDATE_GOLDEN=1 writes them anew; the diff is then what is reviewed."""

import json
import os
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.contract import RunConfig
from finetune_api.job import FineTuneJobSpec
from finetune_api.profile import FineTuneProfileSpec
from finetune_api.resolve import Defaults, resolve
from finetune_api.status import FineTuneJobStatus, PreflightStatus, RowCounts
from finetune_operator import manifests
from finetune_operator.views import Child, Counters, Pinned, Subject

GOLDEN = Path(__file__).parent / "golden"
SUBJECT = Subject(
    namespace="team-a",
    name="support-intents",
    uid="1f3a9c0d-2b7e-4a55-9c1d-000000000001",
    generation=2,
    resource_version="7",
    created=datetime(2026, 3, 1, tzinfo=UTC),
    deleting=False,
    retry=None,
    spec={},
    status=FineTuneJobStatus(),
)
SPEC: dict[str, Any] = {
    "task": {"type": "text-classification"},
    "model": {"uri": "s3://models/minilm"},
    "data": {"train": [{"uri": "s3://data/train.jsonl"}]},
    "output": {"uri": "s3://models/support-intents"},
    "storage": {"credentialsSecret": "s3-credentials"},
}
RICH: dict[str, Any] = {
    **SPEC,
    "storage": {**SPEC["storage"], "addressing": "VirtualHost", "caConfigMap": "company-ca"},
    "resources": {"nodes": 2, "perNode": {"gpus": 4, "cpu": "8", "memory": "64Gi"}},
    "queue": {"name": "team-a", "workloadPriorityClass": "batch-low"},
    "podTemplate": {
        "metadata": {
            "labels": {"team": "a", "finetune.dev/role": "mine"},
            "annotations": {"sidecar.istio.io/inject": "false"},
        },
        "spec": {
            "nodeSelector": {"gpu": "h200"},
            "topologyKey": "topology.kubernetes.io/zone",
            "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule", "tolerationSeconds": 60}],
            "runtimeClassName": "nvidia",
            "priorityClassName": "batch",
            "serviceAccountName": "trainer",
            "imagePullSecrets": [{"name": "registry"}],
            "terminationGracePeriodSeconds": 300,
            "env": [{"name": "NCCL_DEBUG", "value": "WARN"}, {"name": "NOTE", "value": "$(NCCL_DEBUG) $$HOME"}],
        },
    },
}


PROFILE = {"cache": {"claimName": "models", "size": "500Gi"}}


def config(spec: dict[str, Any], profile: dict[str, Any] | None = None) -> RunConfig:
    return resolve(
        FineTuneJobSpec.model_validate(spec),
        FineTuneProfileSpec.model_validate(profile or {}),
        job="team-a/support-intents",
        job_uid=SUBJECT.uid,
        generation=2,
        defaults=Defaults(trainer_image="registry/trainer:1", preflight_image="registry/preflight:1"),
    )


def train(
    spec: dict[str, Any], profile: dict[str, Any] | None = None, *, inputs: str | None = None
) -> manifests.Manifest:
    counters = Counters(failures=1, tries=2)
    return manifests.train_job(
        SUBJECT, config(spec, profile), key="k" * 16, run_id="a" * 16, ordinal=3, counters=counters, inputs=inputs
    )


def preflight(
    spec: dict[str, Any],
    profile: dict[str, Any] | None = None,
    *,
    run: str | None = None,
    inputs: str | None = None,
) -> manifests.Manifest:
    asked = config(spec, profile)
    return manifests.preflight_job(
        SUBJECT, asked, key="k" * 16, ordinal=1, counters=Counters(), attempts=0, run=run, inputs=inputs
    )


DOCUMENTS = {
    "preflight-job": preflight(SPEC),
    "train-job": train(SPEC, inputs="d" * 32),
    "train-job-without-secret-or-gpu": train(
        {**SPEC, "storage": {}, "resources": {"perNode": {"gpus": 0, "cpu": "500m", "memory": "2Gi"}}}
    ),
    "train-job-another-gpu": train(SPEC, {"gpu": {"resourceName": "amd.com/gpu"}}),
    "preflight-job-rich": preflight(RICH),
    "preflight-job-of-a-run-that-was-begun": preflight(SPEC, run="a" * 16, inputs="d" * 32),
    "train-job-rich": train(RICH, PROFILE),
    "service": manifests.service(SUBJECT),
    "config-map": manifests.config_map(SUBJECT, config(SPEC), key="k" * 16),
    "event": manifests.event(
        SUBJECT, kind="Warning", reason="ColumnMissing", message="a column is missing", now="2026-03-01T00:00:00Z"
    ),
}


class _Dumper(yaml.SafeDumper):
    """Long texts as blocks."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)
_Dumper.ignore_aliases = lambda *_: True  # type: ignore[method-assign]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_manifest_is_the_golden_one(name: str) -> None:
    path = GOLDEN / f"{name}.yaml"
    text = yaml.dump(DOCUMENTS[name], Dumper=_Dumper, sort_keys=False, width=110)
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.yaml")} == set(DOCUMENTS)


def test_preflight_goes_through_the_queue_only_where_the_profile_says_so() -> None:
    assert "suspend" not in preflight(RICH)["spec"]
    held = preflight(SPEC, {"queue": {"name": "team-b", "preflight": True}})
    assert held["spec"]["suspend"] is True
    assert held["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-b"
    assert "kueue.x-k8s.io/queue-name" not in held["spec"]["template"]["metadata"]["labels"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_nothing_carries_what_gitops_tools_know_their_own_by(name: str) -> None:
    """Argo CD, Flux and Helm would take it for a part of what lies in Git, and prune it, for it is not there."""
    document = DOCUMENTS[name]
    metas = [document["metadata"], document.get("spec", {}).get("template", {}).get("metadata", {})]
    keys = {key for meta in metas for part in ("labels", "annotations") for key in meta.get(part, {})}
    assert "app.kubernetes.io/instance" not in keys
    domains = {key.partition("/")[0] for key in keys}
    assert not [domain for domain in domains if domain.endswith(("argoproj.io", "toolkit.fluxcd.io", "helm.sh"))]


@pytest.mark.parametrize("name", ["preflight-job", "train-job", "preflight-job-rich", "train-job-rich"])
def test_pods_satisfy_the_restricted_standard(name: str) -> None:
    pod = DOCUMENTS[name]["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert {next(iter(set(volume) - {"name"})) for volume in pod["volumes"]} <= {
        "projected",
        "emptyDir",
        "persistentVolumeClaim",
    }
    for container in pod["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["readOnlyRootFilesystem"] is True


@pytest.mark.parametrize("name", ["preflight-job", "preflight-job-rich"])
def test_preflight_never_asks_for_a_gpu(name: str) -> None:
    container = DOCUMENTS[name]["spec"]["template"]["spec"]["containers"][0]
    assert {*container["resources"]["requests"], *container["resources"]["limits"]} == {"cpu", "memory"}


def test_what_goes_on_is_told_to_its_images_in_the_words_of_their_version() -> None:
    """They refuse fields that they do not know."""
    pinned = json.loads(manifests.config_map(SUBJECT, config(SPEC), key="k")["data"]["config.json"])
    for part, field in (("", "decoding"), ("limits", "keepSeconds"), ("limits", "gpuWatts"), ("pods", "cache")):
        del (pinned[part] if part else pinned)[field]
    pinned["pods"]["template"] = {}
    older = RunConfig.model_validate_json(json.dumps(pinned))
    newer = config({**SPEC, "deadline": "2h", "ttlAfterFinished": "2h"}, {"gpu": {"watts": 700.0}})
    text = manifests.config_map(SUBJECT, older.continued(newer), key="k")["data"]["config.json"]
    changed = {**pinned, "limits": {**pinned["limits"], "deadlineSeconds": 7200.0}}
    assert json.loads(text) == changed
    again = RunConfig.model_validate_json(text).continued(config(SPEC))
    assert json.loads(manifests.config_map(SUBJECT, again, key="k")["data"]["config.json"]) == pinned


def test_a_variables_value_is_what_the_document_says_to_the_letter() -> None:
    """The kubelet puts other variables in place of $(NAME): a profile could not judge where an address leads."""
    asked = {"A": "evil.org/", "B": "https://$(A).example.org", "C": "a$b", "D": "$$(A)", "E": "$"}
    env = [{"name": name, "value": value} for name, value in asked.items()]
    found = environment(train({**SPEC, "podTemplate": {"spec": {"env": env}}}))
    assert {name: expanded(found[name], found) for name in asked} == asked


def expanded(value: str, variables: dict[str, str]) -> str:
    """As the kubelet does it: $$ is $, $(NAME) the variable, and $(NAME) itself where there is none."""

    def one(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else variables.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", one, value)


def environment(job: manifests.Manifest) -> dict[str, str]:
    """The last one of a name counts."""
    return {v["name"]: v.get("value", "") for v in job["spec"]["template"]["spec"]["containers"][0]["env"]}


CPUS = {**SPEC, "resources": {"perNode": {"gpus": 0}}}


def test_a_pod_that_asked_for_no_gpu_is_shown_none() -> None:
    """Images of CUDA ask for all, and NVIDIA's runtime believes them."""
    for job in (preflight(SPEC), preflight(CPUS), train(CPUS)):
        assert environment(job)["NVIDIA_VISIBLE_DEVICES"] == "void"
    assert "NVIDIA_VISIBLE_DEVICES" not in environment(train(SPEC)), "the device plugin says which"
    theirs = {"podTemplate": {"spec": {"env": [{"name": "NVIDIA_VISIBLE_DEVICES", "value": "none"}]}}}
    assert environment(train(CPUS, theirs))["NVIDIA_VISIBLE_DEVICES"] == "none", "the profile knows better"


@pytest.mark.parametrize("name", ["preflight-job-rich", "train-job-rich"])
def test_labels_of_ours_win_over_the_templates(name: str) -> None:
    labels = DOCUMENTS[name]["spec"]["template"]["metadata"]["labels"]
    assert labels["team"] == "a"
    assert labels["finetune.dev/role"] == name.split("-")[0]


@pytest.mark.parametrize("name", ["a", "x" * 253, "a." * 30 + "z", "1-2", "a" * 39 + "-b"])
def test_names_stay_host_names(name: str) -> None:
    subject = replace(SUBJECT, name=name)
    longest = f"{manifests.child_name(subject, 'train', 99999)}-511"
    assert len(longest) <= 63
    for made in (longest, manifests.service_name(subject), manifests.config_name(subject, 3)):
        assert all(part and part[0].isalnum() and part[-1].isalnum() for part in made.split("-") if part)
        assert "." not in made
        assert made[0].isalnum()
    assert manifests.service_name(subject)[0].isalpha()


def test_long_names_that_begin_alike_differ_in_what_is_made_for_them() -> None:
    """A program that makes a thousand of them would otherwise have two with the same beginning of their UIDs."""
    prefix = "sweep-of-the-learning-rate-and-of-the-batch-size-"
    names = {manifests.base_name(replace(SUBJECT, name=f"{prefix}{number}")) for number in range(1000)}
    assert len(names) == 1000
    assert all(name.startswith("sweep-of-the-learning-rate-and-of-") and len(name) == 46 for name in names)
    assert manifests.base_name(replace(SUBJECT, name="a" * 40)) == f"{'a' * 40}-{SUBJECT.uid[:5]}"


def test_pods_mount_what_another_version_has_pinned_under_another_name() -> None:
    counters: dict[str, Any] = {"key": "k", "ordinal": 1, "counters": Counters(), "pinned_in": "older-g2"}
    jobs = (
        manifests.preflight_job(SUBJECT, config(SPEC), attempts=0, run=None, **counters),
        manifests.train_job(SUBJECT, config(SPEC), run_id="a" * 16, **counters),
    )
    for job in jobs:
        (mounted,) = [v["projected"]["sources"] for v in job["spec"]["template"]["spec"]["volumes"] if "projected" in v]
        assert mounted[0]["configMap"]["name"] == "older-g2"


def test_a_pinned_config_is_read_back_as_it_was_written() -> None:
    raw = manifests.config_map(SUBJECT, config(RICH), key="k" * 16)
    assert Pinned.of(raw) == Pinned(2, config(RICH), "k" * 16, SUBJECT.asked, "support-intents-1f3a9-g2")


def test_a_job_is_read_back_with_all_that_it_carries() -> None:
    raw = train(SPEC)
    raw["metadata"] |= {"uid": "u", "creationTimestamp": "2026-03-01T00:00:00Z", "resourceVersion": "1"}
    child = Child.of(raw)
    assert (child.owner, child.role, child.run, child.key) == (SUBJECT.uid, "train", "a" * 16, "k" * 16)
    assert (child.ordinal, child.counters, child.generation) == (3, Counters(failures=1, tries=2), 2)


def test_new_pods_wait_for_old_ones_only_where_a_queue_may_take_the_place_away() -> None:
    """Elsewhere a Job with a pod on a dead node would never say that it has failed."""
    queued = {**SPEC, "queue": {"name": "team-a"}}
    assert train(queued)["spec"]["podReplacementPolicy"] == "Failed"
    for other in (train(SPEC), preflight(queued, {"queue": {"name": "team-a", "preflight": True}})):
        assert "podReplacementPolicy" not in other["spec"]
    raw = train(queued)
    raw["metadata"] |= {"uid": "u", "creationTimestamp": "2026-03-01T00:00:00Z", "resourceVersion": "1"}
    assert Child.of(raw).patient


def test_a_train_job_carries_what_preflight_had_found() -> None:
    found = PreflightStatus(rows=RowCounts(train=9, validation=1), truncated_percent=0.25, warnings=['日本語 "x"'])
    subject = replace(SUBJECT, status=FineTuneJobStatus(preflight=found))
    raw = manifests.train_job(subject, config(SPEC), key="k", run_id="a" * 16, ordinal=1, counters=Counters())
    raw["metadata"] |= {"uid": "u", "creationTimestamp": "2026-03-01T00:00:00Z", "resourceVersion": "1"}
    assert Child.of(raw).preflight == found
    for figures in ("", "{", '{"rows": 3}', "[]"):  # nothing, or what somebody wrote there
        raw["metadata"]["annotations"]["finetune.dev/preflight"] = figures
        assert Child.of(raw).preflight is None


def test_a_train_job_carries_the_name_of_what_it_reads() -> None:
    for inputs in ("d" * 32, None):
        raw = train(SPEC, inputs=inputs)
        raw["metadata"] |= {"uid": "u", "creationTimestamp": "2026-03-01T00:00:00Z", "resourceVersion": "1"}
        assert Child.of(raw).inputs == inputs


def test_after_a_container_killed_for_its_memory_the_next_is_told_to_halve_the_micro_batch() -> None:
    for halve in (True, False):
        counters = Counters(failures=1, halve=halve)
        job = manifests.train_job(SUBJECT, config(SPEC), key="k", run_id="a" * 16, ordinal=2, counters=counters)
        raw = {**job, "metadata": {**job["metadata"], "uid": "u", "creationTimestamp": "2026-03-01T00:00:00Z"}}
        assert Child.of(raw).counters == counters
        (container,) = job["spec"]["template"]["spec"]["containers"]
        assert ("--halve-micro-batch" in container["args"]) is halve


def test_an_attempt_that_only_finishes_is_told_so() -> None:
    for finish in (True, False):
        counters = Counters(finish=finish)
        job = manifests.train_job(SUBJECT, config(SPEC), key="k", run_id="a" * 16, ordinal=2, counters=counters)
        raw = {**job, "metadata": {**job["metadata"], "uid": "u", "creationTimestamp": "2026-03-01T00:00:00Z"}}
        assert Child.of(raw).counters == counters
        (container,) = job["spec"]["template"]["spec"]["containers"]
        assert ("--finish-now" in container["args"]) is finish


@pytest.mark.parametrize(("asked", "seconds"), [(None, 3600), ("1m", 60), ("24h", 86400), ("9999999h", 2**31 - 1)])
def test_jobs_and_their_pods_stay_as_long_as_is_asked_for(asked: str | None, seconds: int) -> None:
    spec = SPEC if asked is None else {**SPEC, "ttlAfterFinished": asked}
    for job in (train(spec), preflight(spec)):
        assert job["spec"]["ttlSecondsAfterFinished"] == seconds


def test_the_rendezvous_name_is_the_first_pods_host_name() -> None:
    job = DOCUMENTS["train-job-rich"]
    name, service = environment(job)["FINETUNE_MASTER"].split(".")
    assert name == f"{job['metadata']['name']}-0"
    assert service == job["spec"]["template"]["spec"]["subdomain"] == DOCUMENTS["service"]["metadata"]["name"]
    selector = DOCUMENTS["service"]["spec"]["selector"]
    assert selector.items() <= job["spec"]["template"]["metadata"]["labels"].items()


def test_an_event_has_the_name_of_what_it_tells_of_one_version_of_the_document() -> None:
    """So two operators that decide the same tell it once, and the next version may say the same again."""

    def name(subject: Subject, message: str = "m") -> str:
        event = manifests.event(subject, kind="Normal", reason="Trained", message=message, now="2026-03-01T00:00:00Z")
        return str(event["metadata"]["name"])

    assert name(SUBJECT) == name(SUBJECT)
    others = [name(SUBJECT, "n"), name(replace(SUBJECT, resource_version="8")), name(replace(SUBJECT, uid="v"))]
    assert len({name(SUBJECT), *others}) == 4
    cut = name(replace(SUBJECT, name="a" * 199 + "-" + "b" * 53))
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*", cut)
    assert len(cut) <= 253
