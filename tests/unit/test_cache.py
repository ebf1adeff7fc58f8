"""The cache: the newest version wins, UIDs never come again, nothing is taken for ours by its name."""

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.cluster import controlled_by

from finetune_operator.cache import Cache, Kind
from finetune_operator.views import GENERATION, JOB_UID, RESTART_KEY, RETRY, ROLE, RUN, Subject

SUCCEEDED = {
    "type": "Succeeded",
    "message": "",
    "lastTransitionTime": "2026-01-01T00:00:00Z",
    "observedGeneration": 1,
}
RUNNING = {"containerStatuses": [{"name": "trainer", "state": {"running": {}}}]}


def meta(name: str, version: int, **fields: Any) -> dict[str, Any]:
    uid = fields.pop("uid", f"uid-{name}")
    return {"name": name, "namespace": "ns", "uid": uid, "resourceVersion": str(version), **fields}


def job(
    name: str, version: int = 1, *, output: str = "s3://out", namespace: str = "ns", **status: Any
) -> dict[str, Any]:
    return {
        "metadata": {**meta(name, version), "namespace": namespace},
        "spec": {"output": {"uri": output}},
        "status": status,
    }


def child(name: str, version: int = 1, *, owner: str = "uid-one", uid: str | None = None) -> dict[str, Any]:
    references = [controlled_by("FineTuneJob", owner)]
    labels = {ROLE: "train", RUN: "r", GENERATION: "1"}
    return {"metadata": meta(name, version, uid=uid or f"uid-{name}", ownerReferences=references, labels=labels)}


def pod(name: str, version: int = 1, *, owner: str = "uid-t1") -> dict[str, Any]:
    references = [controlled_by("Job", owner)]
    return {"metadata": meta(name, version, ownerReferences=references, labels={JOB_UID: "uid-one", ROLE: "train"})}


def config(name: str) -> dict[str, Any]:
    """A ConfigMap that pins a run."""
    labels = {GENERATION: "1", JOB_UID: "uid-one"}
    return {"metadata": meta(name, 1, ownerReferences=[controlled_by("FineTuneJob", "uid-one")], labels=labels)}


@given(st.permutations([1, 2, 3, 4, 5]))
def test_the_newest_version_wins_in_whatever_order_they_come(versions: list[int]) -> None:
    cache = Cache()
    for version in versions:
        cache.apply("finetunejobs", job("one", version, message=f"v{version}"))
    subject = cache.subject("uid-one")
    assert subject is not None
    assert subject.status.message == "v5"


def test_what_is_gone_does_not_come_back_by_an_old_event() -> None:
    cache = Cache()
    cache.apply("jobs", child("t1", 1))
    assert cache.forget("uid-t1") == {"uid-one"}
    assert cache.apply("jobs", child("t1", 2)) == frozenset()
    assert cache.children("uid-one") == ()
    cache.apply("jobs", child("t1", 3, uid="another"))
    assert [c.uid for c in cache.children("uid-one")] == ["another"]


def test_what_loses_the_label_that_watches_select_by_is_gone_until_it_has_it_again() -> None:
    cache = Cache()
    cache.apply("jobs", child("t1", 5))
    assert cache.removed(child("t1", 6)) == {"uid-one"}
    assert cache.children("uid-one") == ()
    assert cache.apply("jobs", child("t1", 6)) == frozenset()
    assert cache.apply("jobs", child("t1", 7)) == {"uid-one"}
    assert cache.removed(child("t1", 6)) == frozenset()
    assert [c.name for c in cache.children("uid-one")] == ["t1"]
    cache.keep("jobs", [], version=8, namespaces=[])
    assert cache.knows("uid-t1", 8)
    cache.apply("jobs", child("t1", 9))
    assert [c.name for c in cache.children("uid-one")] == ["t1"]


def test_the_end_of_what_was_never_seen_concerns_whom_it_was_made_for() -> None:
    """Somebody deletes a Job so soon that the answer to who made it comes later: nothing else would tell."""
    cache = Cache()
    made = child("p1", 5)
    made["metadata"]["labels"][JOB_UID] = "uid-one"
    gone = {"metadata": {**made["metadata"], "resourceVersion": "6"}}
    assert cache.removed(gone) == {"uid-one"}
    assert cache.apply("jobs", made) == frozenset()
    assert cache.children("uid-one") == ()
    assert cache.removed(gone) == frozenset(), "it is known to be gone"
    cache.apply("jobs", {"metadata": {**made["metadata"], "uid": "another"}})
    cache.forget("another")
    assert cache.removed({"metadata": {**gone["metadata"], "uid": "another"}}) == frozenset(), "we deleted it"


def test_children_are_known_by_their_controller_and_not_by_their_name() -> None:
    cache = Cache()
    cache.apply("jobs", child("t1", owner="somebody else"))
    assert cache.children("uid-one") == ()
    assert [c.name for c in cache.children("somebody else")] == ["t1"]


@pytest.mark.parametrize("first", ["the FineTuneJob", "what is forged"])
def test_what_lies_in_another_namespace_is_nobodys_whatever_uids_it_names(first: str) -> None:
    """The API server takes any owner and any label from who may create objects there."""
    forged: list[tuple[Kind, dict[str, Any]]] = [
        ("configmaps", {**config("g1"), "data": {"config.json": '{"of": "the forger"}'}}),
        ("jobs", child("t9")),
        ("jobs", failed("t8", 1)),
        ("pods", {**pod("y"), "status": RUNNING}),
        ("pods", ended("x", 1)),
    ]
    for _, raw in forged:
        raw["metadata"]["namespace"] = "other"
    cache = Cache()
    if first == "the FineTuneJob":
        cache.apply("finetunejobs", job("one"))
        assert [cache.apply(kind, raw) for kind, raw in forged] == [frozenset()] * len(forged)
    else:
        for kind, raw in forged:
            cache.apply(kind, raw)
        cache.apply("finetunejobs", job("one"))
    assert (cache.children("uid-one"), cache.pods("uid-one"), cache.underway, cache.trainings) == ((), (), 0, 0)
    assert (cache.pinned("uid-one"), cache.unreadable("uid-one")) == ({}, frozenset())
    assert (cache.known_for("uid-one"), cache.unsettled("uid-one")) == ({}, False)
    gone = [{"metadata": {**raw["metadata"], "resourceVersion": "9"}} for _, raw in forged]
    assert [cache.removed(raw) for raw in gone] == [frozenset()] * len(gone)
    assert cache.pods("uid-one") == (), "nor is remembered what it said last"
    never_seen = {"metadata": {**gone[-1]["metadata"], "uid": "uid-never-seen"}}
    assert cache.removed(never_seen) == frozenset()


def test_an_owner_of_another_kind_is_none() -> None:
    """What a kind that nobody serves owns is never collected: it would count for good."""
    cache = Cache()
    cache.apply("finetunejobs", job("one"))
    for name, reference in {
        "kind": {"apiVersion": "finetune.dev/v1alpha1", "kind": "Nope"},
        "group": {"apiVersion": "example.com/v1", "kind": "FineTuneJob"},
        "none": {},
    }.items():
        references = [{**reference, "uid": "uid-one", "controller": True}]
        assert cache.apply("jobs", {"metadata": {**child(name)["metadata"], "ownerReferences": references}}) == set()
        cache.apply("configmaps", {**config(f"c-{name}"), "metadata": meta(name, 1, ownerReferences=references)})
    assert (cache.children("uid-one"), cache.unreadable("uid-one")) == ((), frozenset())


def test_pods_are_known_after_their_job_is_gone() -> None:
    cache = Cache()
    cache.apply("jobs", child("t1"))
    assert cache.apply("pods", pod("x")) == {"uid-one"}
    cache.forget("uid-t1")
    assert [p.name for p in cache.pods("uid-one")] == ["x"]


def test_a_change_of_one_concerns_all_with_the_same_output() -> None:
    cache = Cache()
    cache.apply("finetunejobs", job("one"))
    cache.apply("finetunejobs", job("two", namespace="other", output="s3://out/"))
    cache.apply("finetunejobs", job("three", output="s3://elsewhere"))
    assert cache.apply("finetunejobs", job("one", 2)) == {"uid-one", "uid-two"}
    one = cache.subject("uid-one")
    assert one is not None
    assert [other.name for other in cache.same_output(one)] == ["two"]
    assert cache.forget("uid-two") == {"uid-one", "uid-two"}
    assert cache.same_output(one) == []


def test_a_profile_concerns_every_job_that_is_not_done() -> None:
    cache = Cache()
    cache.apply("finetunejobs", job("one"))
    cache.apply("finetunejobs", job("two", phase="Succeeded", observedGeneration=1))
    profile = {"metadata": {"name": "default", "uid": "uid-p", "resourceVersion": "1"}, "spec": {}}
    assert cache.apply("finetuneprofiles", profile) == {"uid-one"}
    assert set(cache.profiles()) == {"default"}
    cache.forget("uid-p")
    assert cache.profiles() == {}


def test_what_a_list_does_not_have_is_gone_unless_it_is_newer_than_the_list() -> None:
    cache = Cache()
    for name, version in (("t1", 5), ("t2", 6), ("t3", 30)):
        cache.apply("jobs", child(name, version))
    assert cache.keep("jobs", {"uid-t2"}, version=20, namespaces=["ns"]) == {"uid-one"}
    assert sorted(c.name for c in cache.children("uid-one")) == ["t2", "t3"]
    assert cache.keep("jobs", {"uid-t2"}, version=20, namespaces=["ns"]) == frozenset()


def test_it_knows_which_objects_it_has_as_new_as_they_are() -> None:
    cache = Cache()
    cache.apply("jobs", child("t1", 5))
    assert cache.knows("uid-t1", 4)
    assert cache.knows("uid-t1", 5)
    assert not cache.knows("uid-t1", 6)
    assert not cache.knows("uid-t2", 1)
    cache.forget("uid-t1", version=8)
    assert cache.knows("uid-t1", 8)
    assert not cache.knows("uid-t1", 9)


def test_a_job_at_rest_is_folded_and_comes_back_as_it_was() -> None:
    cache = Cache()
    raw = job("one", 3, phase="Failed", observedGeneration=1, message="loss is not a number")
    raw["metadata"] |= {"annotations": {RETRY: "1", "other": "x" * 1000}, "generation": 1, "managedFields": [{}]}
    raw["status"]["conditions"] = [{**SUCCEEDED, "status": "False", "reason": "Diverged"}]
    raw["status"]["lastHandledRetry"] = "1"
    cache.apply("finetunejobs", raw)
    assert cache.rests("uid-one")
    assert cache.subject("uid-one") == Subject.of(raw)
    assert cache.phases() == {("Failed", "Diverged"): 1}
    assert list(cache.working()) == []
    assert cache.subjects() == ["uid-one"]


def test_a_failed_job_that_is_to_be_tried_again_is_not_at_rest() -> None:
    cache = Cache()
    raw = job("one", 3, phase="Failed", observedGeneration=1)
    raw["metadata"]["annotations"] = {RETRY: "1"}
    cache.apply("finetunejobs", raw)
    assert not cache.rests("uid-one")
    assert [subject.name for subject in cache.working()] == ["one"]
    assert cache.phases() == {("Failed", ""): 1}


def test_jobs_are_counted_by_phase_and_reason() -> None:
    cache = Cache()
    reason = {"conditions": [{**SUCCEEDED, "status": "Unknown", "reason": "Training"}]}
    for name in ("one", "two"):
        cache.apply("finetunejobs", job(name, phase="Training", **reason))
    cache.apply("finetunejobs", job("three", phase="Succeeded", observedGeneration=1))
    cache.apply("finetunejobs", job("four"))
    assert cache.phases() == {("Training", "Training"): 2, ("Succeeded", ""): 1, ("Pending", ""): 1}


def test_of_what_was_never_seen_nothing_is_to_be_done() -> None:
    assert Cache().rests("uid-one")


def test_what_we_wrote_ourselves_concerns_only_others_when_the_watch_brings_it() -> None:
    cache = Cache()
    assert cache.apply("finetunejobs", job("one", 5)) == {"uid-one"}
    assert cache.apply("finetunejobs", job("one", 5)) == frozenset()
    assert cache.apply("finetunejobs", job("one", 6)) == {"uid-one"}
    cache.apply("finetunejobs", job("two", 7))
    assert cache.apply("finetunejobs", job("one", 6)) == {"uid-two"}
    assert cache.apply("jobs", child("t1", 8)) == {"uid-one"}
    assert cache.apply("jobs", child("t1", 8)) == frozenset()


def test_a_train_job_is_underway_until_it_ends_or_goes() -> None:
    cache = Cache()
    for name in ("t1", "t2", "t3"):
        cache.apply("jobs", child(name, 1))
    assert cache.underway == 3
    done = {"conditions": [{"type": "Complete", "status": "True"}]}
    cache.apply("jobs", {**child("t1", 2), "status": done})
    assert cache.underway == 2
    cache.forget("uid-t2")
    assert cache.underway == 1


def test_only_jobs_of_which_a_pod_runs_train() -> None:
    """Where a thousand wait for ten GPUs, ten share what is asked of trainers."""
    cache = Cache()
    for number in range(1000):
        held = {**child(f"t{number}"), "spec": {"suspend": number >= 10}}
        cache.apply("jobs", held)
    assert (cache.underway, cache.trainings) == (1000, 0)
    for name in ("a", "b"):
        cache.apply("pods", pod(name, 2, owner="uid-t1"))
    assert cache.trainings == 0
    for name in ("a", "b"):
        cache.apply("pods", {**pod(name, 3, owner="uid-t1"), "status": RUNNING})
    assert cache.trainings == 1
    looks = pod("p", 3, owner="uid-p1")
    looks["metadata"]["labels"][ROLE] = "preflight"
    cache.apply("pods", {**looks, "status": RUNNING})
    assert cache.trainings == 1
    cache.apply("pods", pod("a", 4, owner="uid-t1"))
    assert cache.trainings == 1
    cache.removed(pod("b", 4, owner="uid-t1"))
    assert (cache.underway, cache.trainings) == (1000, 0)


def test_how_a_jobs_pods_ended_may_become_known_a_little_after_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("finetune_operator.cache.time.monotonic", lambda: clock[0])
    cache = Cache()
    complete = {"status": {"conditions": [{"type": "Complete", "status": "True"}]}}
    cache.apply("jobs", child("t1", 1))
    assert not cache.unsettled("uid-one")
    cache.apply("jobs", {**child("t1", 2), **complete})
    assert cache.unsettled("uid-one")
    clock[0] += 1
    cache.apply("jobs", {**child("t1", 3), **complete})  # another change of it begins nothing anew
    ended = {"name": "trainer", "state": {"terminated": {"exitCode": 0}}}
    cache.apply("pods", {**pod("x", 4), "status": {"phase": "Succeeded", "containerStatuses": [ended]}})
    assert not cache.unsettled("uid-one")
    cache.forget("uid-x")
    assert cache.unsettled("uid-one")
    clock[0] += 1.5
    assert not cache.unsettled("uid-one")


def test_what_a_pod_that_goes_away_says_is_not_waited_with() -> None:
    cache = Cache()
    cache.apply("pods", pod("x", 1))
    failed = {"status": {"conditions": [{"type": "FailureTarget", "status": "True"}]}}
    cache.apply("jobs", {**child("t1", 2), **failed})
    assert cache.unsettled("uid-one")
    target = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}
    cache.apply("pods", {**pod("x", 3), "status": {"phase": "Running", "conditions": [target]}})
    assert not cache.unsettled("uid-one")


def ended(name: str, version: int, code: int = 45, **fields: Any) -> dict[str, Any]:
    state = {"name": "trainer", "state": {"terminated": {"exitCode": code}}}
    return {**pod(name, version, **fields), "status": {"phase": "Failed", "containerStatuses": [state]}}


def failed(name: str, version: int) -> dict[str, Any]:
    return {**child(name, version), "status": {"conditions": [{"type": "FailureTarget", "status": "True"}]}}


def codes(cache: Cache) -> list[int | None]:
    return [pod.exit.code if pod.exit is not None else None for pod in cache.pods("uid-one")]


def test_how_a_pod_ended_is_known_after_it_is_gone_once_its_job_has_ended() -> None:
    """The kubelet removes one that was evicted as soon as it has ended; nobody may have looked in between."""
    cache = Cache()
    cache.apply("finetunejobs", job("one"))
    cache.apply("jobs", child("t1", 1))
    running = {"status": {"phase": "Running", "containerStatuses": [{"name": "trainer", "state": {"running": {}}}]}}
    cache.apply("pods", {**pod("x", 2), **running})
    assert cache.removed(ended("x", 3)) == {"uid-one"}, "what ended it and that it is gone are one piece of news"
    assert codes(cache) == [], "its Job makes another, or is suspended"
    cache.apply("jobs", failed("t1", 4))
    assert codes(cache) == [45]
    assert all(pod.over and not pod.running for pod in cache.pods("uid-one"))
    assert not cache.unsettled("uid-one")
    cache.apply("pods", ended("y", 5, 137))
    assert codes(cache) == [137], "a pod that is there counts instead"
    cache.apply("finetunejobs", job("one", 6, phase="Training"))
    cache.forget("uid-y")
    assert codes(cache) == [137], "the last one counts"


def test_pods_that_went_because_their_job_was_suspended_say_nothing_of_its_end() -> None:
    """It goes on with others; what those took is counted already."""
    cache = Cache()
    cache.apply("finetunejobs", job("one"))
    cache.apply("jobs", child("t1", 1))
    for name, version in (("x", 2), ("y", 4)):  # before and after that is known
        cache.apply("pods", pod(name, version))
        cache.removed(ended(name, version + 1))
        cache.apply("jobs", {**child("t1", version + 2), "spec": {"suspend": True}})
    cache.apply("jobs", {**child("t1", 7), "spec": {"suspend": False}})
    cache.apply("jobs", failed("t1", 8))
    assert codes(cache) == []


def test_how_the_pods_of_a_job_ended_that_is_gone_is_known_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one that was deleted for spec.suspend say which step they have committed."""
    clock = [100.0]
    monkeypatch.setattr("finetune_operator.cache.time.monotonic", lambda: clock[0])
    cache = Cache()
    cache.apply("finetunejobs", job("one"))
    cache.apply("jobs", child("t1", 1))
    cache.apply("pods", pod("x", 2))
    cache.forget("uid-t1")
    cache.removed(ended("x", 3))
    assert codes(cache) == [45]
    clock[0] += 59
    assert codes(cache) == [45]
    clock[0] += 2
    assert codes(cache) == []


def test_of_pods_of_a_job_that_is_done_nothing_is_kept() -> None:
    cache = Cache()
    cache.apply("finetunejobs", job("one"))
    cache.apply("jobs", failed("t1", 1))
    for version, at_rest in ((2, False), (4, True)):
        cache.apply("pods", ended(f"x{version}", version))
        if at_rest:
            document = job("one", 3, phase="Failed", observedGeneration=1)
            document["metadata"]["generation"] = 1
            cache.apply("finetunejobs", document)
        assert cache.rests("uid-one") == at_rest
        cache.forget(f"uid-x{version}")
        assert codes(cache) == ([] if at_rest else [45])


def test_since_when_a_jobs_end_is_known_is_told_by_whatever_told_it_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("finetune_operator.cache.time.monotonic", lambda: clock[0])
    cache = Cache()
    cache.apply("jobs", child("t1", 1))
    cache.apply("pods", pod("x", 2))
    assert cache.known_for("uid-one") == {}
    ended = {"name": "trainer", "state": {"terminated": {"exitCode": 1}}}
    cache.apply("pods", {**pod("x", 4), "status": {"phase": "Failed", "containerStatuses": [ended]}})
    clock[0] += 3
    failed = {"status": {"conditions": [{"type": "Failed", "status": "True"}]}}
    cache.apply("jobs", {**child("t1", 5), **failed})
    clock[0] += 4
    assert cache.known_for("uid-one") == {"uid-t1": timedelta(seconds=7)}
    cache.forget("uid-x")
    assert cache.known_for("uid-one") == {"uid-t1": timedelta(seconds=4)}


def test_a_list_of_one_namespace_says_nothing_of_another() -> None:
    cache = Cache()
    cache.apply("jobs", child("t1", 5))
    assert cache.keep("jobs", [], version=20, namespaces=["other"]) == frozenset()
    assert len(cache.children("uid-one")) == 1


def test_a_config_that_cannot_be_read_is_known_as_such() -> None:
    cache = Cache()
    references = [controlled_by("FineTuneJob", "uid-one")]
    metadata = meta("g2", 1, ownerReferences=references, labels={GENERATION: "2"}, annotations={RESTART_KEY: "k"})
    cache.apply("configmaps", {"metadata": metadata, "data": {"config.json": '{"of": "the future"}'}})
    assert cache.unreadable("uid-one") == {2}
    assert cache.pinned("uid-one") == {}


def test_a_status_that_does_not_parse_counts_as_wiped() -> None:
    cache = Cache()
    cache.apply("finetunejobs", job("one", 1, phase="Dreaming"))
    subject = cache.subject("uid-one")
    assert subject is not None
    assert subject.status.phase is None


@pytest.mark.parametrize("generation", ["abc", "", "-1", "9" * 40])
def test_a_config_with_labels_that_somebody_made_up_harms_nobody(generation: str) -> None:
    cache = Cache()
    forged = {
        "metadata": {
            **meta("forged", 1, ownerReferences=[controlled_by("FineTuneJob", "uid-one")]),
            "labels": {"finetune.dev/generation": generation},
        },
        "data": {"config.json": "{}"},
    }
    assert cache.apply("configmaps", forged) == {"uid-one"}
    assert cache.pinned("uid-one") == {}
