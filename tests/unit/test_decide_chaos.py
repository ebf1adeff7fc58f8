"""Decisions against a world that misbehaves: pods that end anyhow, Jobs that vanish, a status that is wiped, documents
that change, and an operator that dies between any two of its writes. Storage is the truth, as a small model of it.

Whatever happens, no two train Jobs of one FineTuneJob are alive at once, no Job is begun under a name that is taken,
and once the chaos ends the FineTuneJob does, too. Interruptions are spaced and bounded, what is final stays so, and
every attempt is counted once.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from math import inf
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_api.contract import Checkpointed, LastMessage, PreflightOutcome, Progress, RunConfig, TrainOutcome
from finetune_api.resolve import Defaults
from finetune_api.status import EvaluationStatus, FineTuneJobStatus, ModelStatus, PreflightStatus, Usage
from finetune_operator import manifests
from finetune_operator.decide import decide
from finetune_operator.policies.restarts import crash_delay, environment_delay, free_delay
from finetune_operator.verdict import Action, CreateConfig, CreatePreflight, CreateTrain, DeleteJob, Observed, reason_of
from finetune_operator.views import Child, Exit, Pinned, Pod, Profile, Subject

SPEC: dict[str, Any] = {
    "task": {"type": "text-classification"},
    "model": {"uri": "s3://models/base"},
    "data": {"train": [{"uri": "s3://data/train.jsonl"}]},
    "output": {"uri": "s3://models/out"},
    "retries": {"max": 100},
}
SPECS = [
    SPEC,
    {**SPEC, "training": {"learningRate": 0.5}},
    {**SPEC, "retries": {"max": 50}},
    {**SPEC, "task": "bad"},
    {**SPEC, "suspend": True},
    {**SPEC, "training": {"learningRate": 0.5}, "suspend": True},
    {**SPEC, "deadline": "5m"},
    {**SPEC, "budget": {"gpuHours": 0.05}},
]
RESULT = TrainOutcome(
    final_step=9,
    total_steps=9,
    evaluation=EvaluationStatus(tuned={"f1": 0.5}),
    model=ModelStatus(uri="s3://m", digest="sha256:1", size_bytes=1),
)


class World:
    """One FineTuneJob, its children and its bucket."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.now = datetime(2026, 3, 1, tzinfo=UTC)
        self.number = 0
        self.begun: list[str] = []
        self.times: list[datetime] = []
        """When the train Jobs of them were begun."""
        self.steps: dict[str, int] = {}
        """The bucket: the last committed step by run; 9 is published."""
        self.o = Observed(
            subject=Subject(
                namespace="ns",
                name="one",
                uid="11111111-0000",
                generation=1,
                resource_version="1",
                created=self.now,
                deleting=False,
                retry=None,
                spec=SPEC,
                status=FineTuneJobStatus(),
            ),
            defaults=Defaults(trainer_image="t", preflight_image="p"),
            profiles={"default": Profile("default", {})},
        )

    # --- the operator ---

    def reconcile(self, *, dies: bool) -> float | None:
        """One look. An operator that dies does so after some of its actions, before it writes the status."""
        decision = decide(self.o, now=self.now)
        done = self.dice.randint(0, len(decision.actions)) if dies else len(decision.actions)
        for action in decision.actions[:done]:
            self._act(action)
        if not dies and decision.status is not None:
            self._say(FineTuneJobStatus.model_validate(decision.status.document()))
        return decision.again_after

    def _act(self, action: Action) -> None:
        match action:
            case CreateConfig(config, key):
                self.o = replace(
                    self.o,
                    pinned={
                        **self.o.pinned,
                        config.generation: Pinned(config.generation, config, key, self.o.subject.asked),
                    },
                )
            case CreatePreflight(config, key, ordinal, counters, attempts, run, inputs):
                job = manifests.preflight_job(
                    self.o.subject,
                    config,
                    key=key,
                    ordinal=ordinal,
                    counters=counters,
                    attempts=attempts,
                    run=run,
                    inputs=inputs,
                )
                self._begin(job)
            case CreateTrain(config, key, run_id, ordinal, counters, inputs):
                job = manifests.train_job(
                    self.o.subject,
                    config,
                    key=key,
                    run_id=run_id,
                    ordinal=ordinal,
                    counters=counters,
                    inputs=inputs,
                )
                self._begin(job)
            case DeleteJob(_, uid):
                self.vanish(uid)

    def _begin(self, manifest: dict[str, Any]) -> None:
        name = manifest["metadata"]["name"]
        assert name not in {child.name for child in self.o.children}, f"{name} is taken"
        self.number += 1
        manifest["metadata"] |= {"uid": f"job-{self.number}", "creationTimestamp": self.now.isoformat()}
        child = Child.of(manifest)
        assert not self.o.subject.finished, f"{name} is begun for what is done"
        assert not self.o.subject.suspended, f"{name} is begun for what is suspended"
        limits = self.o.pinned[child.generation].config.limits
        if child.role == "train" and not child.counters.finish:
            usage = self.o.subject.status.usage or Usage()
            assert (usage.running_seconds or 0) < (limits.deadline_seconds or inf), f"{name} is begun past its deadline"
            assert (usage.gpu_seconds or 0) < (limits.gpu_seconds or inf), f"{name} is begun past its budget"
        self.begun.append(name)
        self.times += [self.now] if child.role == "train" else []
        pod = Pod(
            name=f"{name}-x",
            uid=f"pod-{self.number}",
            owner=child.uid,
            subject=self.o.subject.uid,
            key=child.key,
            role=child.role,
            index=0,
            phase="Running",
            ip="10.0.0.1",
            node="n",
            placed=self.now,
            started=self.now,
            gone_by=None,
            was_asked_to_go=False,
            disrupted="",
            words="",
            never_began=False,
            unreachable=False,
            unschedulable="",
            waiting=None,
            running=True,
            exit=None,
        )
        self.o = replace(self.o, children=(*self.o.children, child), pods=(*self.o.pods, pod))
        alive = [c for c in self.o.children if c.role == "train" and not self._over(c)]
        assert len(alive) <= 1, [c.name for c in alive]

    def _over(self, child: Child) -> bool:
        return child.ended is not None or any(p.owner == child.uid and p.exit for p in self.o.pods)

    # --- the cluster and the user ---

    def vanish(self, uid: str) -> None:
        """A Job goes, and its pods with it, having committed a checkpoint."""
        self.o = replace(
            self.o,
            children=tuple(c for c in self.o.children if c.uid != uid),
            pods=tuple(p for p in self.o.pods if p.owner != uid),
        )

    def end_a_pod(self, *, well: bool) -> None:
        running = [p for p in self.o.pods if p.exit is None]
        if running:
            pod = self.dice.choice(running)
            child = next(c for c in self.o.children if c.uid == pod.owner)
            (self._end_preflight if child.role == "preflight" else self._end_training)(child, pod, well=well)

    def _end_preflight(self, child: Child, pod: Pod, *, well: bool) -> None:
        if not well and self.dice.random() < 0.5:
            return self._exit(pod, self.dice.choice([1, 49, 137]), None)
        run = child.key  # equal documents are equal runs
        step = self.steps.get(run)
        state: Any = "Fresh" if step is None else "Reused" if step == 9 else "Resume"
        outcome = PreflightOutcome(state=state, run_id=run, step=step, summary=PreflightStatus())
        result = RESULT if state == "Reused" else None
        return self._exit(pod, 0, LastMessage(code=0, reason=state, message="m", preflight=outcome, result=result))

    def _end_training(self, child: Child, pod: Pod, *, well: bool) -> None:
        run = str(child.run)
        if not well:
            self.steps[run] = max(self.steps.get(run, 0), self.dice.randint(0, 8))
            code = self.dice.choice([1, 44, 45, 49, 137, 0, -1])
            if code == 0:  # the work is done, but its message is lost
                self.steps[run] = 9
            if code == -1:  # the pod was deleted
                return self.delete_pod(pod)
            return self._exit(pod, code, None)
        self.steps[run] = 9
        return self._exit(pod, 0, LastMessage(code=0, reason="Trained", message="m", run_id=run, result=RESULT))

    def delete_pod(self, pod: Pod) -> None:
        self.o = replace(
            self.o,
            pods=tuple(p for p in self.o.pods if p is not pod),
            children=tuple(
                replace(c, ended="Failed", ended_at=self.now) if c.uid == pod.owner else c for c in self.o.children
            ),
        )

    def _exit(self, pod: Pod, code: int, last: LastMessage | None) -> None:
        over = replace(
            pod, phase="Failed" if code else "Succeeded", running=False, exit=Exit(code, "Error", self.now, last)
        )
        self.o = replace(self.o, pods=tuple(over if p is pod else p for p in self.o.pods))

    def progress(self) -> None:
        trains = [c for c in self.o.children if c.role == "train" and not self._over(c)]
        found = None
        if trains:
            found = Progress(
                run_id=str(trains[-1].run), stage="Training", step=5, total_steps=9, started_at="s", updated_at="u"
            )
        self.o = replace(self.o, progress=found)

    def change(self) -> None:
        spec = self.dice.choice(SPECS)
        if spec != self.o.subject.spec:
            changed = replace(self.o.subject, spec=spec, generation=self.o.subject.generation + 1)
            self.o = replace(self.o, subject=changed)

    def lose_a_job(self) -> None:
        if self.o.children:
            self.vanish(self.dice.choice(self.o.children).uid)

    def wipe(self) -> None:
        self._say(FineTuneJobStatus())

    def _say(self, status: FineTuneJobStatus) -> None:
        self.o = replace(self.o, subject=replace(self.o.subject, status=status), last_write=self.now)

    def wait(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32))
def test_whatever_happens_it_ends_well_once_it_may(seed: int) -> None:
    world = World(seed)
    _chaos(world, steps=40)
    if world.o.subject.suspended:
        for _ in range(5):
            world.reconcile(dies=False)
        status = world.o.subject.status
        assert status.phase in ("Suspended", "Succeeded", "Failed"), status.message
        assert status.phase != "Suspended" or not world.o.children, "nothing is left of it"
    if world.o.subject.spec in SPECS[3:]:
        world.o = replace(
            world.o, subject=replace(world.o.subject, spec=SPEC, generation=world.o.subject.generation + 1)
        )
    for _ in range(60):
        world.reconcile(dies=False)
        if world.o.subject.finished:
            break
        world.progress()
        world.end_a_pod(well=True)
        world.wait(700)
    status = world.o.subject.status
    assert world.o.subject.finished, (status.phase, status.message, world.begun)
    assert status.phase == "Succeeded" or "without one more committed step" in (status.message or ""), status.message


def _chaos(world: World, *, steps: int) -> None:
    for _ in range(steps):
        chance = world.dice.random()
        if chance < 0.5:
            world.reconcile(dies=world.dice.random() < 0.3)
        elif chance < 0.75:
            world.end_a_pod(well=world.dice.random() < 0.4)
        elif chance < 0.8:
            world.change()
        elif chance < 0.85:
            world.lose_a_job()
        elif chance < 0.87:
            world.wipe()
        elif chance < 0.95:
            world.progress()
        world.wait(world.dice.choice([0, 1, 10, 300]))


def test_undisturbed_it_begins_one_preflight_and_one_attempt() -> None:
    world = World(0)
    for _ in range(10):
        world.reconcile(dies=False)
        world.end_a_pod(well=True)
        world.wait(1)
    assert [name[-2:] for name in world.begun] == ["p1", "t1"]
    assert world.o.subject.status.phase == "Succeeded"


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_an_operator_that_keeps_dying_begins_one_preflight_and_one_attempt(seed: int) -> None:
    world = World(seed)
    for _ in range(40):
        world.reconcile(dies=world.dice.random() < 0.5)
        if world.dice.random() < 0.5:
            world.end_a_pod(well=True)
        world.wait(1)
    assert [name[-2:] for name in world.begun] == ["p1", "t1"]


def test_what_is_pinned_is_never_pinned_again() -> None:
    world = World(3)
    _chaos(world, steps=60)
    seen: dict[int, RunConfig] = {generation: pinned.config for generation, pinned in world.o.pinned.items()}
    _chaos(world, steps=60)
    assert all(world.o.pinned[generation].config == config for generation, config in seen.items())


# --- one attempt after another, and what is said of each ---


def until_it_trains(world: World, *, dies: bool = False) -> Pod | None:
    """None: it is done instead. `dies`: now and then the operator does."""
    for _ in range(200):
        if world.o.subject.finished:
            return None
        again = world.reconcile(dies=dies and world.dice.random() < 0.3)
        running = [pod for pod in world.o.pods if pod.exit is None]
        if not running:
            world.wait(max(1.0, again or 0.0))
        for pod in running:
            if pod.role == "train":
                world.reconcile(dies=False)  # one that nobody ever saw is nobody's attempt
                return pod
            child = next(child for child in world.o.children if child.uid == pod.owner)
            world._end_preflight(child, pod, well=True)
    raise AssertionError((world.o.subject.status.message, world.begun))


def interrupt(world: World, pod: Pod, how: str) -> None:
    """The attempt ends without a fault of its own."""
    if how == "its Job is deleted":
        return world.vanish(pod.owner)
    if how == "its pod is deleted":
        return world.delete_pod(pod)
    code = {"it is stopped": 45, "memory is used up": 50, "its message is lost": 0}.get(how, 137)
    evicted = replace(pod, disrupted="EvictionByEvictionAPI") if code == 137 else pod
    world.o = replace(world.o, pods=tuple(evicted if p is pod else p for p in world.o.pods))
    return world._exit(evicted, code, None)


INTERRUPTIONS = (
    "its Job is deleted",
    "its pod is deleted",
    "it is stopped",
    "memory is used up",
    "its message is lost",
    "it is evicted",
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    order=st.lists(st.sampled_from(INTERRUPTIONS), min_size=1, max_size=10),
    seed=st.integers(0, 2**32),
    dies=st.booleans(),
)
def test_ten_interruptions_without_a_step_are_enough_and_each_waits_longer(
    order: list[str], seed: int, dies: bool
) -> None:
    world = World(seed)
    for number in range(11):
        pod = until_it_trains(world, dies=dies)
        if pod is None:
            break
        interrupt(world, pod, order[number % len(order)])
    status = world.o.subject.status
    assert (status.phase, reason_of(status)) == ("Failed", "NoProgress"), status.message
    assert [name[-2:] for name in world.begun if "-t" in name] == [f"t{n}" for n in range(1, 10)] + ["10"]
    assert status.usage is not None
    assert status.usage.attempts == 10
    assert [restart.attempt for restart in status.restarts or []] == list(range(1, 11))
    waited = [after - before for before, after in pairwise(world.times)]
    assert all(gap >= free_delay(number) for number, gap in enumerate(waited, 1)), waited


def until_it_is_given_up(world: World, befalls: Callable[[Child], None], *, dies: bool) -> list[datetime]:
    """Something befalls every preflight Job once the status tells of it. Returns when they were begun."""
    times: list[datetime] = []
    for _ in range(400):
        if world.o.subject.finished:
            break
        before = len(world.begun)
        again = world.reconcile(dies=dies and world.dice.random() < 0.5)
        times += [world.now] * (len(world.begun) - before)
        if world.o.children:
            world.reconcile(dies=False)
        for child in world.o.children:
            befalls(child)
        world.wait(min(again or 1.0, 60.0))
    assert world.o.subject.status.phase == "Failed", world.o.subject.status.message
    return times


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), dies=st.booleans())
def test_a_program_that_deletes_every_preflight_job_is_not_raced_with(seed: int, dies: bool) -> None:
    world = World(seed)
    times = until_it_is_given_up(world, lambda child: world.vanish(child.uid), dies=dies)
    assert reason_of(world.o.subject.status) == "NoProgress"
    assert len(times) == 10
    gaps = [after - before for before, after in pairwise(times)]
    assert all(gap >= environment_delay(number) / 2 for number, gap in enumerate(gaps)), gaps


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), dies=st.booleans())
def test_crashes_are_counted_also_where_each_job_that_has_failed_is_deleted_at_once(seed: int, dies: bool) -> None:
    world = bounded(seed, retries={"max": 3})

    def crashes(child: Child) -> None:
        world._exit(next(pod for pod in world.o.pods if pod.owner == child.uid), 137, None)
        world.reconcile(dies=False)
        world.vanish(child.uid)

    times = until_it_is_given_up(world, crashes, dies=dies)
    assert reason_of(world.o.subject.status) == "Killed"
    gaps = [after - before for before, after in pairwise(times)]
    assert len(gaps) == 3
    assert all(gap >= crash_delay(number) - timedelta(seconds=1) for number, gap in enumerate(gaps)), gaps


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), dies=st.booleans())
def test_crashes_of_attempts_are_counted_also_where_each_job_that_has_ended_is_deleted(seed: int, dies: bool) -> None:
    world = bounded(seed, retries={"max": 3})
    for _ in range(5):
        pod = until_it_trains(world, dies=dies)
        if pod is None:
            break
        world._exit(pod, 1, None)
        world.reconcile(dies=False)
        for child in world.o.children:
            if world.dice.random() < 0.5:
                world.vanish(child.uid)
        world.reconcile(dies=False)
        for child in world.o.children:
            world.vanish(child.uid)
    status = world.o.subject.status
    assert (status.phase, reason_of(status)) == ("Failed", "Crashed"), status.message
    assert [name[-2:] for name in world.begun if "-t" in name] == ["t1", "t2", "t3", "t4"]
    gaps = [after - before for before, after in pairwise(world.times)]
    assert all(gap >= crash_delay(number) - timedelta(seconds=1) for number, gap in enumerate(gaps)), gaps


@settings(max_examples=40, deadline=None)
@given(order=st.lists(st.sampled_from(INTERRUPTIONS), min_size=1, max_size=10), seed=st.integers(0, 2**32))
def test_interruptions_that_win_steps_never_end_a_run_also_where_nobody_saw_it(order: list[str], seed: int) -> None:
    world = World(seed)
    for number in range(12):
        pod = until_it_trains(world)
        assert pod is not None, world.o.subject.status.message
        run = str(next(child for child in world.o.children if child.uid == pod.owner).run)
        resumed = world.steps.get(run, 0)
        world.o = replace(world.o, progress=_reading(run, step=resumed, resumed=resumed))
        world.reconcile(dies=False)
        world.o = replace(world.o, progress=None)
        world.steps[run] = resumed + 10
        interrupt(world, pod, order[number % len(order)])
    assert world.times[-1] - world.times[0] < timedelta(minutes=10)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), code=st.sampled_from([42, 47, 48]), before=st.integers(0, 3))
def test_what_is_final_is_never_tried_again(seed: int, code: int, before: int) -> None:
    world = World(seed)
    for _ in range(before):
        pod = until_it_trains(world)
        assert pod is not None
        interrupt(world, pod, world.dice.choice(INTERRUPTIONS))
    pod = until_it_trains(world)
    assert pod is not None
    world._exit(pod, code, None)
    begun = list(world.begun)
    for _ in range(20):
        world.reconcile(dies=world.dice.random() < 0.5)
        world.wait(700)
    assert world.begun == begun
    assert world.o.subject.status.phase == "Failed"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), dies=st.booleans(), count=st.integers(1, 9))
def test_every_attempt_is_counted_once_and_so_is_each_step_it_lost(seed: int, dies: bool, count: int) -> None:
    """Each is read once, and then ends with a message or without one; every other one won steps that nobody read."""
    world, cost = World(seed), 0
    for number in range(count):
        pod = until_it_trains(world, dies=dies)
        assert pod is not None, world.o.subject.status.message
        cost += _one_attempt(world, pod, number)
    pod = until_it_trains(world)
    assert pod is not None
    run = str(next(c for c in world.o.children if c.uid == pod.owner).run)
    world.o = replace(world.o, progress=_reading(run, step=world.steps.get(run, 0), resumed=world.steps.get(run, 0)))
    world.reconcile(dies=False)
    status = world.o.subject.status
    trains = [name for name in world.begun if "-t" in name]
    assert status.usage is not None
    assert (status.usage.attempts, status.usage.lost_steps or 0) == (len(trains), cost), status.restarts
    assert [restart.attempt for restart in status.restarts or []] == list(range(1, count + 1))
    assert sum(restart.lost_steps or 0 for restart in status.restarts or []) == cost


def _reading(run: str, *, step: int, resumed: int, committed: int = 0) -> Progress:
    last = Checkpointed(step=committed, uri="s3://c", committed_at="c") if committed > resumed else None
    return Progress(
        run_id=run,
        stage="Training",
        step=step,
        total_steps=1000,
        resumed_from_step=resumed or None,
        checkpoint=last,
        started_at="s",
        updated_at="u",
    )


def _one_attempt(world: World, pod: Pod, number: int) -> int:
    """Returns how many steps it lost, as far as anybody can know."""
    child = next(child for child in world.o.children if child.uid == pod.owner)
    run = str(child.run)
    resumed = world.steps.get(run, 0)
    committed = resumed + world.dice.choice([0, 5, 10])
    read = committed + world.dice.randint(0, 9)
    world.o = replace(world.o, progress=_reading(run, step=read, resumed=resumed, committed=committed))
    world.reconcile(dies=False)
    world.o = replace(world.o, progress=None)
    if number % 2:
        committed += 7
    world.steps[run] = committed
    how = world.dice.choice(["said", *INTERRUPTIONS])
    if how != "said":
        interrupt(world, pod, how)
        return max(0, read - committed)
    reached = max(read, committed) + world.dice.randint(0, 9)
    fields: dict[str, Any] = {"step": committed, "reached_step": reached, "resumed_from_step": resumed or None}
    world._exit(pod, 1, LastMessage(code=1, reason="Crashed", message="m", run_id=run, **fields))
    return reached - committed


# --- what attempts take ---


def bounded(seed: int, **spec: Any) -> World:
    world = World(seed)
    world.o = replace(world.o, subject=replace(world.o.subject, spec={**SPEC, **spec}))
    return world


def runs_for(world: World, pod: Pod, seconds: int) -> None:
    """The attempt trains for so long, wins a step, and is read at the end of it."""
    run = str(next(child for child in world.o.children if child.uid == pod.owner).run)
    before = world.steps.get(run, 0)
    world.wait(seconds)
    world.steps[run] = before + 10
    said = _reading(run, step=before + 10, resumed=before, committed=before + 10)
    now = world.now.isoformat()
    world.o = replace(world.o, progress=said.model_copy(update={"updated_at": now}))


SEEN = [how for how in INTERRUPTIONS if how != "its Job is deleted"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    ends=st.lists(st.tuples(st.sampled_from(SEEN), st.integers(0, 4000)), min_size=1, max_size=8),
    seed=st.integers(0, 2**32),
    dies=st.booleans(),
)
def test_every_second_of_every_attempt_is_counted_once(ends: list[tuple[str, int]], seed: int, dies: bool) -> None:
    """Also in what is told while they go on, each of which is at most as much as it has taken."""
    world, total = World(seed), 0
    for how, seconds in ends:
        pod = until_it_trains(world, dies=dies)
        assert pod is not None, world.o.subject.status.message
        began = world.now
        runs_for(world, pod, seconds)
        assert world.now - began == timedelta(seconds=seconds)
        world.reconcile(dies=dies and world.dice.random() < 0.5)
        told = world.o.subject.status.usage or Usage()
        assert (told.settled.running_seconds or 0) == total <= (told.running_seconds or 0) <= total + seconds
        total += seconds
        interrupt(world, pod, how)
        world.o = replace(world.o, progress=None)
    assert until_it_trains(world, dies=dies) is not None
    usage = world.o.subject.status.usage
    assert usage is not None
    assert (usage.running_seconds, usage.gpu_seconds, usage.counted) == (total, total, len(ends))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lasts=st.lists(st.integers(1, 3000), min_size=1, max_size=12),
    seed=st.integers(0, 2**32),
    dies=st.booleans(),
    limit=st.sampled_from([{"deadline": "1h"}, {"budget": {"gpuHours": 1, "onExhausted": "Fail"}}]),
)
def test_no_attempt_is_begun_past_a_limit_and_none_goes_on(
    lasts: list[int], seed: int, dies: bool, limit: dict[str, Any]
) -> None:
    """However it is interrupted and whoever dies when: it fails when the hour is over, and not before."""
    world, ran = bounded(seed, **limit), 0
    for seconds in [*lasts, *[3000] * 3]:
        pod = until_it_trains(world, dies=dies)
        if pod is None:
            break
        assert ran < 3600, "an attempt was begun past the limit"
        runs_for(world, pod, seconds)
        ran += seconds
        for chance in (0.5, 0.5, 0.5, 0, 0, 0):
            world.reconcile(dies=dies and world.dice.random() < chance)
        going = any(p.uid == pod.uid for p in world.o.pods)
        assert going == (ran < 3600)
        if going:
            interrupt(world, pod, world.dice.choice(SEEN))
        world.o = replace(world.o, progress=None)
    assert until_it_trains(world) is None
    status = world.o.subject.status
    assert (status.phase, reason_of(status)) in (("Failed", "DeadlineExceeded"), ("Failed", "BudgetExhausted"))
    assert status.usage is not None
    assert status.usage.running_seconds == ran >= 3600


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), dies=st.booleans())
def test_a_budget_that_is_used_up_ends_in_one_attempt_that_only_finishes(seed: int, dies: bool) -> None:
    world = bounded(seed, budget={"gpuHours": 1})
    pod = until_it_trains(world, dies=dies)
    assert pod is not None
    runs_for(world, pod, 3600)
    for chance in (0.5, 0.5, 0.5, 0, 0, 0):
        world.reconcile(dies=dies and world.dice.random() < chance)
    world.o = replace(world.o, progress=None)
    last = until_it_trains(world, dies=dies)
    assert last is not None
    (child,) = [child for child in world.o.children if child.role == "train"]
    assert child.counters.finish
    part = RESULT.model_copy(update={"partial": True, "final_step": 5})
    message = LastMessage(code=0, reason="Completed", message="m", run_id=str(child.run), result=part)
    world._exit(last, 0, message)
    assert until_it_trains(world, dies=dies) is None
    assert reason_of(world.o.subject.status) == "StoppedAtBest"
