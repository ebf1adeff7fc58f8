"""The small real job: a tiny BERT, 60 steps, everything in S3; and what its end must be, from a run that nothing
disturbed."""

import itertools
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hack.seaweed import S3Server
from safetensors.numpy import load
from tests.trainer.rank.conftest import Made, Ranks, made, make_tiny_base, tiny_rows

from finetune_trainer.checkpoint import OPTIMIZER, WEIGHTS
from finetune_trainer.storage import Store, open_store
from finetune_trainer.storage.commit import latest_checkpoint
from finetune_trainer.storage.digests import digest_of

STEPS, EVERY = 60, 5
LABELS = ["long", "short"]
ROWS, TEST_ROWS = 360, 60
BUCKET = "chaos"
SPEC: dict[str, Any] = {
    "model": {"uri": f"s3://{BUCKET}/base"},
    "task": {"type": "text-classification", "labels": LABELS},
    "resources": {"perNode": {"gpus": 0}},
    "data": {
        "train": [{"uri": f"s3://{BUCKET}/data/train.jsonl"}],
        "validation": {"uri": f"s3://{BUCKET}/data/validation.jsonl"},
        "test": {"uri": f"s3://{BUCKET}/data/test.jsonl"},
    },
    "training": {
        "maxSteps": STEPS,
        "batchSize": 8,
        "microBatch": 4,
        "learningRate": 3e-3,
        "evaluateEvery": {"steps": 20},
    },
    "checkpoint": {"every": {"steps": EVERY}},
}


@dataclass(frozen=True)
class Step:
    """What a step has trained on, by the digest of its rows' numbers, and its loss, as a hexadecimal float."""

    rows: str
    loss: str


@dataclass(frozen=True)
class End:
    """What must not depend on what happened on the way. Digests are of the bytes that storage holds."""

    model: dict[str, str]
    """Digest of each published file but the card, which tells of circumstances."""
    weights: str
    """Digest of the weights of the last checkpoint."""
    losses: list[float]
    """Of every step."""
    metrics: Any
    """The published evaluation."""


class Jobs:
    """Makes runs of the job, each with an output of its own, as preflight leaves them."""

    def __init__(self, server: S3Server, root: Path) -> None:
        self._root, self.settings = root, server.settings()
        self._names, self._lock = itertools.count(1), threading.Lock()
        server.client().create_bucket(Bucket=BUCKET)
        store = open_store(f"s3://{BUCKET}", self.settings)
        for path in make_tiny_base(root / "base").iterdir():
            store.write(f"base/{path.name}", path.read_bytes())
        rows = _rows(ROWS, seed=0)
        for name, some in (
            ("train", [row for number, row in enumerate(rows) if number % 5]),
            ("validation", rows[::5]),
            ("test", _rows(TEST_ROWS, seed=1)),
        ):
            store.write(f"data/{name}.jsonl", "".join(json.dumps(row) + "\n" for row in some).encode())

    def make(self, ranks: Ranks, endpoint: str | None = None) -> "Job":
        """A fresh run whose attempts reach storage at `endpoint`, by default directly."""
        with self._lock:  # preflight shares a cache of readers between threads
            name = f"{next(self._names):04}"
            root = self._root / name
            root.mkdir()
            spec = {**SPEC, "output": {"uri": f"s3://{BUCKET}/out/{name}"}}
            found = made(root, spec, ranks, self.settings)
        if endpoint is not None:
            storage = found.config.storage.model_copy(update={"endpoint": endpoint})
            config = found.config.model_copy(update={"storage": storage})
            found.config_path.write_text(config.model_dump_json(by_alias=True))
        return Job(root, found)


def _rows(count: int, *, seed: int) -> list[dict[str, Any]]:
    texts, _ = tiny_rows(count, seed=seed)
    return [{"text": text, "label": LABELS[len(text.split()) < 8]} for text in texts]


@dataclass(frozen=True)
class Job:
    """One run. What is asked of it here never goes through the proxy."""

    root: Path
    made: Made

    @property
    def store(self) -> Store:
        return self.made.store

    def committed(self) -> int:
        """Step of the newest checkpoint in the log; 0 when there is none."""
        record = latest_checkpoint(self.made.records)
        return int(record.body["step"]) if record else 0

    def end(self) -> End:
        """What has been published and committed last, byte by byte."""
        published = self.made.published()
        card = "/README.md"
        model = {
            entry["key"].partition("/model/")[2]: _digest(self.store, entry["key"])
            for entry in published["objects"]
            if "/model/" in entry["key"] and not entry["key"].endswith(card)
        }
        last = latest_checkpoint(self.made.records)
        assert last is not None
        keys = {entry["key"].rpartition("/")[2]: entry["key"] for entry in last.body["objects"]}
        losses = load(self.store.read(keys[OPTIMIZER]))["losses"].tolist()
        return End(
            model=model,
            weights=_digest(self.store, keys[WEIGHTS]),
            losses=losses,
            metrics=published["outcome"]["evaluation"],
        )

    def forget(self) -> None:
        """Delete everything of the run from storage."""
        self.store.delete([info.key for info in self.store.list()])


def _digest(store: Store, key: str) -> str:
    return digest_of(store.read(key))


def steps_in(trace: Path) -> tuple[dict[int, Step], list[int]]:
    """Steps that an attempt has done, by number, and the steps whose checkpoints it has handed over."""
    steps: dict[int, Step] = {}
    saved: list[int] = []
    lines = trace.read_text().splitlines() if trace.exists() else []
    for line in lines:
        kind, number, *rest = line.split(" ")
        if kind == "step":
            steps[int(number)] = Step(*rest)
        else:
            saved.append(int(number))
    return steps, saved
