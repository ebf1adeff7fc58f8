"""What a profile keeps a job from, and in which words."""

from dataclasses import replace
from typing import Any, get_args

import pytest
from pydantic import ValidationError
from tests.unit.test_decide import NOW, SPEC, TRAINING, pinned, progress, subject, t, world
from tests.unit.test_decide import pod as pod_of
from tests.unit.test_resolve import resolved

from finetune_api.contract import LimitsConfig
from finetune_api.crd import open_api_schema
from finetune_api.job import FineTuneJob
from finetune_api.profile import Requirable
from finetune_api.resolve import Defaults, ResolveError, restart_key
from finetune_operator.decide import decide
from finetune_operator.verdict import CreateConfig, reason_of
from finetune_operator.views import Profile

LAPTOP = Defaults(trainer_image="", preflight_image="", in_cluster=False)


def refused(spec: dict[str, Any], profile: dict[str, Any], **fields: Any) -> tuple[str, str]:
    with pytest.raises(ResolveError) as caught:
        resolved(spec, profile, **fields)
    return caught.value.reason, caught.value.message


def test_a_profile_without_bounds_refuses_nothing() -> None:
    spec = {
        "resources": {"nodes": 512, "perNode": {"gpus": 64}},
        "storage": {"credentialsSecret": "any"},
        "podTemplate": {"spec": {"serviceAccountName": "any", "runtimeClassName": "any"}},
    }
    assert resolved(spec).limits.of_profile is None


# --- limits ---


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 8), (2, 4), (8, 1), (8, 0)])
def test_as_many_gpus_as_the_profile_allows_are_given(nodes: int, gpus: int) -> None:
    asked = {"resources": {"nodes": nodes, "perNode": {"gpus": gpus}}}
    assert resolved(asked, {"limits": {"gpus": 8, "nodes": 8}}).pods.gpus == gpus


def test_gpus_are_counted_over_all_nodes() -> None:
    asked = {"resources": {"nodes": 3, "perNode": {"gpus": 4}}}
    assert refused(asked, {"limits": {"gpus": 8}}) == (
        "LimitExceeded",
        "spec.resources: 3 x 4 GPUs is more than the profile allows; limits.gpus: 8",
    )


def test_gpus_that_nobody_asked_for_count_too() -> None:
    assert refused({}, {"limits": {"gpus": 0}})[0] == "LimitExceeded"


def test_nodes_are_bounded_also_without_gpus() -> None:
    asked = {"resources": {"nodes": 3, "perNode": {"gpus": 0}}}
    assert refused(asked, {"limits": {"gpus": 8, "nodes": 2}}) == (
        "LimitExceeded",
        "spec.resources.nodes: 3 is more than the profile allows; limits.nodes: 2",
    )


@pytest.mark.parametrize(
    ("asked", "limits", "message"),
    [
        ({"cpu": "16001m"}, {"cpu": "16"}, "cpu: 16001m is more than the profile allows; limits.cpu: 16"),
        ({"memory": "1Ti"}, {"memory": "256Gi"}, "memory: 1Ti is more than the profile allows; limits.memory: 256Gi"),
        ({}, {"memory": "1G"}, "memory: 8Gi is more than the profile allows; limits.memory: 1G"),
    ],
)
def test_a_pod_may_not_ask_for_more_than_the_profile_allows(
    asked: dict[str, str], limits: dict[str, str], message: str
) -> None:
    resources = {"resources": {"perNode": asked}} if asked else {}
    assert refused(resources, {"limits": limits}) == ("LimitExceeded", f"spec.resources.perNode.{message}")


@pytest.mark.parametrize("name", ["cpu", "memory"])
@pytest.mark.parametrize("amount", ["0", "0.0Gi", "0m", "00", "0.00"])
def test_nothing_is_no_amount(name: str, amount: str) -> None:
    """A limit of 0 is none to the kubelet, and yet no more than what a profile allows."""
    for spec, profile in (
        ({}, {"resources": {"perNode": {name: amount}}}),
        ({"resources": {"perNode": {name: amount}}}, {}),
    ):
        with pytest.raises(ValidationError):
            resolved(spec, {**profile, "limits": {name: "16"}})


def test_what_an_older_operator_pinned_without_a_limit_is_not_taken_for_a_little() -> None:
    before = resolved()
    unlimited = before.model_copy(update={"pods": before.pods.model_copy(update={"memory": "0"})})
    assert refused({}, {"limits": {"memory": "16Gi"}}, before=unlimited)[0] == "LimitExceeded"


@pytest.mark.parametrize("amount", ["1", "0.5", "010.0Gi", "0.010Gi", "100m"])
def test_a_little_is_an_amount(amount: str) -> None:
    assert resolved({"resources": {"perNode": {"memory": amount}}}).pods.memory == amount


def test_amounts_are_compared_whatever_their_units() -> None:
    asked = {"resources": {"perNode": {"cpu": "16000m", "memory": "256Gi"}}}
    assert resolved(asked, {"limits": {"cpu": "16", "memory": "0.25Ti"}}).pods.memory == "256Gi"


@pytest.mark.parametrize(
    ("spec", "profile", "message"),
    [
        (
            {"deadline": "61m"},
            {"deadline": "1h"},
            "spec.deadline: 61m is more than the profile allows; limits.deadline: 1h",
        ),
        (
            {"budget": {"gpuHours": 8.5}},
            {"gpuHours": 8},
            "spec.budget.gpuHours: 8.5 is more than the profile allows; limits.gpuHours: 8",
        ),
    ],
)
def test_more_time_than_the_profile_allows_is_refused(
    spec: dict[str, Any], profile: dict[str, Any], message: str
) -> None:
    assert refused(spec, {"limits": profile}) == ("LimitExceeded", message)


def test_less_time_is_what_the_job_says() -> None:
    limits = {"limits": {"deadline": "1h", "gpuHours": 8}}
    asked = {"deadline": "60m", "budget": {"gpuHours": 8, "onExhausted": "Fail"}}
    assert resolved(asked, limits).limits == LimitsConfig(
        deadline_seconds=3600, gpu_seconds=8 * 3600, stop_at_best=False
    )


def test_a_job_that_names_no_bound_gets_the_profiles() -> None:
    limits = resolved({}, {"limits": {"deadline": "1h", "gpuHours": 8}}).limits
    assert limits == LimitsConfig(
        deadline_seconds=3600, gpu_seconds=8 * 3600, of_profile=["deadline", "gpuHours"], stop_at_best=True
    )


def test_another_bound_of_time_restarts_no_pods() -> None:
    bounded = resolved({}, {"limits": {"deadline": "1h", "gpuHours": 8}})
    assert restart_key(bounded) == restart_key(resolved())


# --- names ---

ALLOWED = {
    "storage": {"credentialsSecret": "ours", "caConfigMap": "our-ca"},
    "allowed": {
        "secrets": ["s3-*"],
        "configMaps": ["ca-*"],
        "serviceAccounts": ["train-*"],
        "runtimeClasses": [],
        "namespaces": ["ns", "team-*"],
    },
}


def pod(**spec: Any) -> dict[str, Any]:
    return {"podTemplate": {"spec": spec}}


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"storage": {"credentialsSecret": "s3-team"}},
        {"storage": {"credentialsSecret": "ours", "caConfigMap": "our-ca"}},
        {"storage": {"caConfigMap": "ca-team"}},
        pod(serviceAccountName="train-a", imagePullSecrets=[{"name": "s3-pull"}]),
    ],
)
def test_a_name_that_the_profile_allows_or_uses_itself_is_fine(spec: dict[str, Any]) -> None:
    resolved(spec, ALLOWED)


@pytest.mark.parametrize(
    ("spec", "reason", "message"),
    [
        (
            {"storage": {"credentialsSecret": "admin"}},
            "SecretNotAllowed",
            "spec.storage.credentialsSecret: admin is not allowed by the profile; allowed: ours, s3-*",
        ),
        (
            {"storage": {"credentialsSecret": "not-s3-team"}},
            "SecretNotAllowed",
            "spec.storage.credentialsSecret: not-s3-team is not allowed by the profile; allowed: ours, s3-*",
        ),
        (
            pod(imagePullSecrets=[{"name": "s3-a"}, {"name": "admin"}]),
            "SecretNotAllowed",
            "spec.podTemplate.spec.imagePullSecrets[1].name: admin is not allowed by the profile; allowed: ours, s3-*",
        ),
        (
            {"storage": {"caConfigMap": "kube-root-ca.crt"}},
            "ConfigMapNotAllowed",
            "spec.storage.caConfigMap: kube-root-ca.crt is not allowed by the profile; allowed: our-ca, ca-*",
        ),
        (
            pod(serviceAccountName="operator"),
            "ServiceAccountNotAllowed",
            "spec.podTemplate.spec.serviceAccountName: operator is not allowed by the profile; allowed: train-*",
        ),
        (
            pod(runtimeClassName="runc"),
            "RuntimeClassNotAllowed",
            "spec.podTemplate.spec.runtimeClassName: runc is not allowed by the profile; allowed: none",
        ),
    ],
)
def test_another_name_is_refused_and_the_allowed_ones_are_named(
    spec: dict[str, Any], reason: str, message: str
) -> None:
    assert refused(spec, ALLOWED) == (reason, message)


def test_what_the_profile_puts_into_the_pods_needs_no_leave() -> None:
    profile = {
        **pod(serviceAccountName="a", runtimeClassName="kata", imagePullSecrets=[{"name": "registry"}]),
        "allowed": {"secrets": [], "serviceAccounts": [], "runtimeClasses": []},
    }
    spec = resolved(pod(serviceAccountName="a", runtimeClassName="kata"), profile).pods.template.spec
    assert spec is not None
    assert (spec.service_account_name, [pull.name for pull in spec.image_pull_secrets or []]) == ("a", ["registry"])


def env(**variables: str) -> dict[str, Any]:
    return pod(env=[{"name": name, "value": value} for name, value in variables.items()])


HUB = {"allowedEndpoints": ["https://*.example.org"], **env(HTTPS_PROXY="http://proxy:3128")}


@pytest.mark.parametrize(
    "spec",
    [
        env(HF_ENDPOINT="https://hub.example.org"),
        env(HF_ENDPOINT="https://hub.example.org/"),
        env(HTTPS_PROXY="http://proxy:3128"),
        env(TOKENIZERS_PARALLELISM="false"),
    ],
)
def test_a_hub_or_proxy_that_the_profile_allows_or_uses_itself_is_fine(spec: dict[str, Any]) -> None:
    resolved(spec, HUB)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_ENDPOINT", "https://evil.org"),
        ("HF_ENDPOINT", "https://evil.org?.example.org"),
        ("HF_ENDPOINT", ""),
        ("HF_ENDPOINT", "http://proxy:3128"),
        ("HF_ENDPOINT", "https://user@hub.example.org"),
        ("HF_ENDPOINT", "https://$(A).example.org"),
        ("HF_ENDPOINT", "https://evil.org%2f.example.org"),
        ("HF_ENDPOINT", "https://evil.org\uff0f.example.org"),
        ("HF_ENDPOINT", "https://evil.org\n.example.org"),
        ("https_proxy", "http://evil.org:3128"),
        ("HTTPS_PROXY", "evil.org:3128"),
        ("all_proxy", "socks5://evil.org"),
    ],
)
def test_a_hub_or_proxy_that_the_profile_does_not_know_gets_no_token(name: str, value: str) -> None:
    reason, message = refused(env(**{"A": "b", name: value}), HUB)
    assert reason == "EndpointNotAllowed"
    listed = ["the profile's own", "https://*.example.org"] if name == "HTTPS_PROXY" else ["https://*.example.org"]
    told = f"spec.podTemplate.spec.env[1]: {name} names a server that the profile does not allow"
    assert message == f"{told}; allowed: {', '.join(listed)}"


def test_what_refuses_an_address_tells_no_password_and_forges_no_line() -> None:
    """Neither the job's nor the profile's: status, Events and log are read by more people than either."""
    secret = "http://svc:S3cret@proxy:3128"
    for spec, profile in (
        (env(HTTPS_PROXY="http://x"), env(HTTPS_PROXY=secret)),
        (env(HTTPS_PROXY=f"{secret}\nERROR forged"), {}),
        ({"storage": {"endpoint": secret}}, {"storage": {"endpoint": "https://other:S3cret@s3"}}),
        ({"storage": {"endpoint": "https://me:S3#S3cret@s3\u2028forged?sig=S3cret"}}, {}),
    ):
        reason, message = refused(spec, profile)
        assert reason == "EndpointNotAllowed"
        assert "S3" not in message
        assert message.isprintable()
    assert "https://s3\\u2028forged is not allowed" in message


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "decides whose credentials are used and where they are sent"),
        ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "decides whose credentials are used and where they are sent"),
        ("AWS_ENDPOINT_URL_STS", "decides whose credentials are used and where they are sent"),
        ("AWS_CONFIG_FILE", "decides whose credentials are used and where they are sent"),
        ("AWS_CA_BUNDLE", "decides whose credentials are used and where they are sent"),
        ("REQUESTS_CA_BUNDLE", "decides which servers are trusted"),
        ("SSL_CERT_FILE", "decides which servers are trusted"),
        ("LD_PRELOAD", "decides which code runs"),
        ("PYTHONPATH", "decides which code runs"),
        ("PYTHONWARNINGS", "decides which code runs"),
        ("NCCL_NET_PLUGIN", "decides which code runs"),
        ("PATH", "decides which code runs"),
        ("NVIDIA_VISIBLE_DEVICES", "decides which devices a pod gets"),
        ("NVIDIA_DRIVER_CAPABILITIES", "decides which devices a pod gets"),
        ("AMD_VISIBLE_DEVICES", "decides which devices a pod gets"),
        ("HABANA_VISIBLE_DEVICES", "decides which devices a pod gets"),
        ("ASCEND_RUNTIME_OPTIONS", "decides which devices a pod gets"),
    ],
)
def test_a_variable_that_could_send_the_pods_credentials_elsewhere_is_the_profiles(name: str, why: str) -> None:
    asked = env(**{"A": "b", name: "/cache/theirs"})
    told = f"spec.podTemplate.spec.env[1]: {name} {why}, so only a profile's podTemplate may set it: remove it"
    for profile in ({}, {"allowedEndpoints": ["https://*"], **env(**{name: "/ours"})}):
        assert refused(asked, profile) == ("VariableNotAllowed", f"{told} from the job")
    resolved(asked, env(**{name: "/cache/theirs"}))
    assert (
        resolved({}, env(**{name: "/ours"})).pods.template
        == resolved(env(**{name: "/ours"}), env(**{name: "/ours"})).pods.template
    )


@pytest.mark.parametrize(
    "name",
    [
        *("AWS_REGION", "AWS_DEFAULT_REGION", "PYTHONHASHSEED", "NCCL_DEBUG", "LDAP", "MY_PATH"),
        *("CUDA_VISIBLE_DEVICES", "NVIDIA_TF32_OVERRIDE"),
    ],
)
def test_other_variables_are_the_jobs(name: str) -> None:
    resolved(env(**{name: "x"}))


@pytest.mark.parametrize("namespace", ["team-a", "team-", "ns"])
def test_a_profile_serves_the_namespaces_it_names(namespace: str) -> None:
    resolved({}, ALLOWED, job=f"{namespace}/one")


@pytest.mark.parametrize("namespace", ["other", "my-team-a", "nsx", "team"])
def test_a_profile_serves_no_other_namespace(namespace: str) -> None:
    assert refused({}, ALLOWED, job=f"{namespace}/one") == (
        "NamespaceNotAllowed",
        f"metadata.namespace: {namespace} is not allowed by the profile; allowed: ns, team-*",
    )


# --- required ---


def test_what_the_profile_requires_the_job_must_say_itself() -> None:
    profile = {"required": ["budget", "model.license"], "limits": {"gpuHours": 8}}
    assert refused({"budget": {"gpuHours": 1}}, profile) == (
        "FieldRequired",
        "spec.model.license: is missing; the profile requires it: set it",
    )
    assert "spec.budget: is missing" in refused({}, profile)[1]
    resolved({"budget": {"gpuHours": 1}, "model": {"uri": "s3://m/b", "license": "mit"}}, profile)


def test_an_empty_map_does_not_count_as_set() -> None:
    empty = {"podTemplate": {"metadata": {"labels": {}}}}
    assert refused(empty, {"required": ["podTemplate.metadata.labels"]})[0] == "FieldRequired"


@pytest.mark.parametrize("path", get_args(Requirable))
def test_each_field_that_may_be_required_is_an_optional_one_of_the_job(path: str) -> None:
    schema, optional = open_api_schema(FineTuneJob)["properties"]["spec"], False
    for name in path.split("."):
        optional = optional or name not in schema.get("required", [])
        schema = schema["properties"][name]
    assert optional
    assert refused({}, {"required": [path]})[0] == "FieldRequired"


# --- all of it ---


def test_all_that_stands_against_a_job_is_said_at_once() -> None:
    profile = {**ALLOWED, "required": ["deadline"], "limits": {"gpus": 1}}
    asked = {"resources": {"perNode": {"gpus": 2}}, **pod(runtimeClassName="x")}
    reason, message = refused(asked, profile, job="other/one")
    assert reason == "NamespaceNotAllowed"
    assert [part.split(":")[0] for part in message.split("; ") if part.startswith(("spec.", "metadata."))] == [
        "metadata.namespace",
        "spec.deadline",
        "spec.resources",
        "spec.podTemplate.spec.runtimeClassName",
    ]


def test_the_fence_is_for_those_who_share_a_cluster() -> None:
    resolved({}, {**ALLOWED, "required": ["budget"]}, job="other/one", defaults=LAPTOP)


# --- in the operator ---

STRICT = {"default": Profile("default", {"limits": {"gpus": 0}})}


def test_a_refused_job_has_failed_until_its_document_changes() -> None:
    decision = decide(world(pinned={}, profiles=STRICT), now=NOW)
    assert decision.actions == ()
    assert decision.status is not None
    assert (decision.status.phase, reason_of(decision.status)) == ("Failed", "LimitExceeded")
    assert decision.again_after is None


def test_a_stricter_profile_leaves_a_run_alone_that_is_pinned() -> None:
    before, after = world(TRAINING, *running()), world(TRAINING, *running(), profiles=STRICT)
    assert decide(after, now=NOW) == decide(before, now=NOW)
    assert decide(after, now=NOW).actions == ()


def test_a_changed_document_that_is_refused_leaves_the_old_run_going() -> None:
    changed = {"subject": subject({**SPEC, "deadline": "2h"}, generation=2), "pinned": {1: pinned()}}
    decision = decide(world(TRAINING, *running(), profiles=STRICT, **changed), now=NOW)
    assert decision.actions == ()
    assert decision.status is not None
    assert decision.status.phase == "Training"
    assert "generation 2 was refused: spec.resources: 1 x 1 GPUs is more" in (decision.status.message or "")


OTHER = {
    "images": {"trainer": "trainer:2", "preflight": "preflight:2"},
    "gpu": {"memory": "80Gi", "watts": 700.0},
    "storage": {"credentialsSecret": "another"},
    "allowedLicenses": ["mit"],
    "podTemplate": {"spec": {"nodeSelector": {"gpu": "h200"}}},
    "limits": {"memory": "16Gi"},
}


def test_a_live_edit_restarts_nothing_whatever_the_profile_would_make_of_the_document_by_now() -> None:
    """Nor does a newer operator, with images and keys of its own."""
    longer = subject({**SPEC, "deadline": "2h"}, generation=2)
    before = replace(pinned(), key="of an older operator")
    going = t(key=before.key)
    others = {"profiles": {"default": Profile("default", OTHER)}, "defaults": Defaults("trainer:9", "preflight:9")}
    decision = decide(
        world(TRAINING, going, pod_of(going), progress(), subject=longer, pinned={1: before}, **others), now=NOW
    )
    (action,) = decision.actions
    assert isinstance(action, CreateConfig)
    assert action.key == before.key
    assert action.config.limits.deadline_seconds == 7200
    assert action.config.limits.gpu_watts == 700
    kept = {"generation": 2, "limits": action.config.limits}
    assert action.config == before.config.model_copy(update=kept)
    assert decision.status is not None
    assert decision.status.phase == "Training"


def test_a_document_of_which_more_is_changed_gets_what_the_profile_says_by_now() -> None:
    changed = {
        "subject": subject({**SPEC, "model": {"uri": "s3://models/other"}}, generation=2),
        "pinned": {1: pinned()},
    }
    decision = decide(world(TRAINING, *running(), profiles={"default": Profile("default", OTHER)}, **changed), now=NOW)
    pods = [action.config.pods for action in decision.actions if isinstance(action, CreateConfig)]
    assert [one.trainer_image for one in pods] == ["trainer:2"]


def test_pods_that_go_on_are_judged_by_what_the_profile_allows_by_now() -> None:
    """Not those that the profile would give to the document by now."""
    smaller = {
        "default": Profile("default", {"resources": {"perNode": {"memory": "1Gi"}}, "limits": {"memory": "1Gi"}})
    }
    changed = {"subject": subject({**SPEC, "deadline": "2h"}, generation=2), "pinned": {1: pinned()}}
    decision = decide(world(TRAINING, *running(), profiles=smaller, **changed), now=NOW)
    assert decision.actions == ()
    assert decision.status is not None
    assert "refused: spec.resources.perNode.memory: 8Gi is more than the profile allows" in (
        decision.status.message or ""
    )


def running() -> tuple[Any, ...]:
    return t(), pod_of(t()), progress()
