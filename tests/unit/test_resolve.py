"""From document and profile to the run: whose word counts, what is refused, and what makes a run the same run."""

from typing import Any

import pytest

from finetune_api.contract import LimitsConfig, RunConfig
from finetune_api.job import FineTuneJobSpec
from finetune_api.profile import FineTuneProfileSpec
from finetune_api.resolve import (
    Defaults,
    ResolveError,
    evaluation_id,
    publication_id,
    resolve,
    restart_key,
    run_id,
    train_identity,
)
from finetune_api.scalars import seconds

DEFAULTS = Defaults(trainer_image="trainer:1", preflight_image="preflight:1")
SPEC: dict[str, Any] = {
    "task": {"type": "text-classification"},
    "model": {"uri": "s3://models/base/"},
    "data": {"train": [{"uri": "s3://data/train.jsonl"}]},
    "output": {"uri": "s3://models/out/"},
}
INPUTS = {"model": "m", "train/0": "t"}


def resolved(spec: dict[str, Any] | None = None, profile: dict[str, Any] | None = None, **fields: Any) -> RunConfig:
    given = {"job": "ns/one", "job_uid": "u", "generation": 1, "defaults": DEFAULTS, **fields}
    return resolve(
        FineTuneJobSpec.model_validate({**SPEC, **(spec or {})}),
        FineTuneProfileSpec.model_validate(profile or {}),
        **given,
    )


def identity(config: RunConfig, inputs: dict[str, str] | None = None) -> str:
    return run_id(train_identity(config, labels=["a", "b"], inputs=inputs or INPUTS))


# --- whose word counts ---


def test_the_smallest_document_is_filled_in_completely() -> None:
    config = resolved()
    assert (config.training.epochs, config.training.batch_size, config.training.learning_rate) == (3.0, 32, 2e-5)
    assert (config.data.validation_fraction, config.data.max_length) == (0.1, 256)
    assert (config.pods.nodes, config.pods.gpus, config.pods.trainer_image) == (1, 1, "trainer:1")
    assert (config.model, config.output.uri) == ("s3://models/base", "s3://models/out")
    assert (config.max_retries, config.primary, config.storage.region) == (3, "f1", "us-east-1")


@pytest.mark.parametrize(("method", "rate"), [("full", 2e-5), ("head", 1e-3), ("lora", 2e-4)])
def test_the_learning_rate_depends_on_the_method_and_on_sgd(method: str, rate: float) -> None:
    assert resolved({"method": {"type": method}}).training.learning_rate == rate
    plain = {"method": {"type": method}, "training": {"optimizer": {"type": "sgd"}}}
    assert resolved(plain).training.learning_rate == 1e-2


def test_the_jobs_word_counts_before_the_profiles_before_the_flags() -> None:
    profile = {
        "images": {"trainer": "theirs:2"},
        "resources": {"nodes": 2, "perNode": {"gpus": 8, "cpu": "16"}},
        "storage": {"endpoint": "http://s3:8333", "region": "r", "credentialsSecret": "s"},
        "gpu": {"resourceName": "amd.com/gpu"},
    }
    config = resolved({"resources": {"perNode": {"gpus": 2}}, "storage": {"credentialsSecret": "mine"}}, profile)
    assert (config.pods.gpus, config.pods.cpu, config.pods.nodes, config.pods.memory) == (2, "16", 2, "8Gi")
    assert (config.pods.trainer_image, config.pods.preflight_image) == ("theirs:2", "preflight:1")
    assert config.pods.gpu_resource == "amd.com/gpu"
    assert (config.storage.endpoint, config.storage.region) == ("http://s3:8333", "r")
    assert config.storage.credentials_secret == "mine"


SERVER = {
    "storage": {
        "endpoint": "https://own:1",
        "credentialsSecret": "s",
        "addressing": "VirtualHost",
        "caConfigMap": "ca",
    },
    "allowedEndpoints": ["https://*"],
}


@pytest.mark.parametrize(
    ("storage", "addressing", "ca"),
    [
        ({}, "VirtualHost", "ca"),
        ({"endpoint": "https://own:1/"}, "VirtualHost", "ca"),
        ({"addressing": "Path"}, "Path", "ca"),
        ({"addressing": "Auto", "caConfigMap": "mine"}, None, "mine"),
        ({"endpoint": "https://other"}, None, None),
        ({"endpoint": "https://other", "addressing": "VirtualHost", "caConfigMap": "mine"}, "VirtualHost", "mine"),
    ],
)
def test_addressing_and_authority_are_those_of_the_endpoint(
    storage: dict[str, Any], addressing: str | None, ca: str | None
) -> None:
    found = resolved({"storage": storage}, SERVER).storage
    assert (found.addressing, found.ca_config_map, found.credentials_secret) == (addressing, ca, "s")


def test_zero_is_a_word_too() -> None:
    profile = {"resources": {"perNode": {"gpus": 8}}}
    assert resolved({"resources": {"perNode": {"gpus": 0}}}, profile).pods.gpus == 0
    assert resolved({"retries": {"max": 0}}).max_retries == 0


def test_of_pod_templates_maps_merge_and_lists_append_by_name() -> None:
    profile = {
        "podTemplate": {
            "metadata": {"labels": {"a": "theirs", "b": "theirs"}},
            "spec": {
                "tolerations": [{"key": "gpu"}],
                "env": [{"name": "A", "value": "theirs"}, {"name": "B", "value": "theirs"}],
                "priorityClassName": "low",
            },
        }
    }
    job = {
        "podTemplate": {
            "metadata": {"labels": {"b": "mine"}},
            "spec": {"tolerations": [{"key": "spot"}], "env": [{"name": "B", "value": "mine"}]},
        }
    }
    template = resolved(job, profile).pods.template
    assert template.metadata is not None
    assert template.spec is not None
    assert template.metadata.labels == {"a": "theirs", "b": "mine"}
    assert [t.key for t in template.spec.tolerations or []] == ["gpu", "spot"]
    assert {e.name: e.value for e in template.spec.env or []} == {"A": "theirs", "B": "mine"}
    assert template.spec.priority_class_name == "low"


@pytest.mark.parametrize(("text", "value"), [("90s", 90), ("10m", 600), ("1h30m", 5400), ("1h1m1s", 3661)])
def test_durations_are_kubernetes_style(text: str, value: float) -> None:
    assert seconds(text) == value


def test_limits_are_seconds_and_absent_where_none_is_asked_for() -> None:
    assert resolved({}).limits == LimitsConfig()
    asked = {"deadline": "1h30m", "budget": {"gpuHours": 0.5, "onExhausted": "Fail"}, "ttlAfterFinished": "24h"}
    wanted = LimitsConfig(deadline_seconds=5400, gpu_seconds=1800, stop_at_best=False, keep_seconds=86400)
    assert resolved(asked).limits == wanted
    assert resolved({"budget": {"gpuHours": 1}}).limits.stop_at_best


def test_what_is_measured_of_a_part_is_never_taken_for_the_whole() -> None:
    config = resolved({})
    parts = [None, *({"step": step, "weights": weights} for step in (10, 20) for weights in "ab")]
    found = [evaluation_id("r", config, test=None, part=part) for part in parts]
    assert len({*found}) == 5
    assert found[0] == evaluation_id("r", config, test=None)


# --- what is refused ---


@pytest.mark.parametrize(
    "spec",
    [
        {"model": {"uri": "file:///m"}},
        {"output": {"uri": "file:///o"}},
        {"data": {"train": [{"uri": "s3://a/b"}, {"uri": "file:///t"}]}},
        {"data": {"train": [{"uri": "s3://a/b"}], "validation": {"uri": "file:///v"}}},
        {"data": {"train": [{"uri": "s3://a/b"}], "test": {"uri": "file:///t"}}},
    ],
)
def test_files_of_one_machine_are_refused_in_a_cluster_only(spec: dict[str, Any]) -> None:
    with pytest.raises(ResolveError) as caught:
        resolved(spec)
    assert caught.value.reason == "FileUriInCluster"
    resolved(spec, defaults=Defaults(trainer_image="", preflight_image="", in_cluster=False))


ALLOWED = {"storage": {"endpoint": "http://own:1"}, "allowedEndpoints": ["https://*.example.org", "http://10.0.0.1:*"]}


@pytest.mark.parametrize(
    "endpoint",
    ["http://own:1", "http://own:1/", "https://s3.example.org", "https://a.b.example.org", "http://10.0.0.1:9"],
)
def test_endpoints_that_the_profile_names_are_allowed(endpoint: str) -> None:
    assert resolved({"storage": {"endpoint": endpoint}}, ALLOWED).storage.endpoint == endpoint.rstrip("/")


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://169.254.169.254",
        "http://s3.example.org",
        "https://example.org",
        "https://evil.org",
        "https://x.example.org.evil.org",
        "https://user@s3.example.org",
        "http://10.0.0.1:9@evil",
        "https://evil.org?.example.org",
        "https://evil.org#.example.org",
        "https://evil.org\\.example.org",
        "http://10.0.0.10:9",
        "https://s3.example.org:99",
    ],
)
def test_other_endpoints_are_refused_and_the_allowed_ones_named(endpoint: str) -> None:
    with pytest.raises(ResolveError) as caught:
        resolved({"storage": {"endpoint": endpoint}}, ALLOWED)
    assert caught.value.reason == "EndpointNotAllowed"
    assert "https://*.example.org" in caught.value.message


# --- what makes a run the same run ---


@pytest.mark.parametrize(
    "spec",
    [
        {"resources": {"nodes": 4, "perNode": {"gpus": 8}}},
        {"training": {"microBatch": 1}},
        {"podTemplate": {"spec": {"priorityClassName": "high"}}},
        {"retries": {"max": 9}},
        {"checkpoint": {"every": {"steps": 5}}},
        {"output": {"uri": "s3://elsewhere/out", "merge": True, "weights": "Last"}},
        {"model": {"uri": "s3://another/name/of/the/same/bytes"}},
        {"training": {"learningRate": 2e-5, "epochs": 3}},
        {"data": {"train": [{"uri": "s3://data/train.jsonl"}], "test": {"uri": "s3://data/test.jsonl"}}},
    ],
)
def test_what_does_not_decide_the_weights_is_the_same_run(spec: dict[str, Any]) -> None:
    assert identity(resolved(spec)) == identity(resolved())


@pytest.mark.parametrize(
    "spec",
    [
        {"training": {"learningRate": 3e-5}},
        {"training": {"epochs": 4}},
        {"training": {"maxSteps": 10}},
        {"training": {"seed": 1}},
        {"training": {"batchSize": 16}},
        {"training": {"evaluateEvery": {"steps": 10}}},
        {"method": {"type": "head"}},
        {"method": {"type": "lora"}},
        {"method": {"type": "full", "freeze": {"layers": 1}}},
        {"method": {"type": "full", "unfreeze": {"everySteps": 5}}},
        {"data": {"train": [{"uri": "s3://data/train.jsonl"}], "maxLength": 64}},
        {"data": {"train": [{"uri": "s3://data/train.jsonl"}], "validation": {"fraction": 0.2}}},
        {"evaluation": {"primary": "accuracy"}},
    ],
)
def test_what_decides_the_weights_is_another_run(spec: dict[str, Any]) -> None:
    assert identity(resolved(spec)) != identity(resolved())


def test_other_bytes_are_another_run() -> None:
    assert identity(resolved()) != identity(resolved(), {"model": "m", "train/0": "other"})


def test_lora_fields_count_only_for_lora() -> None:
    assert identity(resolved({"method": {"type": "lora", "rank": 4}})) != identity(
        resolved({"method": {"type": "lora"}})
    )


def test_a_field_that_came_later_changes_no_run_that_does_not_use_it() -> None:
    """The identities of the first release; where one changes on purpose, every run of a user trains anew."""
    assert identity(resolved()) == "7efb879d2fcc2d56"
    assert identity(resolved({"training": {"optimizer": {"type": "adamw", "betas": [0.9, 0.999]}}})) == identity(
        resolved()
    )
    assert identity(resolved({"training": {"optimizer": {"type": "adamw", "betas": [0.9, 0.98]}}})) != identity(
        resolved()
    )


def test_a_run_id_is_sixteen_hexadecimal_characters() -> None:
    name = identity(resolved())
    assert len(name) == 16
    int(name, 16)


def test_evaluation_and_publication_have_identities_of_their_own() -> None:
    plain, merged = resolved(), resolved({"output": {"uri": "s3://models/out", "merge": True}})
    assert evaluation_id("r", plain, test=None) != evaluation_id("r", plain, test="x")
    unmeasured = resolved({"evaluation": {"baseline": "None"}})
    assert evaluation_id("r", plain, test=None) != evaluation_id("r", unmeasured, test=None)
    assert publication_id("e", plain) != publication_id("e", merged)
    assert publication_id("e", plain) == publication_id("e", resolved({"retries": {"max": 1}}))


# --- what makes pods the same pods ---


@pytest.mark.parametrize("spec", [{"retries": {"max": 9}}, {"checkpoint": {"every": {"steps": 5}, "keepLast": 9}}])
def test_live_fields_restart_nothing(spec: dict[str, Any]) -> None:
    assert restart_key(resolved(spec, generation=2)) == restart_key(resolved())


@pytest.mark.parametrize(
    "spec",
    [
        {"training": {"learningRate": 3e-5}},
        {"training": {"microBatch": 1}},
        {"resources": {"perNode": {"gpus": 2}}},
        {"podTemplate": {"metadata": {"labels": {"a": "b"}}}},
        {"storage": {"credentialsSecret": "s"}},
        {"storage": {"addressing": "VirtualHost"}},
        {"storage": {"caConfigMap": "ca"}},
        {"output": {"uri": "s3://elsewhere"}},
    ],
)
def test_all_other_fields_do(spec: dict[str, Any]) -> None:
    assert restart_key(resolved(spec)) != restart_key(resolved())


def test_a_config_survives_its_way_through_the_config_map() -> None:
    config = resolved({"podTemplate": {"spec": {"env": [{"name": "A", "value": "b"}]}}})
    again = RunConfig.model_validate_json(config.model_dump_json(by_alias=True))
    assert again == config
    assert restart_key(again) == restart_key(config)
