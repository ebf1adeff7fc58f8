"""The killer and its judge: that plans cover what they shall, that the proxy does harm, that each breach is seen.

`pytest -m chaos tests/chaos` kills 20 real runs, in about 3 minutes.
"""

import dataclasses
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hack.seaweed import S3Server
from tests.chaos import judge
from tests.chaos.__main__ import chaos
from tests.chaos.job import EVERY, STEPS, End, Step, steps_in
from tests.chaos.killer import Attempt, Killer
from tests.chaos.plan import PLACES, AtCall, AtTime, Plan, every_step, plans
from tests.chaos.proxy import MEANING, RATES, Faults, Running

from finetune_trainer.saving import NOT_DELETED
from finetune_trainer.storage import StorageError, open_store
from finetune_trainer.storage.commit import CURRENT, Holder, RecordKind, RunLog, object_entry

RUN = "1f3a9c0d2b7e4a55"
STEPS_DONE = {number: Step(f"rows {number}", float(number).hex()) for number in range(1, STEPS + 1)}
GOOD = Attempt(
    code=-9,
    killed="somewhere",
    before=10,
    after=15,
    steps={number: STEPS_DONE[number] for number in range(11, 21)},
    saved=[15, 20],
    log="",
    seconds=1.0,
)
END = End(model={"model.safetensors": "a"}, weights="b", losses=[1.0] * STEPS, metrics={"f1": 1.0})


def test_a_plan_kills_everywhere_and_is_the_same_for_the_same_seed() -> None:
    found = plans(200, seed=1, cold=5)
    assert found == plans(200, seed=1, cold=5) != plans(200, seed=2, cold=5)
    assert sum(plan.cold for plan in found) == 5
    kills = [kill for plan in found for kill in plan.kills]
    aimed = Counter(kill.place for kill in kills if isinstance(kill, AtCall))
    assert set(aimed) == set(PLACES)
    assert min(aimed.values()) >= 8
    shares = [kill.share for kill in kills if isinstance(kill, AtTime)]
    assert len(shares) > 90
    assert {int(share * 5) for share in shares} == set(range(5))
    assert 40 < sum(len(plan.kills) == 2 for plan in found) < 95
    assert [plan.kills[0].call for plan in every_step() if isinstance(plan.kills[0], AtCall)] == list(STEPS_DONE)


def test_every_place_is_a_method_of_the_trainer() -> None:
    import importlib

    for place in PLACES:
        assert callable(getattr(getattr(importlib.import_module(place.module), place.owner), place.method))


def test_faults_come_at_their_rates_and_only_where_they_can_be_done() -> None:
    faults = Faults("seed")
    drawn = {method: Counter(faults.draw(method) for _ in range(20_000)) for method in ("GET", "PUT", "HEAD")}
    assert set(drawn["GET"]) == {None, *RATES} - {"dropped"}
    assert set(drawn["PUT"]) == {None, *RATES} - {"truncated", "corrupted"}
    assert set(drawn["HEAD"]) == {None, *RATES} - {"truncated", "corrupted", "dropped"}
    for kind, rate in RATES.items():
        assert drawn["PUT" if kind == "dropped" else "GET"][kind] == pytest.approx(20_000 * rate, rel=0.25)


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[Running]:
    running = Running(s3_server.endpoint)
    yield running
    running.close()


@pytest.mark.parametrize("kind", MEANING)
def test_storage_works_behind_each_fault(proxy: Running, s3_server: S3Server, s3_bucket: str, kind: str) -> None:
    rate = 0.04 if kind == "expired" else 0.15  # expired credentials are renewed once a request
    settings = dataclasses.replace(s3_server.settings(), endpoint=proxy.endpoint)
    store = open_store(f"s3://{s3_bucket}", settings)
    store.write("warm", b"up")
    proxy.begin(kind, {kind: rate})
    data = random.Random(0).randbytes(20_000)
    for number in range(25):
        store.write(f"{number}", data)
        assert store.read(f"{number}") == data
        store.create(f"once/{number}", data)
    done = proxy.end()
    assert set(done) == {kind}
    assert open_store(f"s3://{s3_bucket}", s3_server.settings()).read("once/24") == data


def test_a_proxy_without_faults_changes_nothing(proxy: Running, s3_server: S3Server, s3_bucket: str) -> None:
    settings = dataclasses.replace(s3_server.settings(), endpoint=proxy.endpoint)
    store = open_store(f"s3://{s3_bucket}", settings)
    for number in range(30):
        store.write(f"a/{number}", bytes(number))
    assert [info.size for info in store.list("a/")] == sorted(range(30), key=str)
    assert proxy.end() == Counter()


def test_a_trace_is_read_up_to_the_kill(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    assert steps_in(path) == ({}, [])
    path.write_text("step 6 aa 0x1p0\nstep 7 bb 0x1p1\nsaved 7\nstep 8 cc 0x1p2\n")
    steps, saved = steps_in(path)
    assert steps == {6: Step("aa", "0x1p0"), 7: Step("bb", "0x1p1"), 8: Step("cc", "0x1p2")}
    assert saved == [7]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        ({"code": 43}, "ended with code 43"),
        ({"code": -11}, "ended with code -11"),
        ({"killed": "never: it hung for 300 s"}, "it hung"),
        ({"log": "x\nTraceback (most recent call last):\n"}, "traceback"),
        ({"before": 5}, "went on from step 10, and 5 was committed"),
        ({"steps": {11: STEPS_DONE[11], 13: STEPS_DONE[13]}}, "left out a step"),
        ({"steps": {11: Step("rows 12", STEPS_DONE[11].loss)}}, "step 11 was trained on other rows"),
        ({"steps": {11: Step("rows 11", (11.5).hex())}}, "step 11 has the loss"),
        ({"steps": {number: STEPS_DONE[number] for number in range(11, 22)}}, f"{EVERY + 1} steps are lost"),
        ({"after": 10}, "the checkpoint of step 15 was not committed"),
    ],
)
def test_the_judge_sees_what_an_attempt_did_wrong(changed: dict[str, Any], said: str) -> None:
    attempt = dataclasses.replace(GOOD, **changed)
    found = [
        *judge._endings([attempt]),
        *judge._steps(attempt, STEPS_DONE),
        *judge._lost(attempt),
    ]
    assert any(said in wrong for wrong in found) if said else not found


class Scripted(Killer):
    """Attempts end as they are told to, as long as nothing kills them."""

    def __init__(self, ends: list[int]) -> None:
        self.ends, self.asked, self.forgotten = ends, [], 0
        self._seed = 0
        forget = SimpleNamespace(forget=self._forget)
        self._jobs: Any = SimpleNamespace(make=lambda *_: forget)
        self._ranks: Any = None
        self._proxy: Any = SimpleNamespace(begin=lambda *_, **__: None, end=Counter, endpoint="")

    def _forget(self) -> None:
        self.forgotten += 1

    def _attempt(self, job: Any, number: int, kill: Any, *, cold: bool) -> Attempt:
        self.asked.append(kill)
        code = self.ends.pop(0)
        return dataclasses.replace(GOOD, code=code, killed="somewhere" if code == -9 else None)


def test_an_attempt_that_gives_up_on_storage_leaves_its_kill_to_the_next() -> None:
    kill = AtTime(0.1)
    killer = Scripted([49, -9, 0])
    run = killer.run(Plan(1, (kill,)))
    assert killer.asked == [kill, kill, None]
    assert [attempt.code for attempt in run.attempts] == [49, -9, 0]
    assert killer.forgotten == 0


def test_what_a_run_left_that_nothing_could_kill_is_there_to_be_judged() -> None:
    killer = Scripted([0] * 5)
    assert killer.run(Plan(1, (AtTime(0.5),))).kills == []
    assert [kill.share for kill in killer.asked] == pytest.approx([0.5 * 0.7**n for n in range(5)])
    assert killer.forgotten == 4


def test_steps_lost_are_those_behind_the_last_commit() -> None:
    assert GOOD.lost == 5
    assert dataclasses.replace(GOOD, after=25).lost == 0
    assert dataclasses.replace(GOOD, steps={}).lost == 0


@pytest.mark.parametrize("changed", ["", "model", "weights", "losses", "metrics", "current"])
def test_the_judge_sees_another_result(tmp_path: Path, changed: str) -> None:
    other = {"model": {"model.safetensors": "x"}, "weights": "x", "losses": [1.0] * STEPS + [2.0], "metrics": {}}
    found = dataclasses.replace(END, **{changed: other[changed]}) if changed in other else END
    store = open_store(tmp_path.as_uri(), SimpleNamespace())  # type: ignore[arg-type]
    uri = "another" if changed == "current" else "uri"
    store.write(CURRENT, f'{{"model": "{uri}", "digest": "d"}}'.encode())
    model = {"outcome": {"model": {"uri": "uri", "digest": "d"}}}
    job: Any = SimpleNamespace(store=store, end=lambda: found, made=SimpleNamespace(published=lambda: model))
    assert bool(list(judge._result(job, END))) is bool(changed)


@pytest.mark.parametrize(
    "harm", ["nothing", "an orphan", "of an attempt", "told", "told of a record", "damaged", "missing", "a record"]
)
def test_the_judge_sees_what_is_wrong_in_storage(tmp_path: Path, harm: str) -> None:
    store = open_store(tmp_path.as_uri(), SimpleNamespace())  # type: ignore[arg-type]
    claim = RunLog(store, RUN).claim(holder=Holder())
    weights = store.write(f"{claim.prefix}step-5/weights.safetensors", b"weights")
    claim.append(RecordKind.CHECKPOINT, {"step": 5, "objects": [object_entry(weights)]})
    store.write(f"runs/{RUN}/run.json", b"{}")
    if harm == "an orphan":
        store.write("model/weights.safetensors", b"x")
    elif harm in ("of an attempt", "told"):
        store.write(f"{claim.prefix}step-5/torn.safetensors", b"weig")
    elif harm in ("damaged", "told of a record"):
        store.write(weights.key, b"Weights")
    elif harm == "missing":
        store.delete([weights.key])
    elif harm == "a record":
        store.write(f"runs/{RUN}/log/2.json", b"{}")
    record = SimpleNamespace(run_id=RUN, encoded=SimpleNamespace(key="encoded/x.safetensors"))
    job: Any = SimpleNamespace(store=store, made=SimpleNamespace(record=record))
    try:
        said = f"WARNING {NOT_DELETED}: The delete" if harm.startswith("told") else "INFO Completed"
        found = list(judge._storage(job, said=said))
    except StorageError as error:
        found = [str(error)]
    assert bool(found) is (harm not in ("nothing", "told")), found


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_20_killed_runs_end_like_an_undisturbed_one(tmp_path: Path) -> None:
    with chaos(tmp_path, seed=random.randrange(1 << 30), at_once=2, keep=tmp_path / "bad") as running:
        calm = running.measure(cold=True)
        killed = running.all(plans(20, seed=1, cold=1), "run")
    assert [one.wrong for one in (*calm, *killed)] == [[]] * (len(calm) + 20)
    assert all(one.run.kills for one in killed)
