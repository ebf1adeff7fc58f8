"""The chart as real Helm renders it. Needs Helm, or Go to build it, which only `make e2e` asks a machine to have.

UPDATE_GOLDEN=1 rewrites the golden files.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_operator.kube import PLURALS

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/finetune-operator"
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def helm() -> str:
    built = subprocess.run([ROOT / "hack/helm"], capture_output=True, text=True, timeout=1200)
    assert built.returncode == 0, built.stderr
    return built.stdout.strip()


class Chart:
    def __init__(self, helm: str, tmp: Path) -> None:
        self.helm, self.tmp = helm, tmp

    def run(self, command: list[str], values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        path = self.tmp / "values.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return subprocess.run(
            [self.helm, *command, str(CHART), "--values", str(path)], capture_output=True, text=True, timeout=60
        )

    def render(self, values: dict[str, Any] | None = None, *, release: str = "ft") -> list[dict[str, Any]]:
        done = self.run(["template", release, "--namespace", "finetune-system"], values or {})
        assert done.returncode == 0, done.stderr
        return [document for document in yaml.safe_load_all(done.stdout) if document]

    def one(self, kind: str, values: dict[str, Any] | None = None, *, release: str = "ft") -> dict[str, Any]:
        found = [document for document in self.render(values, release=release) if document["kind"] == kind]
        assert len(found) == 1, found
        return found[0]

    def refusal(self, values: dict[str, Any]) -> str:
        done = self.run(["template", "ft"], values)
        assert done.returncode != 0, done.stdout
        return done.stderr


@pytest.fixture
def chart(helm: str, tmp_path: Path) -> Chart:
    return Chart(helm, tmp_path)


PROFILE = {
    "images": {"pullPolicy": "Never"},
    "storage": {"endpoint": "http://seaweedfs.storage:8333", "region": "eu-west-1", "credentialsSecret": "s3"},
    "allowedEndpoints": ["https://*.example.com"],
    "allowedLicenses": ["apache-2.0", "mit"],
    "allowed": {
        "namespaces": ["team-*"],
        "secrets": ["s3"],
        "configMaps": ["ca"],
        "serviceAccounts": [],
        "runtimeClasses": ["kata"],
    },
    "limits": {"gpus": 8, "nodes": 1, "gpuHours": 100.5, "deadline": "24h"},
    "required": ["budget", "model.license"],
    "resources": {"nodes": 1, "perNode": {"gpus": 0, "cpu": "500m", "memory": "2Gi"}},
    "gpu": {"resourceName": "example.com/gpu"},
    "cache": {"claimName": "models", "size": "500Gi"},
    "startTimeout": "2m",
    "queue": {"name": "team-a", "workloadPriorityClass": "batch-low", "preflight": True},
    "podTemplate": {
        "metadata": {"labels": {"team": "a"}},
        "spec": {"nodeSelector": {"pool": "gpu"}, "tolerations": [{"key": "spot", "operator": "Exists"}]},
    },
}

GOOD: dict[str, dict[str, Any]] = {
    "defaults": {},
    "one-namespace": {"watchNamespaces": ["team-a"]},
    "two-namespaces": {"watchNamespaces": ["team-a", "team-b"]},
    "images": {"images": {"operator": "registry.example.com:5000/op@sha256:" + "0" * 64, "pullPolicy": "Always"}},
    "profile": {"profile": PROFILE},
    "no-profile": {"profile": {"create": False}},
    "other-profile": {"profile": {"name": "gpu-spot"}},
    "scheduling": {
        "nodeSelector": {"pool": "system"},
        "tolerations": [{"key": "system", "operator": "Exists"}],
        "priorityClassName": "system-cluster-critical",
    },
    "pull-secrets": {"imagePullSecrets": [{"name": "registry"}]},
    "resources": {"resources": {"requests": {"cpu": 1, "memory": "1Gi"}, "limits": {"memory": "1Gi"}}},
    "logs": {"log": {"format": "json", "level": "debug"}},
    "metrics": {"metrics": {"port": 9400}},
    "environment": {
        "env": [
            {"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://otel-collector.monitoring:4318"},
            {"name": "OTEL_EXPORTER_OTLP_HEADERS", "valueFrom": {"secretKeyRef": {"name": "otel", "key": "headers"}}},
        ]
    },
    "two-replicas": {"replicas": 2},
    "network-policies": {
        "networkPolicy": {
            "enabled": True,
            "metricsFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
            "jobNamespaces": ["team-a", "team-b"],
            "jobEgress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"port": 443}]}],
        }
    },
    "annotations": {"serviceAccount": {"annotations": {"example.com/role": "finetune"}}},
}

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown value": ({"replica": 2}, "additional properties 'replica' not allowed"),
    "no replica": ({"replicas": 0}, "'/replicas': minimum: got 0, want 1"),
    "an unknown value of the profile": (
        {"profile": {"storage": {"endpont": "http://s3"}}},
        "'/profile/storage': additional properties 'endpont' not allowed",
    ),
    "an unknown value in the pod template": (
        {"profile": {"podTemplate": {"spec": {"hostNetwork": True}}}},
        "'/profile/podTemplate/spec': additional properties 'hostNetwork' not allowed",
    ),
    "a cache without a claim": ({"profile": {"cache": {"size": "1Gi"}}}, "'/profile/cache'"),
    "an unknown required field": ({"profile": {"required": ["budgets"]}}, "'/profile/required/0'"),
    "no GPU hours at all": (
        {"profile": {"limits": {"gpuHours": 0}}},
        "'/profile/limits/gpuHours': exclusiveMinimum: got 0, want 0",
    ),
    "an endpoint without a scheme": ({"profile": {"storage": {"endpoint": "s3:8333"}}}, "'/profile/storage/endpoint'"),
    "a namespace that is no name": ({"watchNamespaces": ["Team_A"]}, "'/watchNamespaces/0'"),
    "one namespace as a string": ({"watchNamespaces": "team-a"}, "'/watchNamespaces': got string, want array"),
    "the same namespace twice": ({"watchNamespaces": ["a", "a"]}, "'/watchNamespaces': items at 0 and 1 are equal"),
    "an empty image": ({"images": {"trainer": ""}}, "'/images/trainer'"),
    "a log level that is none": ({"log": {"level": "trace"}}, "'/log/level': value must be one of"),
    "a port of the system": ({"metrics": {"port": 80}}, "'/metrics/port': minimum: got 80, want 1,024"),
    "a negative number of GPUs": (
        {"profile": {"resources": {"perNode": {"gpus": -1}}}},
        "'/profile/resources/perNode/gpus': minimum: got -1, want 0",
    ),
    "a variable without a name": ({"env": [{"value": "x"}]}, "'/env/0': missing property 'name'"),
    "a variable that is a number": ({"env": [{"name": "X", "value": 1}]}, "'/env/0/value': got number, want string"),
    "variables by name": ({"env": {"X": "1"}}, "'/env': got object, want array"),
    "a pull secret without a name": ({"imagePullSecrets": [{}]}, "missing property 'name'"),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_values_lint_without_a_warning(chart: Chart, name: str) -> None:
    done = chart.run(["lint", "--strict"], GOOD[name])
    assert done.returncode == 0, done.stdout
    assert "0 chart(s) failed" in done.stdout
    assert "[WARNING]" not in done.stdout


@pytest.mark.parametrize("name", GOOD)
def test_good_values_render_unique_objects(chart: Chart, name: str) -> None:
    seen = [(d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"]) for d in chart.render(GOOD[name])]
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused_and_named(chart: Chart, name: str) -> None:
    values, words = BAD[name]
    assert words in chart.refusal(values)


@pytest.mark.parametrize("name", ["defaults", "two-namespaces"])
def test_rights_are_those_of_the_golden_file(chart: Chart, name: str) -> None:
    kinds = {"ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "ServiceAccount"}
    rendered = yaml.safe_dump_all([d for d in chart.render(GOOD[name]) if d["kind"] in kinds], sort_keys=False)
    golden = GOLDEN / f"rbac-{name}.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(rendered, encoding="utf-8")
    assert rendered == golden.read_text(encoding="utf-8")


def test_network_policies_are_those_of_the_golden_file(chart: Chart) -> None:
    """Whether they are enforced is the network's affair."""
    found = [d for d in chart.render(GOOD["network-policies"]) if d["kind"] == "NetworkPolicy"]
    rendered = yaml.safe_dump_all(found, sort_keys=False)
    golden = GOLDEN / "network-policies.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(rendered, encoding="utf-8")
    assert rendered == golden.read_text(encoding="utf-8")


def test_without_being_asked_for_there_is_no_network_policy(chart: Chart) -> None:
    assert "NetworkPolicy" not in [d["kind"] for d in chart.render()]


def test_network_policies_select_the_pods_that_there_are(chart: Chart) -> None:
    rendered = chart.render(GOOD["network-policies"])
    operator, *jobs = [d["spec"] for d in rendered if d["kind"] == "NetworkPolicy"]
    (deployment,) = [d for d in rendered if d["kind"] == "Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert operator["podSelector"]["matchLabels"].items() <= labels.items()
    train = yaml.safe_load((ROOT / "tests/unit/golden/train-job.yaml").read_text())["spec"]["template"]
    for policy in jobs:
        assert policy["podSelector"]["matchLabels"].items() <= train["metadata"]["labels"].items()
        reader, _ = policy["ingress"]
        assert reader["ports"] == [{"protocol": "TCP", "port": train["spec"]["containers"][0]["ports"][0]["name"]}]
        assert reader["from"][0]["podSelector"]["matchLabels"].items() <= labels.items()


@pytest.mark.parametrize("name", GOOD)
def test_no_role_reaches_secrets_or_everything(chart: Chart, name: str) -> None:
    for role in chart.render(GOOD[name]):
        for rule in role.get("rules", []) if role["kind"] in ("Role", "ClusterRole") else []:
            assert "secrets" not in rule["resources"]
            assert "*" not in [*rule["resources"], *rule["verbs"], *rule["apiGroups"]]
            assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])


@pytest.mark.parametrize("name", GOOD)
def test_single_objects_are_read_only_where_a_name_may_be_taken(chart: Chart, name: str) -> None:
    """What the operator creates, and its Lease. Watches and lists show the rest, also of one name."""
    for role in chart.render(GOOD[name]):
        for rule in role.get("rules", []) if role["kind"] in ("Role", "ClusterRole") else []:
            if "get" in rule["verbs"]:
                assert {*rule["resources"]} <= {*PLURALS.values(), "leases"}


def test_a_namespaced_operator_writes_nothing_cluster_wide(chart: Chart) -> None:
    role = chart.one("ClusterRole", GOOD["two-namespaces"])
    assert role["rules"] == [
        {"apiGroups": ["finetune.dev"], "resources": ["finetuneprofiles"], "verbs": ["list", "watch"]}
    ]


def test_a_namespaced_operator_is_told_its_namespaces(chart: Chart) -> None:
    container = _container(chart.one("Deployment", GOOD["two-namespaces"]))
    assert [a for a in container["args"] if "namespace" in a] == ["--namespace=team-a", "--namespace=team-b"]
    assert not [a for a in _container(chart.one("Deployment"))["args"] if "namespace" in a]


def test_the_pod_meets_the_restricted_pod_security_standard(chart: Chart) -> None:
    pod = chart.one("Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert [c["securityContext"] for c in pod["containers"]] == [
        {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    ]
    assert [set(volume) for volume in pod["volumes"]] == [{"name", "emptyDir"}]


def test_only_the_operators_pod_gets_a_token(chart: Chart) -> None:
    assert chart.one("ServiceAccount")["automountServiceAccountToken"] is False
    assert chart.one("Deployment")["spec"]["template"]["spec"]["automountServiceAccountToken"] is True


@pytest.mark.parametrize("name", ["defaults", "two-namespaces"])
def test_the_election_may_touch_one_lease_in_the_namespace_of_the_release(chart: Chart, name: str) -> None:
    """By name; only creating cannot be bound to one."""
    roles = [d for d in chart.render(GOOD[name]) if d["kind"] in ("Role", "ClusterRole")]
    with_leases = [role for role in roles if "leases" in str(role["rules"])]
    (role,) = with_leases
    assert (role["kind"], role["metadata"]["namespace"]) == ("Role", "finetune-system")
    group = {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"]}
    assert role["rules"] == [
        {**group, "resourceNames": ["ft-finetune-operator"], "verbs": ["get", "update"]},
        {**group, "verbs": ["create"]},
    ]
    arguments = _container(chart.one("Deployment", GOOD[name]))["args"]
    assert "--lease=finetune-system/ft-finetune-operator" in arguments


def test_every_release_has_a_lease_of_its_own(chart: Chart) -> None:
    arguments = [_container(chart.one("Deployment", release=release))["args"] for release in ("one", "two")]
    leases = [[argument for argument in some if argument.startswith("--lease=")] for some in arguments]
    assert leases == [
        ["--lease=finetune-system/one-finetune-operator"],
        ["--lease=finetune-system/two-finetune-operator"],
    ]


def test_a_rollout_takes_no_operator_away_before_its_successor_is_ready_to_lead(chart: Chart) -> None:
    """Ready is who follows, too: a probe that asked for the lead would wait for ever."""
    spec = chart.one("Deployment")["spec"]
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    (container,) = spec["template"]["spec"]["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"


def test_of_several_replicas_a_drain_takes_one_at_a_time(chart: Chart) -> None:
    deployment, budget = (chart.one(kind, GOOD["two-replicas"]) for kind in ("Deployment", "PodDisruptionBudget"))
    assert deployment["spec"]["replicas"] == 2
    assert budget["spec"]["maxUnavailable"] == 1
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert "PodDisruptionBudget" not in [d["kind"] for d in chart.render()]


def test_replicas_prefer_different_nodes(chart: Chart) -> None:
    pod = chart.one("Deployment", GOOD["two-replicas"])["spec"]["template"]
    (term,) = pod["spec"]["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert term["podAffinityTerm"]["topologyKey"] == "kubernetes.io/hostname"
    assert term["podAffinityTerm"]["labelSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()


def test_the_service_reaches_the_pod(chart: Chart) -> None:
    service, deployment = chart.one("Service", GOOD["metrics"]), chart.one("Deployment", GOOD["metrics"])
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert service["spec"]["ports"] == [{"name": "metrics", "port": 9400, "targetPort": "metrics"}]
    assert _container(deployment)["ports"] == [{"name": "metrics", "containerPort": 9400}]
    assert "--metrics-port=9400" in _container(deployment)["args"]


def test_the_operator_has_the_variables_that_the_values_name_and_no_others(chart: Chart) -> None:
    assert _container(chart.one("Deployment", GOOD["environment"]))["env"] == GOOD["environment"]["env"]
    assert "env" not in _container(chart.one("Deployment"))


def test_no_network_policy_keeps_the_operator_from_sending_traces(chart: Chart) -> None:
    operator, *_ = [d["spec"] for d in chart.render(GOOD["network-policies"]) if d["kind"] == "NetworkPolicy"]
    assert operator["policyTypes"] == ["Ingress"]


def test_the_profile_holds_what_the_values_say_and_nothing_else(chart: Chart) -> None:
    assert chart.one("FineTuneProfile", GOOD["profile"])["spec"] == PROFILE
    assert chart.one("FineTuneProfile")["spec"] == {"startTimeout": "10m"}
    assert "FineTuneProfile" not in [d["kind"] for d in chart.render(GOOD["no-profile"])]


def test_two_releases_share_no_name(chart: Chart) -> None:
    names = [
        {(d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"]) for d in chart.render(values, release=name)}
        for name, values in (("one", {}), ("two", GOOD["no-profile"]))
    ]
    assert not names[0] & names[1]


@pytest.mark.parametrize("release", ["finetune-operator", "ft", "x" * 53])
def test_names_fit_whatever_the_release_is_called(chart: Chart, release: str) -> None:
    names = [document["metadata"]["name"] for document in chart.render(release=release)]
    assert all(len(name) <= 253 for name in names)
    assert len(chart.one("Service", release=release)["metadata"]["name"]) <= 63


@pytest.mark.parametrize("name", GOOD)
def test_the_only_instance_that_anything_is_a_part_of_is_the_release(chart: Chart, name: str) -> None:
    """Argo CD may know its own by this label; it gives the release the application's name."""
    for document in chart.render(GOOD[name], release="fine-tuning"):
        metas = [document["metadata"], document.get("spec", {}).get("template", {}).get("metadata", {})]
        labels = [meta.get("labels", {}) for meta in metas]
        assert {found.get("app.kubernetes.io/instance", "fine-tuning") for found in labels} == {"fine-tuning"}
        keys = {key for meta in metas for part in ("labels", "annotations") for key in meta.get(part) or {}}
        assert not [key for key in keys if key.partition("/")[0].endswith(("argoproj.io", "toolkit.fluxcd.io"))]


def test_the_crds_are_the_generated_ones() -> None:
    for name in ("finetunejobs.yaml", "finetuneprofiles.yaml"):
        assert (CHART / "crds" / name).read_bytes() == (ROOT / "crds" / name).read_bytes()


def test_the_schema_of_the_values_is_fresh() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "hack/chart_schema.py", "--check"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))


def _container(deployment: dict[str, Any]) -> dict[str, Any]:
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container
