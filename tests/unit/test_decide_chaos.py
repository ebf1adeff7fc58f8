"""Decisions against a world that misbehaves: pods that end anyhow, Jobs that vanish, a status that is wiped, documents
that change, and an operator that dies between any two of its writes. Storage is the truth, as a small model of it.

Whatever happens, no two train Jobs of one FineTuneJob are alive at once, no Job is begun under a name that is taken,
and once the chaos ends the FineTuneJob does, too.
"""

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_api.contract import LastMessage, PreflightOutcome, Progress, RunConfig, TrainOutcome
from finetune_api.job import EvaluationStatus, FineTuneJobStatus, ModelStatus, PreflightStatus
from finetune_api.resolve import Defaults
from finetune_operator import manifests
from finetune_operator.decide import decide
from finetune_operator.verdict import Action, CreateConfig, CreatePreflight, CreateTrain, DeleteJob, Observed
from finetune_operator.views import Child, Exit, Pinned, Pod, Profile, Subject

SPEC: dict[str, Any] = {
    "task": {"type": "text-classification"},
    "model": {"uri": "s3://models/base"},
    "data": {"train": [{"uri": "s3://data/train.jsonl"}]},
    "output": {"uri": "s3://models/out"},
    "retries": {"max": 100},
}
SPECS = [SPEC, {**SPEC, "training": {"learningRate": 0.5}}, {**SPEC, "retries": {"max": 50}}, {**SPEC, "task": "bad"}]
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
                    self.o, pinned={**self.o.pinned, config.generation: Pinned(config.generation, config, key)}
                )
            case CreatePreflight(config, key, ordinal, counters):
                job = manifests.preflight_job(self.o.subject, config, key=key, ordinal=ordinal, counters=counters)
                self._begin(job)
            case CreateTrain(config, key, run_id, ordinal, counters):
                job = manifests.train_job(
                    self.o.subject, config, key=key, run_id=run_id, ordinal=ordinal, counters=counters
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
        self.begun.append(name)
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
                self.o = replace(
                    self.o,
                    pods=tuple(p for p in self.o.pods if p is not pod),
                    children=tuple(
                        replace(c, ended="Failed", ended_at=self.now) if c is child else c for c in self.o.children
                    ),
                )
                return None
            return self._exit(pod, code, None)
        self.steps[run] = 9
        return self._exit(pod, 0, LastMessage(code=0, reason="Trained", message="m", run_id=run, result=RESULT))

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
    if world.o.subject.spec == SPECS[3]:
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
