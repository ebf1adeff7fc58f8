"""A tiny BERT with random weights, and runs as preflight leaves them, made from texts and labels."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from tests import ports

from finetune_api.contract import LastMessage, RunConfig
from finetune_api.job import FineTuneJobSpec
from finetune_api.profile import FineTuneProfileSpec
from finetune_api.resolve import Defaults, resolve
from finetune_trainer.data.batch import Encoded
from finetune_trainer.preflight import preflight
from finetune_trainer.run import RunRecord, read_inputs
from finetune_trainer.storage import StorageSettings, Store, open_store
from finetune_trainer.storage.commit import Record, RecordKind, RunLog, latest_checkpoint

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu")
COLOURS = ("red", "green", "blue")
STOPPABLE: dict[str, Any] = {
    "training": {
        "maxSteps": 18,
        "batchSize": 16,
        "microBatch": 8,
        "learningRate": 3e-3,
        "evaluateEvery": {"steps": 6},
    },
    "checkpoint": {"every": {"steps": 4}},
}
"""A run of seconds with an evaluation every six steps and checkpoints in between."""
STEP = ("finetune_trainer.training", "Duties", "due")
"""Where a rank may be stopped before a step."""


def tiny_rows(count: int, *, seed: int = 0) -> tuple[list[str], list[str]]:
    """Texts of 2 to 14 words, labelled by which of three words is in them."""
    draw = random.Random(seed)
    texts, labels = [], []
    for _ in range(count):
        label = draw.choice(COLOURS)
        words = [draw.choice(WORDS) for _ in range(draw.randint(1, 13))]
        words.insert(draw.randint(0, len(words)), label)
        texts.append(" ".join(words))
        labels.append(label)
    return texts, labels


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two torch threads on busy cores are many times slower than one."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("tiny-bert"))


def make_tiny_base(directory: Path) -> Path:
    """A BERT of 30,000 weights, dropout on, whose tokenizer knows the words above."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    # A given vocabulary: the library's trainer gives other numbers each time.
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({*WORDS, *COLOURS})]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(directory)
    return directory


_SERVER = """
import gc, hashlib, json, os, signal, sys, threading, traceback
import accelerate, cleanlab.rank, peft
import sklearn.linear_model, sklearn.metrics, sklearn.multiclass, sklearn.pipeline, torch
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, PreTrainedTokenizerFast
import finetune_trainer.finish, finetune_trainer.rank, finetune_trainer.training
import finetune_trainer.storage.local, finetune_trainer.storage.s3

def refuse(event, arguments):
    if event == "pickle.find_class":
        raise RuntimeError(f"unpickled {arguments}")

def stop_at(module, owner, name, call, number):
    owner = getattr(sys.modules[module], owner)
    method, calls = getattr(owner, name), 0
    def counted(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == call and number in (signal.SIGSTOP, signal.SIGKILL):
            signal.pthread_kill(threading.get_ident(), number)  # by way of another thread, this one would go on a bit
        elif calls == call:
            os.kill(os.getpid(), number)
        return method(*arguments, **named)
    setattr(owner, name, counted)

def trace_to(path):
    trace = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    loop, checkpoints = finetune_trainer.loop, finetune_trainer.saving.Checkpoints
    step, save = loop.step, checkpoints.save
    def traced(setup, state, before_update):
        rows = hashlib.sha256(setup.rows[setup.order.batch(state.step)].tobytes()).hexdigest()
        loss, norm = step(setup, state, before_update)
        os.write(trace, f"step {state.step + 1} {rows[:16]} {loss.item().hex()}\\n".encode())
        return loss, norm
    def saved(self, state, **tensors):
        save(self, state, **tensors)
        os.write(trace, f"saved {state.step}\\n".encode())
    loop.step, checkpoints.save = traced, saved

def lose_at(number, times):
    loop = finetune_trainer.loop
    step = loop.step
    def lost(setup, state, before_update):
        nonlocal times
        loss, norm = step(setup, state, before_update)
        if state.step + 1 == number and times:
            times -= 1
            loss = loss * float("nan")
        return loss, norm
    loop.step = lost

gc.freeze()  # no child walks over everything that was imported
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    code = 1
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        os.environ.update(order["environment"])
        if "MEASURED_EVERY" in os.environ:
            finetune_trainer.measured.EVERY = float(os.environ["MEASURED_EVERY"])
        if "NAN_AT" in os.environ:
            lose_at(*map(int, os.environ["NAN_AT"].split(",")))
        if order["audit"]:
            sys.addaudithook(refuse)
        if order["trace"]:
            trace_to(order["trace"])
        if order["stop"]:
            stop_at(*order["stop"])
        code = finetune_trainer.rank.main(order["arguments"])
    except BaseException:
        traceback.print_exc()
    os._exit(code)
os._exit(0)  # libraries complain at an orderly end of what is frozen
"""


Stop = tuple[str, str, str, int, int]
"""Module, class, method, the call of it, counted from 1, at whose beginning the rank gets a signal, and its number."""


class Ranks:
    """Starts ranks as real processes, forked from one that has imported torch already: an import takes seconds."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self,
        made: "Made",
        work: Path,
        *,
        audit: bool = False,
        stop: "Stop | None" = None,
        trace: Path | None = None,
        environment: dict[str, str] | None = None,
        options: Sequence[str] = (),
    ) -> "Started":
        """`trace`: a file that gets a line for each step that is done (its number, the digest of its rows' numbers,
        its loss) and for each checkpoint that is handed over to be uploaded (its step)."""
        environment = environment or {}
        log = work.parent / f"{work.name}-{environment.get('RANK', '0')}.log"
        arguments = ["--config", str(made.config_path), "--run-id", made.record.run_id, "--work", str(work)]
        arguments += ["--inputs", made.inputs] if made.inputs is not None else []
        arguments += options
        if made.settings.credentials_dir is not None:
            arguments += ["--credentials", str(made.settings.credentials_dir)]
        pid = self._ask(
            log=str(log),
            environment=environment,
            audit=audit,
            stop=stop,
            trace=str(trace) if trace else None,
            arguments=arguments,
        )
        return Started(pid, log, self)

    def wait(self, pid: int) -> int:
        return self._ask(wait=pid)

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(120)  # on a busy machine it may still be importing

    def _ask(self, **order: Any) -> int:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())


@dataclass(frozen=True)
class Started:
    """A rank that runs."""

    pid: int
    path: Path
    ranks: Ranks

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code, negative for a signal."""
        return self.ranks.wait(self.pid)

    @property
    def log(self) -> str:
        return self.path.read_text()


@dataclass(frozen=True)
class Made:
    """A run that preflight would have passed."""

    config: RunConfig
    record: RunRecord
    config_path: Path
    ranks: "Ranks"
    settings: StorageSettings = field(default_factory=StorageSettings)
    inputs: str | None = None
    """What preflight has pinned, by its name; None: what is newest of the run."""

    @property
    def store(self) -> Store:
        return open_store(self.config.output.uri, self.settings)

    @property
    def encoded(self) -> Encoded:
        """The rows as preflight has left them."""
        return Encoded(Path(self.store.uri.removeprefix("file://")) / self.record.encoded.key)

    @property
    def records(self) -> list[Record]:
        return RunLog(self.store, self.record.run_id).read()

    def start(
        self,
        work: Path,
        *,
        audit: bool = False,
        stop: Stop | None = None,
        options: Sequence[str] = (),
        **environment: str,
    ) -> "Started":
        """One rank as the supervisor would start it, as a process of its own."""
        return self.ranks.start(self, work, audit=audit, stop=stop, environment=environment, options=options)

    def run(
        self,
        work: Path,
        *,
        audit: bool = False,
        stop: Stop | None = None,
        options: Sequence[str] = (),
        **environment: str,
    ) -> tuple[int, str]:
        """Exit code and log."""
        started = self.start(work, audit=audit, stop=stop, options=options, **environment)
        return started.wait(), started.log

    def kinds(self) -> list[str]:
        return [record.kind.value for record in self.records]

    def published(self) -> dict[str, Any]:
        """The body of the only publication."""
        (found,) = [dict(record.body) for record in self.records if record.kind is RecordKind.PUBLISHED]
        return found

    def model(self) -> Path:
        """The published directory."""
        return Path(self.published()["outcome"]["model"]["uri"].removeprefix("file://"))

    def last(self, name: str) -> Path:
        """A file of the newest checkpoint, written by one rank."""
        (path,) = [path for path in self._files() if path.name == name]
        return path

    def tensors(self, name: str) -> dict[str, Any]:
        """Those of the newest checkpoint, written by however many ranks."""
        stem = name.partition(".")[0]
        files = [load_file(path) for path in self._files() if path.name.startswith(stem)]
        return {key: tensor for file in files for key, tensor in file.items()}

    def _files(self) -> list[Path]:
        record = latest_checkpoint(self.records)
        assert record is not None
        root = Path(self.store.uri.removeprefix("file://"))
        return [root / entry["key"] for entry in record.body["objects"]]

    def losses(self) -> list[float]:
        """The loss of every step."""
        return [float(loss) for loss in self.tensors("optimizer.safetensors")["losses"]]

    def message(self, work: Path) -> LastMessage:
        return LastMessage.model_validate_json((work / "state" / "message.json").read_text())


def loaded(made: Made) -> tuple[Any, Any, Any]:
    """Learner, store and base model of a run."""
    from finetune_trainer.batches import learner_of
    from finetune_trainer.model import load

    base = Path(made.config.model.removeprefix("file://"))
    learner = learner_of(made.config, made.record, base=base)
    return learner, made.encoded, load(base, learner=learner, seed=17)


MakeRun = Callable[..., Made]


@pytest.fixture
def rows() -> Callable[..., tuple[list[str], list[str]]]:
    """Makes rows: (count, seed=0)."""
    return tiny_rows


@pytest.fixture
def free_port() -> int:
    """And three more."""
    return ports.free_port(4)


@pytest.fixture
def make_run(tmp_path: Path, tiny_base: Path, ranks: Ranks) -> MakeRun:
    return runs_in(tmp_path, tiny_base, ranks)


def runs_in(directory: Path, tiny_base: Path, ranks: Ranks) -> MakeRun:
    """Makes runs whose every tenth row is for validation, each below a directory of its own, as preflight leaves them.
    Rows are (texts, labels), or dictionaries of columns."""

    def make(
        rows: tuple[Sequence[str], Sequence[Any]] | list[dict[str, Any]],
        *,
        name: str = "run",
        base: Path = tiny_base,
        labels: list[str] | None = None,
        test: tuple[Sequence[str], Sequence[Any]] | list[dict[str, Any]] | None = None,
        **spec: Any,
    ) -> Made:
        root = directory / name
        root.mkdir(exist_ok=True)
        found = dictionaries(rows)
        write(root / "train.jsonl", [row for number, row in enumerate(found) if number % 10 != 9])
        write(root / "validation.jsonl", found[9::10])
        data: dict[str, Any] = {
            "train": [{"uri": (root / "train.jsonl").as_uri()}],
            "validation": {"uri": (root / "validation.jsonl").as_uri()},
        }
        if test is not None:
            write(root / "test.jsonl", dictionaries(test))
            data["test"] = {"uri": (root / "test.jsonl").as_uri()}
        document = {
            "model": {"uri": base.as_uri()},
            "resources": {"perNode": {"gpus": 0}},
            **spec,
            "task": {"type": "text-classification", "labels": labels, **spec.get("task", {})},
            "data": {**data, **spec.get("data", {})},
            "output": {"uri": (root / "output").as_uri(), **spec.get("output", {})},
        }
        return made(root, document, ranks)

    return make


def dictionaries(rows: tuple[Sequence[str], Sequence[Any]] | list[dict[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(rows, list):
        return rows
    return [{"text": text, "label": label} for text, label in zip(*rows, strict=True)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def made(root: Path, spec: dict[str, Any], ranks: Ranks, settings: StorageSettings | None = None) -> Made:
    """Resolve a document and let preflight do its part."""
    settings = settings or StorageSettings()
    config = resolve(
        FineTuneJobSpec.model_validate(spec),
        FineTuneProfileSpec.model_validate({"storage": {"endpoint": settings.endpoint}}),
        job="tests/tiny",
        job_uid="tiny",
        generation=1,
        defaults=Defaults("trainer", "preflight", in_cluster=False),
    )
    path = root / "config.json"
    path.write_text(config.model_dump_json(by_alias=True))
    last = preflight(config, credentials=settings.credentials_dir, work=root / "preflight")
    assert last.run_id is not None
    assert last.preflight is not None
    inputs = last.preflight.inputs
    record = read_inputs(open_store(config.output.uri, settings), last.run_id, inputs)
    return Made(config, record, path, ranks, settings, inputs)
