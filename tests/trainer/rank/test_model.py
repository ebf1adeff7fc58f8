"""Loading, methods, evaluation, checkpoints: what whole runs do not show."""

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from tests.trainer.memory import Memory, config_of, learner_of

from finetune_api.contract import MethodConfig
from finetune_trainer import adapt, checkpoint, numerics, publish, saving
from finetune_trainer.checkpoint import Best, State
from finetune_trainer.model import Loaded, ModelError, load
from finetune_trainer.saving import Checkpoints
from finetune_trainer.signs import Stopped
from finetune_trainer.storage import Damaged, StorageError, StorageSettings, open_store
from finetune_trainer.storage.commit import Fenced, Holder, RecordKind, RunLog, live_checkpoints
from finetune_trainer.tasks.probe import _fit, classify, log_loss
from finetune_trainer.tasks.text_classification import ONE
from finetune_trainer.world import World

ARCHITECTURES = ("bert", "roberta", "distilbert", "albert", "electra", "gpt2", "bart")


def loaded(base: Path, *, seed: int = 1, labels: tuple[str, ...] = ("a", "b", "c")) -> Loaded:
    return load(base, learner=learner_of(labels=labels, form=ONE), seed=seed)


def method(kind: Any, **changed: Any) -> adapt.Method:
    return adapt.get(MethodConfig(type=kind, rank=2, alpha=4.0, dropout=0.0, targets=changed.get("targets")))


@pytest.fixture
def architecture(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A small model of a real class with random weights."""
    import transformers as t

    small = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"intermediate_size": 32, "max_position_embeddings": 40}
    torch.manual_seed(0)
    models = {
        "bert": lambda: t.BertModel(t.BertConfig(**small)),
        "roberta": lambda: t.RobertaModel(t.RobertaConfig(**small)),
        "distilbert": lambda: t.DistilBertModel(
            t.DistilBertConfig(vocab_size=60, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=40)
        ),
        "albert": lambda: t.AlbertModel(t.AlbertConfig(**small, embedding_size=8)),
        "electra": lambda: t.ElectraModel(t.ElectraConfig(**small, embedding_size=16)),
        "gpt2": lambda: t.GPT2Model(t.GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, pad_token_id=0)),
        "bart": lambda: t.BartModel(
            t.BartConfig(
                vocab_size=60,
                d_model=16,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=32,
                decoder_ffn_dim=32,
                max_position_embeddings=40,
            )
        ),
    }
    models[request.param]().save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def inputs(rows: Any) -> dict[str, torch.Tensor]:
    """Rows of tokens that depend on their number; each ends with token 2, and token 0 pads."""
    texts = [np.array([3, *range(5 + row % 7, 15 + 2 * (row % 3)), 2], np.int32) for row in rows]
    store = Memory(input_ids=texts, labels=[[0]] * len(texts))
    batch = learner_of(labels=["a", "b"], form=ONE).collate(store, np.arange(len(texts)))
    return {name: torch.from_numpy(array) for name, array in batch.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES, indirect=True)
def test_training_the_head_on_cached_features_equals_the_whole_model(architecture: Path, tmp_path: Path) -> None:
    found, way = loaded(architecture), method("head")
    model = way.prepare(found, seed=1)
    rows = np.arange(70)
    short = way.shortcut(model, rows=rows, inputs_of=inputs, work=tmp_path, world=World(), beat=lambda: None)
    assert short is not None
    model.eval()
    some = np.array([3, 69, 0, 41])
    cached = short.inputs_of(some)
    labels = cached.pop("labels")
    whole = inputs(some)
    assert torch.equal(labels, whole.pop("labels"))
    torch.testing.assert_close(short.module(**cached).logits, model(**whole).logits, atol=1e-5, rtol=0)
    short.module.train()
    way.train(model)
    assert not model.base_model.training
    short.module(**cached).logits.sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} <= set(checkpoint.trainable(model))


@pytest.mark.parametrize("architecture", ARCHITECTURES, indirect=True)
def test_adapters_go_into_every_linear_layer_of_the_trunk_and_nowhere_else(architecture: Path) -> None:
    from transformers.pytorch_utils import Conv1D

    found = loaded(architecture)
    trunk = found.model.base_model
    linear = {id(module) for module in trunk.modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    new = {name.rpartition(".")[0] for name in found.fresh}
    linear -= {id(module) for name, module in found.model.named_modules() if name in new}
    model = method("lora").prepare(found, seed=1)
    adapted = {id(module.base_layer) for module in model.modules() if hasattr(module, "lora_A")}
    assert adapted == linear
    trained = set(checkpoint.trainable(model))
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert any("modules_to_save" in name for name in trained)


@pytest.mark.parametrize("architecture", ["bert"], indirect=True)
def test_adapters_go_where_the_document_says(architecture: Path) -> None:
    model = method("lora", targets=["query", "attention.output.dense"]).prepare(loaded(architecture), seed=1)
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert {name.split("layer.0.")[1] for name in adapted} == {"attention.self.query", "attention.output.dense"}
    with pytest.raises(
        ModelError, match=r"method\.targets: no linear layer .* ends in nowhere; its layers end in dense"
    ):
        method("lora", targets=["nowhere"]).prepare(loaded(architecture), seed=1)


@pytest.mark.parametrize("architecture", ["roberta"], indirect=True)
def test_a_new_head_depends_on_the_seed_alone(architecture: Path) -> None:
    torch.manual_seed(1)
    one = loaded(architecture)
    torch.manual_seed(2)
    two, other = loaded(architecture), loaded(architecture, seed=2)
    name = "classifier.out_proj.weight"
    assert name in one.fresh
    heads = [found.model.state_dict()[name] for found in (one, two, other)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert 0.005 < float(heads[0].std()) < 0.05


@pytest.mark.parametrize("architecture", ["bert"], indirect=True)
def test_the_base_keeps_its_head_for_its_own_labels_only(architecture: Path, tmp_path: Path) -> None:
    tuned = loaded(architecture).model
    tuned.save_pretrained(tmp_path / "tuned")
    same, others = loaded(tmp_path / "tuned", seed=9), loaded(tmp_path / "tuned", seed=9, labels=("x", "y", "z"))
    assert not same.fresh
    assert torch.equal(same.model.classifier.weight, tuned.classifier.weight)
    assert others.fresh == {"classifier.weight", "classifier.bias"}
    assert not torch.equal(others.model.classifier.weight, tuned.classifier.weight)
    assert loaded(tmp_path / "tuned", labels=("x", "y")).model.classifier.weight.shape == (2, 16)


def test_pickled_weights_are_not_loaded(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_base / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        loaded(tmp_path)


# --- the probe ---


def test_the_probe_is_regularised_as_rows_held_out_ask_for() -> None:
    """Two hundred rows of three hundred features, one of which tells: the weakest regularisation only learns noise."""
    draw = np.random.default_rng(0)
    features = draw.normal(size=(1200, 300)).astype(np.float32)
    labels = (features[:, 0] + features[:, 1] > 0).astype(np.int32) + 4
    known, asked = slice(0, 200), slice(200, None)
    shares = classify(features[known], labels[known], features[asked], count=6, seed=1)
    unbound = _fit(features[known], labels[known], features[asked], 1.0, 6)
    assert log_loss(shares, labels[asked]).mean() < 0.8 * log_loss(unbound, labels[asked]).mean()
    assert set(shares.argmax(1)) == {4, 5}
    assert (shares.argmax(1) == labels[asked]).mean() > 0.65


def test_a_probe_of_several_labels_answers_in_their_form() -> None:
    features = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
    labels = (features[:, :3] > 0).astype(np.uint8)
    labels[:, 2] = 0  # no row has it
    shares = classify(features, labels, features, count=3, seed=1)
    assert shares.shape == labels.shape
    assert ((shares > 0.5) == labels).mean() > 0.9
    assert 0 < log_loss(shares, labels).mean() / 3 < 0.5


# --- checkpoints ---


def committed(tmp_path: Path, keep_last: int = 2) -> tuple[Checkpoints, RunLog, Any]:
    store = open_store((tmp_path / "store").as_uri(), StorageSettings())
    log = RunLog(store, "run")
    claim = log.claim(holder=Holder())
    return Checkpoints(store, claim, prefix=claim.prefix, work=tmp_path, keep_last=keep_last), log, store


def test_a_model_of_one_large_file_shows_signs_of_life_while_it_is_published(tmp_path: Path) -> None:
    directory, store = tmp_path / "model", open_store((tmp_path / "output").as_uri(), StorageSettings())
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(bytes(40 * 1024 * 1024))
    beats: list[int] = []
    publish.directory_digest(directory, beat=lambda: beats.append(1))
    assert len(beats) == 10

    def stop() -> None:
        if len(beats) == 13:
            raise Stopped
        beats.append(1)

    with pytest.raises(Stopped):
        publish.upload_directory(directory, store, "model/", beat=stop)
    assert list((tmp_path / "output").rglob("*.safetensors")) == []
    publish.upload_directory(directory, store, "model/", beat=lambda: beats.append(1))
    assert len(beats) == 24


def test_the_last_and_the_best_of_each_stay_live(tmp_path: Path) -> None:
    checkpoints, log, store = committed(tmp_path)
    best = None
    for step, improved in ((1, True), (2, False), (3, False), (4, True), (5, False), (6, False), (7, False)):
        best = Best(step, "f1", step / 10) if improved else best
        checkpoints.save(State(step=step, best=best), weights={"w": torch.ones(2) * step}, optimizer={})
        checkpoints.wait()
        live = [record.body["step"] for record in live_checkpoints(log.read())]
        if step == 4:
            # Were the checkpoint of step 4 damaged, step 3 would be gone on from, whose best is step 1.
            assert live == [4, 3, 1]
    assert live == [7, 6, 4]
    record = checkpoint.newest_whole(log.records, store, tmp_path, beat=lambda: None)
    assert record is not None
    restored = checkpoint.open_fetched(checkpoint.directory_of(tmp_path, record.sha256))
    assert restored.state.step == 7
    assert restored.weights["w"].tolist() == [7, 7]
    checkpoints.close()


def test_a_snapshot_is_not_touched_by_further_training(tiny_base: Path) -> None:
    model = loaded(tiny_base).model
    before = checkpoint.snapshot_weights(model)
    copy = {name: tensor.clone() for name, tensor in before.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], copy[name]) for name in copy)


def test_training_waits_for_an_upload_only_when_the_next_one_is_due(tmp_path: Path) -> None:
    checkpoints, log, store = committed(tmp_path)
    gate, upload = threading.Event(), store.upload

    def slow(path: Path, key: str, **named: Any) -> Any:
        gate.wait(10)
        return upload(path, key, **named)

    store.upload = slow
    checkpoints.save(State(step=1), weights={"w": torch.ones(1)}, optimizer={})
    checkpoints.poll()
    assert not [record for record in log.records if record.kind is RecordKind.CHECKPOINT]
    gate.set()
    checkpoints.save(State(step=2), weights={"w": torch.ones(1)}, optimizer={})
    checkpoints.wait()
    assert [r.body["step"] for r in log.read() if r.kind is RecordKind.CHECKPOINT] == [1, 2]
    checkpoints.close()


@pytest.mark.parametrize("ranks", [1, 2, 3, 50])
def test_every_parameter_is_in_one_share_and_shares_are_as_even_as_the_largest_allows(
    tiny_base: Path, ranks: int
) -> None:
    model = loaded(tiny_base).model
    sizes = {name: parameter.nbytes for name, parameter in checkpoint.trainable(model).items()}
    shares = [checkpoint.share(model, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values())
    assert loads[0] > 0


class Board:
    """What torch.distributed's store does, for threads of one process."""

    def __init__(self) -> None:
        self._held: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        self._held[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self._held for key in keys)

    def get(self, key: str) -> bytes:
        return self._held[key]

    def delete_key(self, key: str) -> None:
        del self._held[key]


def of_three(tmp_path: Path) -> tuple[list[Checkpoints], RunLog, Any]:
    store, board = open_store((tmp_path / "store").as_uri(), StorageSettings()), Board()
    log = RunLog(store, "run")
    claim = log.claim(holder=Holder())
    worlds = [World(rank, 3, rank, board=board) for rank in range(3)]
    ranks = [
        Checkpoints(store, claim if world.leads else None, prefix=claim.prefix, work=tmp_path, keep_last=2, world=world)
        for world in worlds
    ]
    return ranks, log, store


def test_three_ranks_write_one_checkpoint_and_any_number_reads_it(tmp_path: Path) -> None:
    ranks, log, store = of_three(tmp_path)
    shares: list[dict[str, Any]] = [{"a": torch.ones(4)}, {"b": torch.ones(3) * 2}, {}]  # the third has no parameter
    for step in (1, 1):  # done again after a divergence
        for rank, weights in zip(ranks, shares, strict=True):
            moments = {f"{name}/step": torch.tensor(step) for name in weights}
            rank.save(State(step=step, losses=[0.5]), weights=weights, optimizer=moments, mean=weights)
        for rank in ranks:
            rank.wait()
    assert [record.kind for record in log.read()] == [RecordKind.CLAIM, *[RecordKind.CHECKPOINT] * 2]
    record = checkpoint.newest_whole(log.records, store, tmp_path, beat=lambda: None)
    assert record is not None
    names = [entry["key"].rpartition("/")[2] for entry in record.body["objects"]]
    assert names == [
        "weights-00001-of-00003.safetensors",
        "optimizer-00001-of-00003.safetensors",
        "state.json",
        "weights-00002-of-00003.safetensors",
        "optimizer-00002-of-00003.safetensors",
    ]
    restored = checkpoint.open_fetched(checkpoint.directory_of(tmp_path, record.sha256))
    assert {name: tensor.tolist() for name, tensor in restored.weights.items()} == {"a": [1] * 4, "b": [2] * 3}
    assert set(restored.optimizer) == {"a/step", "b/step"}
    assert set(restored.mean) == {"a", "b"}
    assert restored.state.losses == [0.5]
    for rank in ranks:
        rank.close()


def test_a_share_that_cannot_be_uploaded_is_told_to_rank_0_and_nothing_is_committed(tmp_path: Path) -> None:
    ranks, log, store = of_three(tmp_path)
    upload = store.upload

    def full(path: Path, key: str, **named: Any) -> Any:
        if "-00003-" in key:
            raise StorageError("NoSpace", "the bucket is full")
        return upload(path, key, **named)

    store.upload = full
    for number, rank in enumerate(ranks):
        rank.save(State(step=1), weights={f"w{number}": torch.ones(2)}, optimizer={})
    with pytest.raises(StorageError, match="the bucket is full") as told:
        ranks[0].wait()
    assert told.value.reason == "NoSpace"
    assert [record.kind for record in log.read()] == [RecordKind.CLAIM]
    for rank in ranks[1:]:
        rank.wait()
    for rank in ranks:
        rank.close()


def test_a_newer_attempt_that_claims_right_after_a_commit_finds_the_checkpoint_whole(tmp_path: Path) -> None:
    store = open_store((tmp_path / "store").as_uri(), StorageSettings())
    log = RunLog(store, "run")
    claim = log.claim(holder=Holder())
    newer: list[Any] = []

    def overtaken(record: Any) -> None:
        newer.append(RunLog(store, "run").claim(holder=Holder(pod_uid="newer")))

    made = Checkpoints(store, claim, prefix=claim.prefix, work=tmp_path, keep_last=2, committed=overtaken)
    made.save(State(step=1), weights={"w": torch.ones(2)}, optimizer={})
    with pytest.raises(Fenced):  # the collection of garbage finds out
        made.wait()
    record = checkpoint.newest_whole(newer[0].records, store, tmp_path, beat=lambda: None)
    assert record is not None
    assert record.body["step"] == 1
    made.close()


@pytest.mark.parametrize("deletes", [True, False])
def test_of_a_fenced_attempt_no_ranks_share_stays(tmp_path: Path, deletes: bool) -> None:
    ranks, _, store = of_three(tmp_path)
    RunLog(store, "run").claim(holder=Holder(pod_uid="newer"))
    if not deletes:
        store.delete = failing("the bucket lets nobody delete")
    for number, rank in enumerate(ranks):
        rank.save(State(step=1), weights={f"w{number}": torch.ones(2)}, optimizer={})
    for rank in ranks[1:]:
        rank.wait()
    with pytest.raises(Fenced):
        ranks[0].wait()
    assert bool(list(store.list("runs/run/attempts/"))) is not deletes
    for rank in ranks:
        rank.close()


def failing(message: str) -> Any:
    def fail(*_arguments: Any, **_named: Any) -> Any:
        raise StorageError("AccessDenied", message)

    return fail


def test_a_rank_that_says_nothing_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "PATIENCE", 0.1)
    ranks, log, _ = of_three(tmp_path)
    for rank in ranks[:2]:
        rank.save(State(step=1), weights={}, optimizer={})
    with pytest.raises(StorageError, match="rank 2 has said nothing") as told:
        ranks[0].wait()
    assert told.value.reason == "PeerSilent"
    assert [record.kind for record in log.read()] == [RecordKind.CLAIM]
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_a_full_scratch_disk_is_told_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_arguments: Any) -> None:
        raise error

    monkeypatch.setattr(saving, "save_file", full)
    checkpoints, _, _ = committed(tmp_path)
    checkpoints.save(State(step=1), weights={"w": torch.ones(2)}, optimizer={})
    with pytest.raises(StorageError, match=str(tmp_path)) as told:
        checkpoints.wait()
    assert told.value.environment
    checkpoints.close()


def test_the_optimizer_goes_on_where_it_was(tiny_base: Path) -> None:
    def stepped(model: Any, optimizer: torch.optim.Optimizer) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1)
        optimizer.step()

    one, two = loaded(tiny_base).model, loaded(tiny_base).model
    first = torch.optim.AdamW(one.parameters(), fused=True)
    stepped(one, first)
    second = torch.optim.AdamW(two.parameters(), fused=True)
    checkpoint.restore_weights(two, checkpoint.snapshot_weights(one))
    checkpoint.restore_optimizer(two, second, checkpoint.snapshot_optimizer(one, first))
    stepped(one, first)
    stepped(two, second)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_weights_of_another_model_are_refused(tiny_base: Path) -> None:
    model = loaded(tiny_base).model
    weights = checkpoint.snapshot_weights(model)
    weights.pop("classifier.bias")
    with pytest.raises(Damaged, match="not those of this model"):
        checkpoint.restore_weights(model, weights)


# --- numerics ---


def test_numerics_are_restored_and_changes_are_named(make_run: Any, rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config = make_run(rows(20), training={"microBatch": 8}).config
    first = numerics.resolve(config, world=World(), before={"threads": 1})
    assert (first["threads"], first["microBatch"], first["precision"]) == (1, 8, "fp32")
    assert numerics.changes(first, json.loads(json.dumps(first))) == []
    halved = {**first, "microBatch": 4, "libraries": {**first["libraries"], "torch": "1.0"}}
    second = numerics.resolve(config, world=World(), before=halved)
    assert second["microBatch"] == 4
    assert numerics.changes(halved, second) == [f"torch was 1.0, is {first['libraries']['torch']}"]
    other = make_run(rows(20), name="other", training={"microBatch": 2}).config
    assert numerics.resolve(other, world=World(), before=halved)["microBatch"] == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert numerics.resolve(config, world=World(), before=first)["threads"] == 3


@pytest.mark.parametrize(
    ("spec", "ranks", "wanted"),
    [
        ({}, 1, 16),
        ({}, 4, 8),
        ({"training": {"batchSize": 4}}, 1, 4),
        ({"data": {"train": [{"uri": "file:///rows.jsonl"}], "maxLength": 2048}}, 1, 4),
        ({"data": {"train": [{"uri": "file:///rows.jsonl"}], "maxLength": 100000}}, 1, 1),
    ],
)
def test_the_micro_batch_follows_from_the_document_and_is_kept(
    tmp_path: Path, tiny_base: Path, spec: Any, ranks: int, wanted: int
) -> None:
    config = config_of(**spec)
    first = numerics.resolve(config, world=World(size=ranks), before={"threads": 1})
    assert (first["microBatch"], first["microBatchAsked"]) == (wanted, None)
    halved = {**json.loads(json.dumps(first)), "microBatch": max(1, wanted // 2)}
    assert numerics.resolve(config, world=World(), before=halved)["microBatch"] == max(1, wanted // 2)


def test_an_attempt_after_one_that_ran_out_of_memory_begins_halved(make_run: Any, rows: Any) -> None:
    from finetune_trainer.attempt import _memory_note, _numerics_before

    made = make_run(rows(20), training={"microBatch": 8})
    first = numerics.resolve(made.config, world=World(), before=None)
    log = RunLog(made.store, "run")
    claim = log.claim(holder=Holder(), numerics=first)
    assert _numerics_before(log.read(), made.store, "run") == first
    made.store.write(_memory_note("run", claim.number), b'{"microBatch": 8}')
    before = _numerics_before(log.read(), made.store, "run")
    assert numerics.resolve(made.config, world=World(), before=before)["microBatch"] == 4


@pytest.mark.parametrize(
    "note",
    [b"", b'{"microB', b'{"microBatbh": 8}', b'{"microBatch": "8"}', b'{"microBatch": 7.5}', b"[8]", b"\xff", b"8"],
)
def test_a_damaged_word_of_memory_that_was_used_up_is_still_one(
    make_run: Any, rows: Any, note: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    from finetune_trainer.attempt import _memory_note, _numerics_before

    made = make_run(rows(20), training={"microBatch": 8})
    log = RunLog(made.store, "run")
    claim = log.claim(holder=Holder(), numerics=numerics.resolve(made.config, world=World(), before=None))
    made.store.write(_memory_note("run", claim.number), note)
    before = _numerics_before(log.read(), made.store, "run")
    assert before is not None
    assert (before["microBatch"], type(before["microBatch"])) == (4, int)
    assert "out-of-memory.json is damaged" in caplog.text


def test_the_thread_count_is_measured_where_nothing_says_it(
    make_run: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        assert numerics.resolve(make_run(rows(20)).config, world=World(), before=None)["threads"] >= 1
    finally:
        torch.set_num_threads(before)


BUSY, IDLE = {1: 1.0, 2: 4.0}, {1: 1.0, 2: 0.6}


@pytest.mark.parametrize(
    ("rounds", "threads"), [([IDLE], 2), ([BUSY, IDLE, IDLE], 2), ([BUSY, IDLE, BUSY], 1), ([BUSY, BUSY, BUSY], 1)]
)
def test_a_moment_in_which_others_are_busy_does_not_decide_the_thread_count(
    monkeypatch: pytest.MonkeyPatch, rounds: list[dict[int, float]], threads: int
) -> None:
    left = list(rounds)

    def measured(times: dict[int, list[float]]) -> None:
        took = left.pop(0)
        for count, found in times.items():
            found += [took[count]] * 7

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(numerics, "_measure", measured)
    monkeypatch.setattr(numerics, "_PAUSE", 0.0)
    assert numerics._threads(World(), before=None) == threads
    assert left == []
