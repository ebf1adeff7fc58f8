"""An operator with much behind it and some at work: what it costs when nothing changes, and what a restart costs."""

import json
import time
from collections import Counter
from dataclasses import dataclass, replace

from bench.operator import ours
from bench.operator.api import Api, Document
from bench.operator.burst import Requests, create, in_threads, watching
from bench.operator.contestants import FINETUNE, OURS, finetune, name
from bench.operator.plane import Plane, wait_for
from bench.operator.usage import READS, Audit, Meter, Used, cpu_seconds, peak_mib

LASTING = "24h"
SETTLING = 45
"""Seconds after the last of them trains, before anything is measured."""
MEASURED = 120
AFTER_RESTART = 30


@dataclass(frozen=True)
class Idle:
    used: Used
    answers: float
    """Questions to trainers, a second."""
    turns: Counter[str]
    requests: Requests


@dataclass(frozen=True)
class Restart:
    ready: float
    """Seconds from the process's start until every job was looked at."""
    cpu: float
    """Processor seconds until then."""
    peak: float
    """MiB, and so are the next two until AFTER_RESTART seconds later."""
    turns: Counter[str]
    """Writes of a status by what they changed."""
    others: Counter[str]
    """Other writes."""


def finished_before(plane: Plane, namespace: str, numbers: range) -> None:
    """Jobs that were done more than their Jobs' time to live ago: copies of number 0, which was really run here.

    To be made while no operator runs.
    """
    api, path = plane.connect(), FINETUNE.format(namespace)
    model = api.call("GET", f"{path}/{name(0)}")
    uid = model["metadata"]["uid"]
    maps = f"/api/v1/namespaces/{namespace}/configmaps"
    config = _bare(api.call("GET", f"{maps}?labelSelector=finetune.dev/job-uid%3D{uid}")["items"][0])

    def one(api: Api, number: int) -> None:
        made = api.call("POST", path, finetune(number))
        meta = made["metadata"]
        status = _renamed(model["status"], uid, meta)
        api.call("PUT", f"{path}/{meta['name']}/status", {**made, "status": status})
        api.call("POST", maps, _renamed(config, uid, meta))

    in_threads(plane, numbers, one)


def _bare(document: Document) -> Document:
    kept = ("name", "namespace", "labels", "annotations", "ownerReferences")
    meta = {key: value for key, value in document["metadata"].items() if key in kept}
    return {**document, "metadata": meta}


def _renamed(document: Document, uid: str, meta: Document) -> Document:
    """The same of another FineTuneJob."""
    text = json.dumps(document).replace(uid, meta["uid"]).replace(uid[:5], meta["uid"][:5])
    renamed: Document = json.loads(text.replace(name(0), meta["name"]))
    return renamed


def running(plane: Plane, namespace: str, numbers: range) -> None:
    """Jobs whose trainings go on; returns when all of them train."""
    lasting = replace(OURS, document=lambda number: finetune(number, lasting=LASTING))
    create(plane, lasting, numbers, namespace)
    api, path = plane.connect(), FINETUNE.format(namespace)

    def all_train() -> bool:
        plane.check()
        items = api.call("GET", f"{path}?resourceVersion=0")["items"]
        return sum((item.get("status") or {}).get("phase") == "Training" for item in items) == len(numbers)

    wait_for(f"{len(numbers)} jobs train", all_train, seconds=600, every=5.0)


def idle(plane: Plane, namespace: str) -> Idle:
    """Measured for some minutes, once it has settled."""
    time.sleep(SETTLING)
    with watching(plane.access(), OURS, namespace) as seen:
        time.sleep(5)
        turns = seen.turns.copy()
        audit = Audit(plane.audit_log)
        before = ours.metric(plane, "finetune_progress_reads_total") or 0.0
        meter = Meter({"operator": plane.processes["operator"].pid}, now=time.time())
        time.sleep(MEASURED)
        used = meter.stop(now=time.time())
        asked = (ours.metric(plane, "finetune_progress_reads_total") or 0.0) - before
        turns = seen.turns - turns
        time.sleep(3)
        return Idle(used, asked / MEASURED, turns, audit.counts(OURS.users[0]))


def restart(plane: Plane, namespace: str, *, jobs: int) -> Restart:
    """Stops it, starts it, and waits until it has looked at all jobs."""
    plane.stop("operator")
    with watching(plane.access(), OURS, namespace) as seen:
        time.sleep(5)
        before = seen.turns.copy()
        audit = Audit(plane.audit_log)
        began = ours.start(plane)
        pid = plane.processes["operator"].pid
        wait_for("every job was looked at", lambda: _looked(plane, jobs), seconds=300, every=0.5)
        ready, cpu = time.time() - began, cpu_seconds(pid)
        time.sleep(AFTER_RESTART)
        requests = audit.counts(OURS.users[0])
        others = Counter({f"{verb} {what}": n for (verb, what, _), n in requests.items() if verb not in READS})
        del others["update finetunejobs/status"]
        return Restart(ready, cpu, peak_mib(pid), seen.turns - before, others)


def _looked(plane: Plane, jobs: int) -> bool:
    looks, waiting = (ours.metric(plane, f"finetune_{name}") for name in ("reconciles_total", "queue_length"))
    return looks is not None and looks >= jobs and waiting == 0
