"""Decisions in every order of events: watches that lag, answers that are lost, looks that overlap, an operator that
dies between any two writes and forgets everything, one whose last requests arrive when another leads already, and two
FineTuneJobs that ask for the same run, are deleted and applied again.

The operator's own Reconciler, Observer and Cache decide and act; the cluster around them is cluster.py. What fails here
is shrunk to the few steps that it takes.
"""

import sys
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from tests.unit.cluster import (
    DONE_STEP,
    LAG,
    LEAST_PREFLIGHT,
    Cluster,
    Process,
    clock,
    gave_up,
    result_of,
    state_of,
)

from finetune_api.status import Usage
from finetune_operator.cache import Kind
from finetune_operator.verdict import reason_of
from finetune_operator.views import GENERATION, ORDINAL, ROLE, RUN, Subject

Raw = dict[str, Any]
SPEC: Raw = {
    "task": {"type": "text-classification"},
    "model": {"uri": "s3://models/base"},
    "data": {"train": [{"uri": "s3://data/train.jsonl"}]},
    "output": {"uri": "s3://models/out"},
    "retries": {"max": 100},
}
OTHER: Raw = {**SPEC, "training": {"learningRate": 0.5}}
FEW = 2
SPECS = [
    SPEC,
    OTHER,
    {**SPEC, "retries": {"max": 50}},
    {**SPEC, "retries": {"max": FEW}},
    {**SPEC, "suspend": True},
    {**SPEC, "task": "bad"},
]
CRASHES = ("Crashed", "Killed")
ROUNDS = 80
TTL = 3600.0
which = st.integers(0, 5)


class Operator(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster()
        self.undo = clock(self.cluster)
        self.cluster.on_write = self.written
        self.cluster.on_put = self.put
        self.process = Process(self.cluster)
        self.owners: dict[str, str] = {}
        """By run: UID of the FineTuneJob that began the last attempt of it."""
        self.excused: set[str] = set()
        """UIDs of FineTuneJobs that gave up since they began their last attempt, or that somebody changed."""
        self.handed: dict[str, int] = {}
        """By run, how often it was handed over without an excuse."""
        self.begun: dict[str, int] = {}
        """By UID of a FineTuneJob: the number of the last attempt that was begun."""
        self.before: dict[str, int] = {}
        """The same when somebody changed it last."""
        self.crashes: dict[str, set[int]] = {}
        """Attempts begun since then that it has told to have crashed."""
        self.writes = 0
        self.late: list[tuple[Process, str]] = []
        """Looks of operators that lead no more, each with one request on its way."""
        self.told: dict[str, dict[str, float]] = {}
        """By UID: what its status said last of what only grows."""

    # --- what must never be ---

    def written(self, uid: str, what: str, raw: Raw) -> None:
        """The operator is about to write."""
        self.writes += 1
        subject = next((Subject.of(s) for s in self.cluster.subjects() if s["metadata"]["uid"] == uid), None)
        assert subject is None or not subject.finished, f"{what} after {subject.status.phase}"
        labels = raw["metadata"].get("labels") or {}
        if what != "create" or labels.get(ROLE) != "train":
            return
        crashes = self.crashes.get(uid, set())
        if subject is not None and labels[GENERATION] == str(subject.generation):
            assert len(crashes) <= subject.spec["retries"]["max"], f"it goes on after the crashes of {crashes}"
        self.begun[uid] = int(raw["metadata"]["annotations"][ORDINAL])
        run = labels[RUN]
        alive = [job for job in self.cluster.jobs("train") if self.cluster.live(job)]
        rivals = [job["metadata"]["name"] for job in alive if job["metadata"]["labels"][RUN] == run]
        assert not rivals, f"{raw['metadata']['name']} is begun beside {rivals}"
        before = self.owners.get(run, uid)
        if before != uid and before not in self.excused:
            self.handed[run] = self.handed.get(run, 0) + 1
            assert self.handed[run] <= 1, "the run goes back and forth"
        self.owners[run] = uid
        self.excused.discard(uid)

    def put(self, kind: Kind, raw: Raw) -> None:
        if kind == "finetunejobs":
            self.never_back(raw)
            if gave_up(raw):
                self.excused.add(raw["metadata"]["uid"])
            self.count_crashes(raw)
        if kind == "pods" and "running" in state_of(raw):
            run = raw["metadata"]["labels"].get(RUN)
            together = [pod for pod in self.cluster.running("train") if pod["metadata"]["labels"][RUN] == run]
            assert len(together) <= 1, f"{[pod['metadata']['name'] for pod in together]} train together"

    def never_back(self, raw: Raw) -> None:
        """What the status has counted stays counted, unless somebody has wiped it."""
        status = Subject.of(raw).status
        usage = (status.usage or Usage()).settled
        grows = {"generation": status.observed_generation, "attempts": usage.attempts, "counted": usage.counted}
        grows |= {"gpuSeconds": usage.gpu_seconds, "runningSeconds": usage.running_seconds}
        now = {name: value for name, value in grows.items() if value is not None}
        before = self.told.get(raw["metadata"]["uid"], {}) if raw.get("status") else {}
        assert all(now.get(name, 0) >= value for name, value in before.items()), f"{before} became {now}"
        self.told[raw["metadata"]["uid"]] = now

    def count_crashes(self, raw: Raw) -> None:
        uid, told = raw["metadata"]["uid"], Subject.of(raw).status.restarts or []
        new = {r.attempt for r in told if r.reason in CRASHES and r.attempt > self.before.get(uid, 0)}
        self.crashes.setdefault(uid, set()).update(new)

    def changed(self, subject: Raw) -> None:
        uid = subject["metadata"]["uid"]
        self.excused.add(uid)
        self.before[uid] = self.begun.get(uid, 0)
        self.crashes.pop(uid, None)
        self.handed.clear()

    def pick(self, items: list[Any], number: int) -> Any:
        return items[number % len(items)] if items else None

    # --- people ---

    def apply(self, name: str) -> None:
        self.cluster.create("finetunejobs", {"metadata": {"name": name, "namespace": "ns"}, "spec": SPEC})

    @initialize(twins=st.booleans(), rounds=st.integers(0, 8), steps=st.integers(0, 3))
    def begin(self, twins: bool, rounds: int, steps: int) -> None:
        """Somewhere between the first look and an attempt that trains."""
        self.apply("one")
        if twins:
            self.apply("two")
        self.process.catch_up()
        self.undisturbed(rounds)
        for pod in self.cluster.running("train"):
            self.cluster.trainers[pod["metadata"]["uid"]].step += steps

    @precondition(lambda self: len(self.cluster.subjects()) < 2)
    @rule()
    def another_document(self) -> None:
        self.apply("two" if self.cluster.named("finetunejobs", "one") else "one")

    @precondition(lambda self: self.cluster.subjects())
    @rule(n=which, foreground=st.booleans(), again=st.booleans())
    def delete_a_document(self, n: int, foreground: bool, again: bool) -> None:
        """In the foreground it stays until all that it owns is gone; else it may be applied again at once."""
        subject = self.pick(self.cluster.subjects(), n)
        self.changed(subject)
        if foreground:
            meta = {**subject["metadata"], "deletionTimestamp": self.cluster.time()}
            self.cluster.put("finetunejobs", {**subject, "metadata": meta})
            return
        self.cluster.remove(subject["metadata"]["uid"])
        if again:
            self.apply(subject["metadata"]["name"])

    @rule(n=which, spec=st.sampled_from(SPECS))
    def edit(self, n: int, spec: Raw) -> None:
        if (subject := self.pick(self.cluster.subjects(), n)) is not None:
            self.cluster.edit(subject, spec)
            self.changed(subject)

    @rule(n=which)
    def wipe(self, n: int) -> None:
        if (subject := self.pick(self.cluster.subjects(), n)) is not None:
            self.cluster.put("finetunejobs", {**subject, "status": {}})
            self.changed(subject)

    @precondition(lambda self: self.cluster.jobs())
    @rule(n=which)
    def delete_a_job(self, n: int) -> None:
        if (job := self.pick(self.cluster.jobs(), n)) is not None:
            self.cluster.remove(job["metadata"]["uid"])

    @precondition(lambda self: self.cluster.pods())
    @rule(n=which, evicted=st.booleans())
    def delete_a_pod(self, n: int, evicted: bool) -> None:
        pods = [pod for pod in self.cluster.pods() if "deletionTimestamp" not in pod["metadata"]]
        if (pod := self.pick(pods, n)) is not None:
            self.cluster.ask_to_go(pod["metadata"]["uid"], disrupted=evicted)

    # --- the cluster ---

    @rule(n=which)
    def a_chore(self, n: int) -> None:
        if (chore := self.pick(self.cluster.chores(), n)) is not None:
            chore()

    @precondition(lambda self: self.cluster.running("train"))
    @rule(n=which, steps=st.integers(1, 3), committed=st.booleans())
    def train(self, n: int, steps: int, committed: bool) -> None:
        if (pod := self.pick(self.cluster.running("train"), n)) is not None:
            trainer = self.cluster.trainers[pod["metadata"]["uid"]]
            trainer.step = min(trainer.step + steps, DONE_STEP - 1)
            if committed:
                self.cluster.stored(pod["metadata"]["labels"][RUN]).step = trainer.step

    @precondition(lambda self: self.cluster.running())
    @rule(n=which, code=st.sampled_from([0, 1, 45, 49, 137]), said=st.booleans())
    def a_program_ends(self, n: int, code: int, said: bool) -> None:
        pods = [pod for pod in self.cluster.running() if self.cluster.may_end(pod)]
        if (pod := self.pick(pods, n)) is not None:
            self.cluster.end(pod["metadata"]["uid"], code, said=said)

    # --- time, watches and the operator ---

    @rule(seconds=st.sampled_from([0.5, 2.0, 5.0, 60.0, 700.0]))
    def wait(self, seconds: float) -> None:
        while self.late:  # no request takes that long
            self.a_late_request_arrives(0)
        for key in list(self.process.flights):
            self.process.finish(key)
        self.cluster.seconds += seconds
        self.cluster.kill_overdue()
        self.process.catch_up(older_than=LAG)

    @precondition(lambda self: self.process.behind())
    @rule(n=which, newest=st.booleans())
    def a_watch_tells(self, n: int, newest: bool) -> None:
        if (uid := self.pick(self.process.behind(), n)) is not None:
            self.process.deliver(uid, newest=newest)

    @precondition(lambda self: self.process.ready())
    @rule(n=which)
    def look(self, n: int) -> None:
        if (key := self.pick(self.process.ready(), n)) is not None:
            self.process.look(key)

    @precondition(lambda self: self.process.ready())
    @rule(n=which)
    def look_to_the_end(self, n: int) -> None:
        if (key := self.pick(self.process.ready(), n)) is not None:
            self.process.look(key)
            self.process.finish(key)

    @precondition(lambda self: self.process.flights)
    @rule(n=which, outcome=st.sampled_from(["", "", "lost"]))
    def a_request_moves_on(self, n: int, outcome: str) -> None:
        if (key := self.pick(list(self.process.flights), n)) is not None:
            self.process.go_on(key, outcome=outcome)

    @rule()
    def die(self) -> None:
        self.process.die()
        self.process = Process(self.cluster)

    @precondition(lambda self: self.process.flights)
    @rule()
    def another_leads(self) -> None:
        self.late += [(self.process, key) for key in self.process.flights]
        self.process = Process(self.cluster)

    @precondition(lambda self: self.late)
    @rule(n=which)
    def a_late_request_arrives(self, n: int) -> None:
        """Of an operator that leads no more. It sends no other."""
        if (late := self.pick(self.late, n)) is not None:
            self.late.remove(late)
            process, key = late
            process.go_on(key)
            process.drop(key)

    @rule(later=which, told=st.booleans())
    def the_cluster_goes_on(self, later: int, told: bool) -> None:
        """But for the operator; a preflight ends if there is one."""
        while chores := self.cluster.chores():
            chores[0]()
        self.wait(LEAST_PREFLIGHT)
        if (pod := self.pick(self.cluster.running("preflight"), later)) is not None:
            self.cluster.end(pod["metadata"]["uid"], 0)
        if told:
            self.process.catch_up()

    @rule(rounds=st.integers(1, 6))
    def undisturbed(self, rounds: int) -> None:
        for _ in range(rounds):
            self.round(end=False)

    # --- the end ---

    def round(self, *, end: bool) -> None:
        """Everybody does what there is to do; programs end well if they are to `end`, preflights in any case."""
        for _ in range(100):
            self.process.catch_up()
            busy = [*self.process.flights, *self.process.ready()]
            for key in busy:
                if key not in self.process.flights:
                    self.process.look(key)
                self.process.finish(key)
            chores = self.cluster.chores()
            if chores:
                chores[0]()
            elif not busy:
                break
        else:
            raise AssertionError("it does not come to rest")
        for pod in self.cluster.running(role="" if end else "preflight"):
            if self.cluster.may_end(pod):
                self.cluster.end(pod["metadata"]["uid"], 0)
        later = [at for at in self.process.due.values() if at > self.cluster.seconds]
        self.cluster.seconds += max(1.0, min(min(later, default=0.0) - self.cluster.seconds, 5.0))
        self.cluster.kill_overdue()

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:
                self.ends()
        finally:
            for process, key in self.late:
                process.drop(key)
            self.process.die()
            self.undo()

    def ends(self) -> None:
        self.wait(0.0)
        if not self.cluster.subjects():
            self.apply("one")
        for subject in self.cluster.subjects():
            if subject["spec"] in SPECS[4:]:
                self.cluster.edit(subject, SPEC)
                self.changed(subject)
        for _ in range(ROUNDS):
            self.round(end=True)
            if all(Subject.of(subject).finished for subject in self.cluster.subjects()):
                break
        for raw in self.cluster.subjects():
            self.ended_truly(Subject.of(raw))
        before = self.writes
        self.wait(TTL + 1.0)
        self.round(end=True)
        assert not self.cluster.jobs(), "ttlAfterFinished takes them"
        assert self.writes == before, "something is written after all is done"

    def ended_truly(self, subject: Subject) -> None:
        status = subject.status
        assert subject.finished, (subject.name, status.phase, status.message)
        if status.phase == "Failed":
            used_up = subject.spec["retries"]["max"] == FEW and reason_of(status) in CRASHES
            assert used_up or reason_of(status) == "NoProgress", status.message
            return
        assert status.run is not None
        assert self.cluster.stored(status.run.id).published
        assert status.model == result_of(status.run.id).model


Operator.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestOperator = Operator.TestCase
