"""Preflight on real stores: what passes, what it leaves behind, and one clear sentence for every bad input."""

import gzip
import io
import itertools
import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from tests.storage import forgetful
from tests.storage.hub import serve

from finetune_api.contract import MESSAGE_LIMIT, ExitCode, LastMessage, RunConfig, TrainOutcome
from finetune_api.job import FineTuneJobSpec
from finetune_api.profile import FineTuneProfileSpec
from finetune_api.resolve import Defaults, digest, evaluation_id, publication_id, resolve
from finetune_api.status import EvaluationStatus, GateStatus, ModelStatus
from finetune_trainer import preflight
from finetune_trainer.__main__ import main as command_line
from finetune_trainer.gates import ON_VALIDATION
from finetune_trainer.pinned import differs
from finetune_trainer.run import RunRecord, read_record
from finetune_trainer.storage import StorageSettings, Store, open_store, split_uri
from finetune_trainer.storage.commit import (
    CURRENT,
    Holder,
    RecordKind,
    RunLog,
    part_of,
    publish_current,
    read_current,
)
from finetune_trainer.storage.digests import digest_of

SECRET_TEXT = "the launch code is 12345"


def rows(count: int = 60, labels: str = "ab") -> list[dict[str, Any]]:
    return [{"text": f"this is row number {i} of the set", "label": labels[i % len(labels)]} for i in range(count)]


def fresh(count: int) -> list[dict[str, Any]]:
    """Rows whose texts are in no other file."""
    return [{"text": f"held out number {number}", "label": "ab"[number % 2]} for number in range(count)]


def jsonl(items: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(item).encode() + b"\n" for item in items)


class Bench:
    """A model, a data set and an output in one directory, and a document that names them."""

    def __init__(self, root: Path, minilm_dir: Path) -> None:
        self.root = root
        self.credentials: Path | None = None
        model = root / "model"
        model.mkdir()
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(minilm_dir / name, model / name)
        save_file({"weight": np.arange(12, dtype=np.float32)}, model / "model.safetensors")
        self.put("train.jsonl", jsonl(rows()))
        self.spec: dict[str, Any] = {
            "task": {"type": "text-classification"},
            "model": {"uri": model.as_uri()},
            "data": {"train": [{"uri": self.uri("train.jsonl")}], "validation": {"fraction": 0.2}},
            "output": {"uri": self.uri("output")},
        }

    def put(self, name: str, data: bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def uri(self, name: str) -> str:
        return (self.root / name).as_uri()

    def config(self) -> RunConfig:
        spec = FineTuneJobSpec.model_validate_json(json.dumps(self.spec))
        defaults = Defaults(trainer_image="trainer", preflight_image="preflight", in_cluster=False)
        profile = FineTuneProfileSpec(allowed_endpoints=["http://*"])
        return resolve(spec, profile, job="default/test", job_uid="uid", generation=1, defaults=defaults)

    def run(self, *, begun: str | None = None, inputs: str | None = None) -> LastMessage:
        """`begun`: the run that the status names, and `inputs` what it reads."""
        (self.root / "config.json").write_text(self.config().model_dump_json(by_alias=True))
        message = self.root / "message"
        code = preflight.main(
            config=self.root / "config.json",
            credentials=self.credentials,
            message=message,
            work=self.root / "work",
            run=begun,
            inputs=inputs,
        )
        data = message.read_bytes()
        assert len(data) <= MESSAGE_LIMIT
        last = LastMessage.model_validate_json(data)
        assert last.code == code
        return last

    def refused(self, code: ExitCode, reason: str, *parts: str, begun: str | None = None) -> LastMessage:
        last = self.run(begun=begun)
        assert (last.code, last.reason) == (code, reason), last.message
        for part in parts:
            assert part in last.message
        assert "Traceback" not in last.message
        return last

    def record(self, last: LastMessage) -> RunRecord:
        """What the run's newest preflight has pinned."""
        store = open_store((self.root / "output").as_uri(), StorageSettings())
        return read_record(store, f"runs/{last.run_id}/run.json")


@pytest.fixture
def bench(tmp_path: Path, minilm_dir: Path) -> Bench:
    return Bench(tmp_path, minilm_dir)


# --- what passes ---


@pytest.mark.parametrize(("tokens", "left"), [(20, 400), (300, 212), (505, None)])
def test_learned_tokens_take_positions_from_rows(bench: Bench, tokens: int, left: int | None) -> None:
    """MiniLM has 512 positions."""
    bench.spec["method"] = {"type": "prompt", "virtualTokens": tokens}
    bench.spec["data"]["maxLength"] = 400
    last = bench.run()
    if left is None:
        assert (last.code, last.reason) == (ExitCode.INVALID, "ModelUnsuitable")
        assert "505 learned tokens leave no room for rows in the 512 positions" in last.message
        assert "set it to 256 or less" in last.message
    else:
        assert bench.record(last).model_max_length == left


@pytest.fixture
def whole(bench: Bench, minilm_dir: Path) -> Bench:
    """With the base's real weights."""
    shutil.copy(minilm_dir / "model.safetensors", bench.root / "model/model.safetensors")
    return bench


def test_the_memory_of_a_base_of_unknown_structure_is_not_guessed(bench: Bench) -> None:
    last = bench.run()
    assert last.preflight is not None
    summary = last.preflight.summary
    assert (summary.steps, summary.predicted_memory) == (6, None)
    report = json.loads((bench.root / "output" / str(summary.report_uri).partition("/output/")[2]).read_bytes())
    assert report["memory"] == {"unknown": "no blocks are found among its weights"}


def test_steps_and_memory_are_foretold(whole: Bench) -> None:
    bench = whole
    last = bench.run()
    assert last.preflight is not None
    summary = last.preflight.summary
    assert summary.rows is not None
    assert summary.predicted_memory is not None
    assert re.fullmatch(r"[0-9.]+[MG]i", summary.predicted_memory)
    report = json.loads((bench.root / "output" / str(summary.report_uri).partition("/output/")[2]).read_bytes())
    memory = report["memory"]
    weights = 22_717_836 - 12 * 385 + 385 * int(summary.labels or 0)
    assert (memory["parameters"], memory["weights"]) == (weights, 4 * weights)


def test_what_will_not_fit_is_a_warning_and_stops_nothing(whole: Bench) -> None:
    bench = whole
    bench.spec["resources"] = {"perNode": {"gpus": 0, "memory": "256Mi"}}
    last = bench.run()
    assert last.code == ExitCode.DONE
    assert last.preflight is not None
    assert "resources.perNode.memory gives 256Mi" in (last.preflight.summary.warnings or [""])[0]


def test_rows_of_the_data_are_counted_where_one_becomes_several(bench: Bench) -> None:
    def question(number: int) -> dict[str, Any]:
        context = " ".join(f"word{number} and{place}" for place in range(60)) + " the end"
        return {"question": f"what {number}?", "context": context, "answers": "the end"}

    bench.put("train.jsonl", jsonl([question(number) for number in range(20)]))
    bench.put("test.jsonl", jsonl([question(number) for number in range(17, 23)]))  # three are training rows, too
    bench.spec["task"] = {"type": "question-answering", "stride": 8}
    bench.put("held.jsonl", jsonl([question(number) for number in range(30, 35)]))
    held = {name: {"uri": bench.uri(f"{file}.jsonl")} for name, file in (("validation", "held"), ("test", "test"))}
    bench.spec["data"] |= {**held, "maxLength": 48}
    last = bench.run()
    assert last.preflight is not None, last.message
    found = last.preflight.summary.rows
    assert found is not None
    assert (found.train, found.validation, found.test) == (17, 5, 6)
    assert bench.record(last).encoded.rows > 60


def test_a_good_document_leaves_what_a_train_pod_needs(bench: Bench) -> None:
    bench.put("test.jsonl", jsonl(fresh(10)))
    bench.spec["data"]["test"] = {"uri": bench.uri("test.jsonl")}
    last = bench.run()
    assert (last.code, last.reason) == (0, "PreflightPassed")
    assert last.preflight is not None
    assert last.preflight.state == "Fresh"
    summary = last.preflight.summary
    assert summary.rows is not None
    assert (summary.rows.train + summary.rows.validation, summary.rows.test) == (60, 10)
    assert (summary.labels, summary.form) == (2, "one label")
    record = bench.record(last)
    assert record.labels == ["a", "b"]
    assert (record.model_max_length, record.pad_token_id) == (256, 0)
    assert [entry.role for entry in record.manifest] == [
        "model/config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
        "model/tokenizer_config.json",
        "train/0",
        "test",
    ]
    store = load_file(bench.root / "output" / record.encoded.key)
    assert np.bincount(store["split"]).tolist() == [summary.rows.train, summary.rows.validation, 10]
    sources = [record.manifest[number].role for number in store["source"]]
    assert sources == ["train/0"] * 60 + ["test"] * 10
    assert store["row"].tolist() == [*range(1, 61), *range(1, 11)]
    assert summary.report_uri is not None
    assert (bench.root / summary.report_uri.removeprefix(bench.root.as_uri() + "/")).is_file()
    assert not (bench.root / "work/preflight").exists()


def test_run_again_it_comes_to_the_same_end_and_changes_nothing(bench: Bench) -> None:
    one = bench.run()
    before = bench.record(one)
    written = (bench.root / f"output/runs/{one.run_id}/run.json").stat().st_mtime_ns
    two = bench.run()
    assert two.run_id == one.run_id
    assert bench.record(two) == before
    assert (bench.root / f"output/runs/{one.run_id}/run.json").stat().st_mtime_ns == written


def test_names_and_places_do_not_make_another_run_but_content_does(bench: Bench) -> None:
    one = bench.run()
    bench.put("moved.jsonl", jsonl(rows()))
    bench.spec["data"]["train"] = [{"uri": bench.uri("moved.jsonl")}]
    moved = bench.run()
    assert moved.run_id == one.run_id
    assert bench.record(moved).manifest[-1].uri == bench.uri("moved.jsonl")
    bench.put("moved.jsonl", jsonl(rows(61)))
    assert bench.run().run_id != one.run_id


def test_another_test_set_is_the_same_run_with_other_test_rows(bench: Bench) -> None:
    bench.put("test.jsonl", jsonl(fresh(10)))
    one = bench.run()
    bench.spec["data"]["test"] = {"uri": bench.uri("test.jsonl")}
    two = bench.run()
    assert two.run_id == one.run_id
    assert bench.record(two).manifest[-1].role == "test"
    store = load_file(bench.root / "output" / bench.record(two).encoded.key)
    assert (store["split"] == 2).sum() == 10


def retention(bench: Bench, rows: bytes, **more: Any) -> None:
    bench.put("kept.jsonl", rows)
    one = {"name": "kept", "task": {"type": "text-classification"}, "data": {"uri": bench.uri("kept.jsonl")}, **more}
    bench.spec["evaluation"] = {"retention": [one]}


def test_retention_sets_are_pinned_and_encoded_and_make_no_other_run(bench: Bench) -> None:
    before = bench.run()
    retention(bench, jsonl(fresh(40)))
    last = bench.run()
    assert last.run_id == before.run_id
    record = bench.record(last)
    pinned = record.manifest[-1]
    assert (pinned.role, pinned.uri) == ("retention/kept", bench.uri("kept.jsonl"))
    assert pinned.digest == digest_of(jsonl(fresh(40)))
    found = record.retention["kept"]
    assert (found.labels, found.encoded.rows) == (["a", "b"], 40)
    store = load_file(bench.root / "output" / found.encoded.key)
    assert sorted(set(store["split"].tolist())) == [0, 1], "a half to fit a probe on, a half for it to answer"
    bench.run()
    assert bench.record(last) == record

    # Read in another way, the same file is encoded anew.
    mirrored = jsonl([{**row, "other": row["text"][::-1]} for row in fresh(40)])
    retention(bench, mirrored)
    bench.run()
    retention(bench, mirrored, task={"type": "text-classification", "columns": {"text": "other"}})
    bench.run()
    assert bench.record(last).retention["kept"].encoded != found.encoded


@pytest.mark.parametrize(
    ("rows", "reason", "parts"),
    [
        (jsonl(fresh(9)) + b"{\n", "InvalidRow", ("kept.jsonl:10", "JSON")),
        (
            jsonl([{"body": "x", "label": "a"}]),
            "ColumnMissing",
            ("kept.jsonl:1", "no column 'text'", "spec.evaluation.retention[kept].task.columns.text"),
        ),
        (
            jsonl([{"text": f"row {n}", "label": "a"} for n in range(30)]),
            "OneClassOnly",
            ("evaluation.retention kept", "fewer than two labels"),
        ),
        (jsonl(fresh(1)), "EmptySplit", ("evaluation.retention kept", "give more rows")),
        (b"", "EmptyData", ("kept.jsonl",)),
    ],
)
def test_what_is_wrong_with_a_retention_set_is_named_by_file_and_row(
    bench: Bench, rows: bytes, reason: str, parts: tuple[str, ...]
) -> None:
    retention(bench, rows)
    bench.refused(ExitCode.INVALID, reason, *parts)


def test_a_retention_set_that_is_not_there_is_waited_for(bench: Bench) -> None:
    retention(bench, jsonl(fresh(40)))
    (bench.root / "kept.jsonl").unlink()
    bench.refused(ExitCode.STORAGE, "ObjectNotFound", "kept.jsonl")


def test_the_digest_of_a_large_file_is_taken_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    original = preflight.read_through
    monkeypatch.setattr(
        preflight, "read_through", lambda store, info, *of: (hashed.append(info.key), original(store, info, *of))[1]
    )
    bench.run()
    assert "model.safetensors" in hashed
    hashed.clear()
    bench.run()
    assert hashed == []
    save_file({"weight": np.arange(13, dtype=np.float32)}, bench.root / "model/model.safetensors")
    bench.run()
    assert hashed == ["model.safetensors"]


def test_a_kept_digest_that_was_damaged_is_taken_anew(bench: Bench) -> None:
    manifest = bench.record(bench.run()).manifest
    (known,) = [entry for entry in manifest if entry.role == "model/model.safetensors"]
    (kept,) = [path for path in (bench.root / "output/digests").iterdir() if known.uri in path.read_text()]
    whole = kept.read_bytes()
    other = known.digest[:-1] + ("0" if known.digest[-1] != "0" else "1")  # as well-formed as the right one
    kept.write_bytes(whole.replace(known.digest.encode(), other.encode()))
    assert kept.read_bytes() != whole
    assert bench.record(bench.run()).manifest == manifest
    assert kept.read_bytes() == whole


def test_labels_follow_the_document_else_the_base_model_else_code_points(bench: Bench) -> None:
    assert bench.record(bench.run()).labels == ["a", "b"]
    config = json.loads((bench.root / "model/config.json").read_text())
    config["id2label"] = {"0": "b", "1": "a", "2": "c"}
    bench.put("model/config.json", json.dumps(config).encode())
    assert bench.record(bench.run()).labels == ["b", "a", "c"]
    config["id2label"] = {"0": "LABEL_0", "1": "LABEL_1"}
    bench.put("model/config.json", json.dumps(config).encode())
    assert bench.record(bench.run()).labels == ["a", "b"]
    bench.spec["task"]["labels"] = ["b", "a", "z"]
    last = bench.run()
    assert bench.record(last).labels == ["b", "a", "z"]
    assert last.preflight is not None
    assert any("No training row has the label z" in text for text in last.preflight.summary.warnings or [])


def test_a_group_stays_on_one_side(bench: Bench) -> None:
    grouped = [{**row, "who": f"customer {i // 6}"} for i, row in enumerate(rows(300))]
    bench.put("train.jsonl", jsonl(grouped))
    bench.spec["data"]["validation"] = {"fraction": 0.3, "groupBy": "who"}
    store = load_file(bench.root / "output" / bench.record(bench.run()).encoded.key)
    sides: dict[int, set[int]] = {}
    for row, split in zip(store["row"].tolist(), store["split"].tolist(), strict=True):
        sides.setdefault((row - 1) // 6, set()).add(split)
    assert all(len(side) == 1 for side in sides.values())
    assert {0} in sides.values()
    assert {1} in sides.values()


def test_rows_with_lists_of_labels_are_multi_label(bench: Bench) -> None:
    lists = [{"text": f"row {i}", "label": ["x", "y"][: i % 3]} for i in range(60)]
    bench.put("train.jsonl", jsonl(lists))
    last = bench.run()
    assert bench.record(last).form == "a list of labels"
    assert load_file(bench.root / "output" / bench.record(last).encoded.key)["labels"].shape == (60,)


def test_odd_data_passes_with_warnings(bench: Bench) -> None:
    odd = rows(80) + [{"text": "word " * 400, "label": "a"}] * 10 + [{"text": "word " * 400, "label": "b"}] * 2
    bench.put("train.jsonl", jsonl([*odd, {"text": "rare one", "label": "c"}]))
    bench.put("test.jsonl", jsonl(rows(5)))
    bench.spec["data"] |= {"test": {"uri": bench.uri("test.jsonl")}, "maxLength": 64}
    last = bench.run()
    assert last.preflight is not None
    found = " ".join(last.preflight.summary.warnings or [])
    assert last.preflight.summary.truncated_percent == pytest.approx(100 * 12 / 98, abs=0.01)
    for sentence in (
        "Fewer than 10 training rows have",
        "training rows are left out: 5 test rows have their content (data.leakage)",
        "1 times the same text has another label",
        "% of the rows were cut to 64 tokens",
        "of 98 rows repeat the text",
    ):
        assert sentence in found


# --- what is left out, mixed and looked for ---


def left_out(bench: Bench, last: LastMessage) -> list[int]:
    """Lines of the files whose rows belong to no split."""
    store = load_file(bench.root / "output" / bench.record(last).encoded.key)
    return store["row"][store["split"] == 3].tolist()


def repeating() -> list[dict[str, Any]]:
    """60 rows, then rows 1 and 2 again, the second one with another label, and row 3 with a word changed."""
    plain = [
        {"text": " ".join(f"w{number}x{at}" for at in range(40)), "label": "ab"[number % 2]} for number in range(60)
    ]
    near = {**plain[2], "text": plain[2]["text"].replace("w2x20", "other")}
    return [*plain, dict(plain[0]), {**plain[1], "label": "a"}, near]


@pytest.mark.parametrize(
    ("wanted", "lines"), [(None, []), ({"exact": True}, [61]), ({"near": True}, [61, 62, 63]), ({"exact": False}, [])]
)
def test_repeated_training_rows_are_left_out_where_it_is_asked_for(
    bench: Bench, wanted: dict[str, bool] | None, lines: list[int]
) -> None:
    bench.put("train.jsonl", jsonl(repeating()))
    bench.put("validation.jsonl", jsonl(fresh(6)))
    bench.spec["data"]["validation"] = {"uri": bench.uri("validation.jsonl")}
    if wanted:
        bench.spec["data"]["deduplicate"] = wanted
    last = bench.run()
    assert last.preflight is not None
    assert left_out(bench, last) == lines
    summary = last.preflight.summary
    assert summary.rows is not None
    assert summary.rows.train == 63 - len(lines)
    found = summary.dropped.document() if summary.dropped else {}
    assert found.get("duplicates", 0) + found.get("nearDuplicates", 0) == len(lines)


def test_training_rows_among_the_test_rows_are_left_out_and_make_another_run(bench: Bench) -> None:
    one = bench.run()
    leak = [dict(rows(60)[7]), *fresh(3)]
    bench.put("test.jsonl", jsonl(leak))
    bench.spec["data"]["test"] = {"uri": bench.uri("test.jsonl")}
    two = bench.run()
    assert 8 in left_out(bench, two)
    assert two.run_id != one.run_id
    assert "leaked" in bench.record(two).identity["inputs"]
    bench.put("test.jsonl", jsonl([*leak, *fresh(9)]))
    assert bench.run().run_id == two.run_id


def test_leakage_can_be_refused_and_both_places_are_named(bench: Bench) -> None:
    bench.put("test.jsonl", jsonl([*fresh(3), dict(rows(60)[7])]))
    bench.spec["data"] |= {"test": {"uri": bench.uri("test.jsonl")}, "leakage": "Fail"}
    bench.refused(ExitCode.INVALID, "Leakage", "train.jsonl:", "has the content of", "test.jsonl:4", "leakage: Drop")


def test_files_of_a_pattern_are_inputs_of_their_own(bench: Bench) -> None:
    for part in range(3):
        bench.put(f"part-{part}.jsonl", jsonl(rows(60)[20 * part : 20 * part + 20]))
    bench.spec["data"]["train"] = [{"uri": bench.uri("part-*.jsonl")}]
    last = bench.run()
    record = bench.record(last)
    roles = [(entry.role, entry.uri.rsplit("/", 1)[1]) for entry in record.manifest if entry.role.startswith("train")]
    assert roles == [(f"train/0/{part}", f"part-{part}.jsonl") for part in range(3)]
    bench.put("part-3.jsonl", b"{broken")
    bench.refused(ExitCode.INVALID, "InvalidRow", "part-3.jsonl:1:2: not JSON")
    bench.spec["data"]["train"] = [{"uri": bench.uri("part-*.csv")}]
    bench.refused(ExitCode.INVALID, "NothingMatches", "no file matches; below", "correct the pattern")


def test_model_and_rows_of_the_hub_make_the_run_of_the_same_files_on_disk(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = bench.run()
    with serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        commit = hub.commit("org/tiny", {path.name: path.read_bytes() for path in (bench.root / "model").iterdir()})
        hub.commit("org/rows", {"data/train.jsonl": jsonl(rows())}, kind="datasets")
        bench.spec["model"] = {"uri": "hf://org/tiny"}
        bench.spec["data"]["train"] = [{"uri": "hf://datasets/org/rows/data/train.jsonl"}]
        found = bench.run()
        assert found.run_id == local.run_id, found.message
        record = bench.record(found)
        assert record.manifest[0].uri == f"hf://org/tiny@{commit}/config.json"
        hub.commit("org/tiny", {"config.json": b"{}"})
        root, key = split_uri(record.manifest[1].uri)
        store = open_store(root, StorageSettings())
        store.download(key, bench.root / "again", if_match=record.manifest[1].etag, digest=record.manifest[1].digest)


def test_weights_are_part_of_the_run_and_weights_of_one_are_not(bench: Bench) -> None:
    plain = bench.run()
    bench.spec["data"]["train"][0]["weight"] = 1
    assert bench.run().run_id == plain.run_id
    bench.spec["data"]["train"][0]["weight"] = 2
    assert bench.run().run_id != plain.run_id


def test_the_audit_is_in_status_and_report_and_tells_no_content(bench: Bench) -> None:
    bench.put("train.jsonl", jsonl([*rows(60), {"text": "write to jane@example.org", "label": "a", "note": ""}]))
    last = bench.run()
    assert last.preflight is not None
    summary = last.preflight.summary
    figure = next(figure for figure in summary.audit or [] if figure.name == "email")
    assert (figure.percent, figure.exact) == (pytest.approx(100 / 61, rel=1e-3), True)
    assert any("Suspected e-mail addresses in 1 of 61 rows" in sentence for sentence in summary.warnings or [])
    text = (bench.root / str(summary.report_uri).removeprefix(bench.root.as_uri() + "/")).read_text()
    assert json.loads(text)["audit"]["personalData"]["email"]["where"] == [f"{bench.uri('train.jsonl')}:61"]
    assert "jane@" not in text + last.model_dump_json()


def test_the_audit_changes_neither_run_nor_rows(bench: Bench) -> None:
    one = bench.run()
    bench.spec["data"]["audit"] = "Full"
    assert bench.run().run_id == one.run_id


# --- what is done already ---


def commit(bench: Bench, last: LastMessage, kind: RecordKind, body: dict[str, Any]) -> None:
    store = open_store(bench.spec["output"]["uri"], StorageSettings())
    RunLog(store, str(last.run_id)).claim(holder=Holder()).append(kind, body)


def publish(
    bench: Bench,
    last: LastMessage,
    *,
    end: str = "complete",
    part: dict[str, Any] | None = None,
    unknown: dict[str, Any] | None = None,
) -> TrainOutcome:
    store = open_store(bench.spec["output"]["uri"], StorageSettings())
    info = store.write(f"runs/{last.run_id}/attempts/1/model/model.safetensors", b"weights")
    outcome = TrainOutcome(
        final_step=30,
        total_steps=30,
        partial=part is not None,
        evaluation=EvaluationStatus(rows=12, on="validation", tuned={"f1": 0.9}),
        model=ModelStatus(uri="file:///somewhere", digest="sha256:0", size_bytes=7),
    )
    body = {
        "publicationId": publication_id(
            evaluation_id(str(last.run_id), bench.config(), test=None, part=part), bench.config()
        ),
        "end": end,
        "objects": [{"key": info.key, "size": info.size, "digest": info.digest}],
        "outcome": {**outcome.document(), **(unknown or {})},
    }
    commit(bench, last, RecordKind.PUBLISHED, body)
    return outcome


def test_what_a_killed_preflight_has_probed_with_goes_with_the_next_one(bench: Bench) -> None:
    bench.run()
    old, new = (bench.root / "output" / f"probe-{digit * 16}" for digit in "01")
    for path in (old, new):
        path.write_bytes(b"first")
    os.utime(old, (0, 0))
    bench.run()
    assert (old.exists(), new.exists()) == (False, True)


def test_a_committed_checkpoint_is_gone_on_from(bench: Bench) -> None:
    last = bench.run()
    commit(bench, last, RecordKind.CHECKPOINT, {"step": 12, "objects": []})
    again = bench.run()
    assert again.preflight is not None
    assert (again.preflight.state, again.preflight.step, again.step) == ("Resume", 12, 12)


def test_a_published_result_is_reused(bench: Bench) -> None:
    outcome = publish(bench, bench.run())
    again = bench.run()
    assert (again.code, again.reason) == (0, "Reused")
    assert again.preflight is not None
    assert again.preflight.state == "Reused"
    assert again.result == outcome


def test_a_result_that_a_newer_version_has_published_is_reused_after_a_rollback(bench: Bench) -> None:
    outcome = publish(bench, bench.run(), unknown={"ofTheFuture": {"a": 1}})
    again = bench.run()
    assert (again.code, again.reason, again.result) == (0, "Reused", outcome)


def test_a_changed_gate_is_judged_again_and_releases_the_model_once(bench: Bench) -> None:
    current = bench.root / "output" / CURRENT
    publish(bench, bench.run())
    bench.spec["evaluation"] = {"gates": [{"metric": "f1", "atLeast": 0.95}]}
    refused = bench.run()
    assert (refused.code, refused.reason) == (48, "GateNotMet")
    assert refused.message == "Not good enough on validation rows: f1 is 0.9, wanted >= 0.95."
    assert refused.result is not None
    assert refused.result.evaluation.gates == [GateStatus(metric="f1", passed=False, value=0.9, wanted=">= 0.95")]
    assert refused.result.evaluation.warnings == [ON_VALIDATION]
    assert not current.exists()
    bench.spec["evaluation"] = {"gates": [{"metric": "f1", "atLeast": 0.9}]}
    met = bench.run()
    assert (met.code, met.reason, met.run_id) == (0, "Reused", refused.run_id)
    assert json.loads(current.read_bytes())["runId"] == met.run_id
    output = open_store(bench.spec["output"]["uri"], StorageSettings())
    publish_current(output, {"runId": "another, published since"})
    assert bench.run().code == 0
    assert read_current(output) == {"runId": "another, published since"}
    current.write_text("damaged")
    assert bench.run().code == 0
    assert (read_current(output) or {})["runId"] == met.run_id


def test_another_publication_of_the_run_is_not_reused(bench: Bench) -> None:
    publish(bench, bench.run())
    bench.spec["output"]["weights"] = "Last"
    again = bench.run()
    assert again.preflight is not None
    assert again.preflight.state == "Fresh"


def test_a_result_that_ended_early_for_its_budget_is_not_reused(bench: Bench) -> None:
    publish(bench, bench.run(), end="stopped")
    again = bench.run()
    assert again.preflight is not None
    assert again.preflight.state == "Fresh"


def test_what_was_published_of_other_weights_of_the_same_step_is_no_result(bench: Bench) -> None:
    one = bench.run()
    store = open_store(bench.spec["output"]["uri"], StorageSettings())
    for number in range(2):  # the second time an evaluation at the last step has chosen other weights
        claim = RunLog(store, str(one.run_id)).claim(holder=Holder())
        best = claim.append(RecordKind.CHECKPOINT, {"step": 6, "objects": []})
        ended = {"step": 6, "totalSteps": 30, "end": "stopped", "weights": {"Best": best.number, "Last": best.number}}
        end = claim.append(RecordKind.TRAINED, ended)
        assert bench.run().result is None
        part = part_of(claim.records, end, weights="Best")
        outcome = publish(bench, one, end="stopped", part=part)
        assert bench.run().result == outcome, number


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b"short"),
        lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    ],
    ids=["deleted", "cut", "flipped"],
)
def test_a_published_model_that_is_not_whole_is_made_again(bench: Bench, damage: Callable[[Path], None]) -> None:
    last = bench.run()
    publish(bench, last)
    damage(bench.root / f"output/runs/{last.run_id}/attempts/1/model/model.safetensors")
    again = bench.run()
    assert again.preflight is not None
    assert again.preflight.state != "Reused"
    assert "The published model is not whole" in (again.preflight.summary.warnings or [""])[0]


def test_a_damaged_run_record_is_told_as_damage(bench: Bench) -> None:
    last = bench.run()
    key = f"output/runs/{last.run_id}/run.json"
    record = (bench.root / key).read_bytes()
    for damaged in (b"{}", b"[]", b"\xff", record.replace(b"17", b"18", 1)):
        assert damaged != record
        bench.put(key, damaged)
        bench.refused(ExitCode.DAMAGED, "RunRecordDamaged", "run.json is not what a preflight writes")


def test_a_run_record_of_another_version_is_refused_as_such(bench: Bench) -> None:
    last = bench.run()
    key = f"output/runs/{last.run_id}/run.json"
    record = json.loads((bench.root / key).read_bytes())
    del record["sha256"]
    record["schemaVersion"] = 1
    bench.put(key, json.dumps({**record, "sha256": digest(record)}).encode())
    bench.refused(ExitCode.INVALID, "UnknownFormat", "schema 1", "use the version that wrote it")


# --- a run that was begun goes on with the rows it began with ---

CHANGED = "changed since this run began; the run goes on with the rows it began with"


def warnings(last: LastMessage) -> list[str]:
    assert last.preflight is not None
    return last.preflight.summary.warnings or []


def test_a_run_that_was_begun_goes_on_though_its_rows_have_changed_and_none_is_read(bench: Bench) -> None:
    bench.put("train.jsonl", jsonl([*rows(), *rows(9)]))
    one = bench.run()
    assert one.preflight is not None
    assert warnings(one)
    written = (bench.root / f"output/runs/{one.run_id}/run.json").stat().st_mtime_ns
    commit(bench, one, RecordKind.CHECKPOINT, {"step": 12, "objects": []})
    quiet = bench.run(begun=one.run_id)
    assert warnings(quiet) == warnings(one)
    bench.put("train.jsonl", b"rows of today, which no reader can read")
    for _ in range(2):
        last = bench.run(begun=one.run_id)
        assert (last.code, last.run_id, last.step) == (0, one.run_id, 12)
        assert last.preflight is not None
        assert last.preflight.state == "Resume"
        assert warnings(last) == [
            f"train/0 {bench.uri('train.jsonl')} has {CHANGED}; change the document to train on the new ones.",
            *warnings(one),
        ]
        assert last.preflight.summary.model_copy(
            update={"warnings": None, "report_uri": None}
        ) == one.preflight.summary.model_copy(update={"warnings": None, "report_uri": None})
    assert (bench.root / f"output/runs/{one.run_id}/run.json").stat().st_mtime_ns == written


def test_without_its_name_a_run_is_the_one_of_the_rows_as_they_are(bench: Bench) -> None:
    one = bench.run()
    bench.put("train.jsonl", jsonl(rows(61)))
    assert bench.run().run_id != one.run_id


def test_a_preflight_pod_is_told_of_its_run_by_its_environment(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    one = bench.run()
    bench.put("train.jsonl", jsonl(rows(61)))
    command = ["preflight", "--config", str(bench.root / "config.json"), "--work", str(bench.root / "work")]
    command += ["--message", str(bench.root / "message")]
    for name, same in ((str(one.run_id), True), ("", False)):
        monkeypatch.setenv("FINETUNE_RUN", name)
        assert command_line(command) == 0
        last = LastMessage.model_validate_json((bench.root / "message").read_bytes())
        assert (last.run_id == one.run_id) is same


@pytest.mark.parametrize(("wanted", "names"), [("*.jsonl", ("train/0",)), ("b.jsonl", ())])
def test_a_file_that_a_pattern_matches_since_is_told_of(bench: Bench, wanted: str, names: tuple[str, ...]) -> None:
    for name in "ab":
        bench.put(f"rows/{name}.jsonl", jsonl(rows()))
    bench.spec["data"]["train"] = [{"uri": bench.uri(f"rows/{wanted}").replace("%2A", "*")}]
    one = bench.run()
    bench.put("rows/c.jsonl", jsonl(fresh(4)))
    last = bench.run(begun=one.run_id)
    assert last.run_id == one.run_id
    assert [sentence.split()[0] for sentence in warnings(last) if CHANGED in sentence] == [*names]


def test_the_very_bytes_uploaded_again_are_no_news(bench: Bench) -> None:
    one = bench.run()
    for name in ("train.jsonl", "model/model.safetensors"):
        bench.put(f"{name}.new", (bench.root / name).read_bytes())
        (bench.root / f"{name}.new").replace(bench.root / name)
    last = bench.run(begun=one.run_id)
    assert (last.code, last.run_id) == (0, one.run_id)
    assert not [sentence for sentence in warnings(last) if CHANGED in sentence]
    etags = {entry.role: entry.etag for entry in bench.record(last).manifest}
    before = (bench.root / "model/model.safetensors").stat()
    assert etags["model/model.safetensors"] == f"{before.st_size}-{before.st_mtime_ns}-{before.st_ino}"


@pytest.fixture
def pictures(bench: Bench) -> Bench:
    """Images beside a file that names them, and a model of them."""
    model = bench.root / "model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    (model / "config.json").write_text(json.dumps({"model_type": "resnet", "num_channels": 3}))
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (model / "preprocessor_config.json").write_text(json.dumps(processor))
    draw, named = np.random.default_rng(0), []
    for number in range(40):
        out = io.BytesIO()
        Image.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(out, "PNG")
        bench.put(f"images/{'ab'[number % 2]}/{number}.png", out.getvalue())
        named.append({"image": f"images/{'ab'[number % 2]}/{number}.png", "label": "ab"[number % 2]})
    bench.put("train.jsonl", jsonl(named))
    bench.spec["task"] = {"type": "image-classification"}
    return bench


@pytest.mark.parametrize("name", ["train.jsonl", "images/"])
def test_what_names_images_and_was_written_again_is_not_said_to_have_changed(pictures: Bench, name: str) -> None:
    pictures.spec["data"]["train"] = [{"uri": pictures.uri(name) + ("/" if name.endswith("/") else "")}]
    one = pictures.run()
    assert one.code == 0, one.message
    again = "train.jsonl" if name == "train.jsonl" else "images/a/0.png"
    data = (pictures.root / again).read_bytes()
    for content, said in ((data, "been written again since this run began"), (data + b"\n", CHANGED)):
        pictures.put(again, content)
        last = pictures.run(begun=one.run_id)
        assert (last.code, last.run_id) == (0, one.run_id), last.message
        (told,) = [sentence for sentence in warnings(last) if "since this run began" in sentence]
        assert told.startswith("train/0 ")
        assert f"has {said}" in told


def test_rows_that_are_gone_stop_no_run_that_was_begun(bench: Bench) -> None:
    one = bench.run()
    (bench.root / "train.jsonl").unlink()
    last = bench.run(begun=one.run_id)
    assert (last.code, last.run_id) == (0, one.run_id)
    assert CHANGED in warnings(last)[0]


def test_a_run_whose_base_has_changed_is_refused_and_the_file_named(bench: Bench) -> None:
    one = bench.run()
    save_file({"weight": np.zeros(12, dtype=np.float32)}, bench.root / "model/model.safetensors")
    bench.refused(
        ExitCode.INVALID, "InputChanged", bench.uri("model/model.safetensors"), "restore it", begun=one.run_id
    )
    (bench.root / "model/model.safetensors").unlink()
    bench.refused(ExitCode.STORAGE, "ObjectNotFound", bench.uri("model/model.safetensors"), begun=one.run_id)


def test_a_model_that_is_published_needs_neither_rows_nor_base(bench: Bench) -> None:
    one = bench.run()
    outcome = publish(bench, one)
    (bench.root / "train.jsonl").unlink()
    shutil.rmtree(bench.root / "model")
    last = bench.run(begun=one.run_id)
    assert (last.code, last.reason, last.result) == (0, "Reused", outcome)


def test_a_run_of_another_document_is_never_gone_on_with(bench: Bench) -> None:
    """Whoever writes into a status may name any run of the output."""
    bench.put("other.jsonl", jsonl(rows(80)))
    one = bench.run()
    bench.spec["data"]["train"] = [{"uri": bench.uri("other.jsonl")}]  # else the same: but for its rows the very run
    other = bench.run(begun=one.run_id)
    assert other.run_id not in (None, one.run_id)
    assert "has the inputs of another document" in warnings(other)[0]
    assert f"make another run, {other.run_id}" in warnings(other)[0]
    bench.spec["training"] = {"learningRate": 0.001}
    faster = bench.run(begun=other.run_id)
    assert faster.run_id not in (None, one.run_id, other.run_id)
    assert "is of another document" in warnings(faster)[0]


@pytest.mark.parametrize("name", ["0" * 16, "../../x", "--config", "", "A" * 16])
def test_a_run_that_is_made_up_changes_nothing(bench: Bench, name: str) -> None:
    one = bench.run()
    last = bench.run(begun=name)
    assert (last.code, last.run_id) == (0, one.run_id)
    assert [sentence.partition(",")[0] for sentence in warnings(last)] == [f"Run {name}"]


def test_a_record_under_the_name_of_another_run_is_not_believed(bench: Bench) -> None:
    one = bench.run()
    bench.put(f"output/runs/{'f' * 16}/run.json", (bench.root / f"output/runs/{one.run_id}/run.json").read_bytes())
    assert bench.run(begun="f" * 16).run_id == one.run_id


def go_on(bench: Bench, last: LastMessage) -> LastMessage:
    """As the operator has it done, with what it was told before."""
    assert last.preflight is not None
    return bench.run(begun=last.run_id, inputs=last.preflight.inputs)


@pytest.fixture
def in_pods(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each preflight leaves a report of its own, as those of pods do."""
    run, numbers = bench.run, itertools.count()

    def in_a_pod(**told: Any) -> LastMessage:
        monkeypatch.setenv("FINETUNE_POD_UID", f"pod-{next(numbers)}")
        return run(**told)

    monkeypatch.setattr(bench, "run", in_a_pod)


@pytest.mark.usefixtures("in_pods")
def test_a_run_keeps_its_rows_whatever_a_twin_pins_in_between(bench: Bench) -> None:
    bench.put("test.jsonl", jsonl(fresh(20)))
    bench.spec["data"]["test"] = {"uri": bench.uri("test.jsonl")}
    one = bench.run()
    assert one.preflight is not None
    bench.put("test.jsonl", jsonl(fresh(30)))
    twin = bench.run()  # the very same document, applied after the file has changed
    assert twin.preflight is not None
    assert (twin.run_id, bench.record(twin).encoded.rows) == (one.run_id, 60 + 30)
    assert twin.preflight.inputs != one.preflight.inputs
    known = [(last, last.preflight.inputs, last.preflight.summary.rows) for last in (one, twin) if last.preflight]
    for last, inputs, counts in [*known, *known]:
        again = go_on(bench, last)
        assert again.preflight is not None
        assert (again.preflight.inputs, again.preflight.summary.rows) == (inputs, counts)
        assert [sentence.split()[0] for sentence in warnings(again) if CHANGED in sentence] == ["test"] * (last is one)


@pytest.mark.usefixtures("in_pods")
def test_a_run_goes_on_though_another_document_of_it_was_looked_at_since(bench: Bench) -> None:
    one = bench.run()
    spec = json.dumps(bench.spec)
    bench.put("test.jsonl", jsonl(fresh(20)))
    bench.spec["data"]["test"] = {"uri": bench.uri("test.jsonl")}
    assert bench.run().run_id == one.run_id
    bench.spec = json.loads(spec)
    bench.put("train.jsonl", b"rows of today, which no reader can read")
    last = go_on(bench, one)
    assert (last.code, last.run_id) == (0, one.run_id), last.message
    assert one.preflight is not None
    assert last.preflight is not None
    assert last.preflight.summary.rows == one.preflight.summary.rows


@pytest.mark.parametrize("name", ["0" * 32, "../../x", "--config", "A" * 32])
def test_inputs_that_are_made_up_or_gone_are_read_anew(bench: Bench, name: str) -> None:
    one = bench.run()
    assert one.preflight is not None
    last = bench.run(begun=one.run_id, inputs=name)
    assert (last.code, last.run_id) == (0, one.run_id)
    assert last.preflight is not None
    assert last.preflight.inputs == one.preflight.inputs


def test_inputs_under_the_name_of_others_are_not_believed(bench: Bench) -> None:
    one = bench.run()
    assert one.preflight is not None
    directory = f"output/runs/{one.run_id}/inputs"
    data = (bench.root / directory / f"{one.preflight.inputs}.json").read_bytes()
    bench.put(f"{directory}/{'0' * 32}.json", data)
    last = bench.run(begun=one.run_id, inputs="0" * 32)
    assert (last.code, last.reason) == (ExitCode.DAMAGED, "RunRecordDamaged")


def test_a_published_model_is_reused_though_its_document_was_pinned_before_documents_had_inputs_of_their_own(
    bench: Bench,
) -> None:
    one = bench.run()
    outcome = publish(bench, one)
    shutil.rmtree(bench.root / f"output/runs/{one.run_id}/inputs")
    last = bench.run(begun=one.run_id)
    (bench.root / "train.jsonl").unlink()
    for _ in range(2):
        assert (last.code, last.reason, last.result) == (0, "Reused", outcome)
        last = go_on(bench, last)


def test_what_is_measured_anew_is_read_anew(bench: Bench) -> None:
    """A slice of rows, a set of rows: the encoded store has neither."""
    bench.put("train.jsonl", jsonl([{**row, "kind": n % 3} for n, row in enumerate(rows())]))
    one = bench.run()
    bench.spec["evaluation"] = {"slices": ["kind"]}
    sliced = bench.run(begun=one.run_id)
    assert sliced.run_id == one.run_id
    assert list(bench.record(sliced).slices) == ["kind"]
    retention(bench, jsonl(fresh(40)))
    kept = bench.run(begun=one.run_id)
    assert kept.run_id == one.run_id
    assert list(bench.record(kept).retention) == ["kept"]


def test_slices_in_another_order_are_numbered_anew_in_record_and_store_alike(bench: Bench) -> None:
    bench.put("train.jsonl", jsonl([{**row, "kind": n % 3, "old": n % 2 == 0} for n, row in enumerate(rows())]))
    bench.spec["evaluation"] = {"slices": ["kind", "old"]}
    one = bench.run()
    old = bench.record(one)
    assert [*old.slices] == ["kind", "old"]
    before = load_file(bench.root / "output" / old.encoded.key)
    bench.spec["evaluation"] = {"slices": ["old", "kind"]}
    last = bench.run(begun=one.run_id)
    assert last.run_id == one.run_id
    record = bench.record(last)
    assert [*record.slices.items()] == [(name, old.slices[name]) for name in ("old", "kind")]
    after = load_file(bench.root / "output" / record.encoded.key)
    for number, other in ((0, 1), (1, 0)):
        assert np.array_equal(after[f"slice.{number}"], before[f"slice.{other}"])
    bench.put("train.jsonl", b"rows of today, which no reader can read")
    assert bench.run(begun=one.run_id).code == 0, "the next time no row is read"


def test_inputs_with_slices_in_another_order_are_others_though_their_columns_are_alike(bench: Bench) -> None:
    """Numbers of two columns may be the same in each row: country, and its code."""
    bench.put("train.jsonl", jsonl([{**row, "kind": n % 3, "old": n % 3 + 7} for n, row in enumerate(rows())]))
    bench.spec["evaluation"] = {"slices": ["kind", "old"]}
    one = bench.run()
    bench.spec["evaluation"] = {"slices": ["old", "kind"]}
    two = bench.run()
    assert one.run_id == two.run_id
    assert one.preflight is not None
    assert two.preflight is not None
    assert one.preflight.inputs != two.preflight.inputs
    bench.put("train.jsonl", b"rows of today, which no reader can read")
    bench.spec["evaluation"] = {"slices": ["kind", "old"]}
    again = bench.run(begun=one.run_id, inputs=one.preflight.inputs)
    assert (again.code, again.run_id) == (0, one.run_id), "no row is read"


def test_a_record_with_several_slices_of_an_earlier_version_is_whole(bench: Bench) -> None:
    """It was sealed without the order of their names."""
    bench.put("train.jsonl", jsonl([{**row, "kind": n % 3, "old": n % 2} for n, row in enumerate(rows())]))
    bench.spec["evaluation"] = {"slices": ["kind", "old"]}
    one = bench.run()
    path = bench.root / "output" / f"runs/{one.run_id}/run.json"
    document = json.loads(path.read_text())
    del document["sha256"]
    path.write_text(json.dumps({**document, "sha256": digest(document)}))
    bench.put("train.jsonl", b"rows of today, which no reader can read")
    assert bench.run(begun=one.run_id).code == 0


def test_a_column_that_is_named_twice_is_one_slice(bench: Bench) -> None:
    bench.put("train.jsonl", jsonl([{**row, "kind": n % 3} for n, row in enumerate(rows())]))
    bench.spec["evaluation"] = {"slices": ["kind", "kind"]}
    one = bench.run()
    config = bench.config()
    assert config.evaluation.slices == ["kind"]
    assert differs(config, bench.record(one)) is None


def test_retention_sets_in_another_order_are_the_same_ones_and_no_row_is_read(bench: Bench) -> None:
    retention(bench, jsonl(fresh(40)))
    (kept,) = bench.spec["evaluation"]["retention"]
    bench.spec["evaluation"]["retention"] = [kept, {**kept, "name": "other"}]
    one = bench.run()
    bench.spec["evaluation"]["retention"].reverse()
    for name in ("train", "kept"):
        bench.put(f"{name}.jsonl", b"rows of today, which no reader can read")
    last = bench.run(begun=one.run_id)
    assert (last.code, last.run_id) == (0, one.run_id), last.message
    assert bench.record(last) == bench.record(one)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"x" * path.stat().st_size)])
def test_without_its_encoded_store_a_run_reads_its_rows_again_and_takes_no_others(
    bench: Bench, damage: Callable[[Path], Any]
) -> None:
    one = bench.run()
    key, whole = bench.record(one).encoded.key, bench.record(one).encoded.digest
    for named in (one.run_id, None):
        damage(bench.root / "output" / key)
        last = bench.run(begun=named)
        assert (last.code, last.run_id) == (0, one.run_id)
        assert digest_of((bench.root / "output" / key).read_bytes()) == whole
    damage(bench.root / "output" / key)
    bench.put("train.jsonl", jsonl(rows(80)))
    bench.refused(ExitCode.INVALID, "InputChanged", key, f"run {one.run_id}", "restore", begun=one.run_id)
    bench.put("train.jsonl", jsonl(rows()))
    last = bench.run(begun=one.run_id)
    assert (last.code, last.run_id) == (0, one.run_id)
    assert digest_of((bench.root / "output" / key).read_bytes()) == whole


@pytest.mark.parametrize("name", ["test", "kept"])
def test_rows_to_measure_that_are_others_by_now_take_the_place_of_no_encoded_ones(bench: Bench, name: str) -> None:
    """The run's name tells nothing of them."""
    bench.put("test.jsonl", jsonl(fresh(20)))
    bench.spec["data"]["test"] = {"uri": bench.uri("test.jsonl")}
    retention(bench, jsonl(fresh(40)))
    one = bench.run()
    key = bench.record(one).encoded.key
    (bench.root / "output" / key).unlink()
    before = (bench.root / f"{name}.jsonl").read_bytes()
    bench.put(f"{name}.jsonl", jsonl(fresh(30)))
    bench.refused(ExitCode.INVALID, "InputChanged", key, f"run {one.run_id}", "restore", begun=one.run_id)
    bench.put(f"{name}.jsonl", before)
    last = bench.run(begun=one.run_id)
    assert (last.code, last.run_id) == (0, one.run_id)
    assert (bench.root / "output" / key).exists()


def test_the_encoded_store_of_a_retention_set_is_mended_as_well(bench: Bench) -> None:
    retention(bench, jsonl(fresh(40)))
    one = bench.run()
    stored = bench.record(one).retention["kept"].encoded
    path = bench.root / "output" / stored.key
    path.write_bytes(b"x" * path.stat().st_size)
    last = bench.run(begun=one.run_id)
    assert (last.code, last.run_id) == (0, one.run_id)
    assert digest_of(path.read_bytes()) == stored.digest


def test_a_run_whose_record_is_damaged_is_refused_whatever_the_rows_are_by_now(bench: Bench) -> None:
    one = bench.run()
    bench.put(f"output/runs/{one.run_id}/run.json", b"{}")
    bench.put("train.jsonl", jsonl(rows(80)))
    bench.refused(ExitCode.DAMAGED, "RunRecordDamaged", f"{one.run_id}/run.json", begun=one.run_id)


def test_everything_that_is_measured_stays_as_well(bench: Bench) -> None:
    """Labels in their order, rows of a pattern, of tests and of retention sets, slices: none is read again."""
    named = [{**row, "kind": n % 3} for n, row in enumerate([*rows(), *fresh(20)])]
    for name, some in (("rows/a", named[:30]), ("rows/b", named[30:60]), ("test", named[60:])):
        bench.put(f"{name}.jsonl", jsonl(some))
    bench.spec["task"]["labels"] = ["b", "a"]
    bench.spec["data"]["train"] = [{"uri": bench.uri("rows/*.jsonl").replace("%2A", "*")}]
    bench.spec["data"]["test"] = {"uri": bench.uri("test.jsonl")}
    retention(bench, jsonl(fresh(40)))
    bench.spec["evaluation"]["slices"] = ["kind"]
    one = bench.run()
    record = bench.record(one)
    assert (record.labels, [*record.slices], [*record.retention]) == (["b", "a"], ["kind"], ["kept"])
    for name in ("rows/a", "rows/b", "test", "kept"):
        bench.put(f"{name}.jsonl", b"rows of today, which no reader can read")
    last = bench.run(begun=one.run_id)
    assert (last.code, last.run_id) == (0, one.run_id)
    assert bench.record(last) == record
    roles = ("train/0", "test", "retention/kept")
    assert [role for role in roles if f"{role} {bench.root.as_uri()}" in warnings(last)[0]] == [*roles]
    assert f"have {CHANGED}" in warnings(last)[0]


def test_a_base_of_the_hub_stays_at_its_commit(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        files = {path.name: path.read_bytes() for path in (bench.root / "model").iterdir()}
        hub.commit("org/tiny", {**files, "README.md": b"---\nlicense: apache-2.0\n---\n"})
        bench.spec["model"] = {"uri": "hf://org/tiny"}
        one = bench.run()
        record = bench.record(one)
        assert record.license == "apache-2.0"
        hub.commit("org/tiny", {"config.json": b"{}", "README.md": b"---\nlicense: other\n---\n"})
        last = bench.run(begun=one.run_id)
        assert (last.code, last.run_id) == (0, one.run_id), last.message
        assert bench.record(last) == record


# --- bad content: 42, and nothing is left behind ---

BAD_ROWS: dict[str, tuple[bytes, str, tuple[str, ...]]] = {
    "line 17 is not JSON": (
        jsonl(rows(16)) + b'{"text": "' + SECRET_TEXT.encode() + b'", label}\n' + jsonl(rows(9)),
        "InvalidRow",
        ("train.jsonl:17:", "not JSON", "every line must be one JSON object"),
    ),
    "two bad lines": (
        b"[]\n" + jsonl(rows(16)) + b'{"text": null, "label": "a"}\n',
        "InvalidRow",
        ("train.jsonl:1: the line is an array", "(and 1 more)"),
    ),
    "a column is missing": (
        jsonl([{"body": "x", "intent": "y"}]),
        "ColumnMissing",
        ("train.jsonl:1: no column 'text'; columns found: body, intent", "spec.task.columns.text"),
    ),
    "the file is empty": (b"", "EmptyData", ("train.jsonl: the file is empty",)),
    "the file has blank lines only": (b"\n \n", "EmptyData", ("train.jsonl: the file has no rows",)),
    "one class only": (jsonl(rows(40, "a")), "OneClassOnly", ("the label 'a' alone", "nothing to learn")),
    "a label is null": (
        jsonl([*rows(4), {"text": SECRET_TEXT, "label": None}]),
        "InvalidRow",
        ("train.jsonl:5: the column 'label' must hold a label", "found nothing (null)"),
    ),
    "a text is a number": (
        jsonl([*rows(4), {"text": 5, "label": "a"}]),
        "InvalidRow",
        ("train.jsonl:5: the column 'text' must hold text, found the number 5",),
    ),
    "a text is empty": (
        jsonl([*rows(4), {"text": " \t", "label": "a"}]),
        "InvalidRow",
        ("train.jsonl:5: the text in the column 'text' is empty",),
    ),
    "a list of labels among single ones": (
        jsonl([*rows(4), {"text": SECRET_TEXT, "label": ["a"]}]),
        "InvalidRow",
        ("train.jsonl:5: the row has a list of labels where the first row has one label",),
    ),
    "half a surrogate pair": (
        jsonl([*rows(4), {"text": "\ud800 x", "label": "a"}]),
        "InvalidRow",
        ("train.jsonl:5: a text holds half a surrogate pair",),
    ),
    "nothing left to validate": (
        jsonl([{"text": "this row", "label": "a"}, {"text": "that row", "label": "b"}]),
        "EmptySplit",
        ("is left for", "with validation.fraction 0.2"),
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_end_with_one_clear_sentence(bench: Bench, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    data, reason, parts = BAD_ROWS[name]
    bench.put("train.jsonl", data)
    last = bench.refused(ExitCode.INVALID, reason, *parts)
    assert SECRET_TEXT not in last.message
    said = capfd.readouterr()
    assert SECRET_TEXT not in said.out + said.err
    assert "Traceback" not in said.err
    assert not list((bench.root / "output").rglob("*")), "nothing is half-written"


def test_a_label_outside_the_documents_labels_is_named(bench: Bench) -> None:
    bench.spec["task"]["labels"] = ["a", "c"]
    bench.refused(
        ExitCode.INVALID,
        "UnknownLabel",
        "train.jsonl:2: the label 'b' is not in spec.task.labels (a, c)",
        "(and 29 more)",
    )


def test_a_label_that_only_test_rows_have_is_refused(bench: Bench) -> None:
    bench.put("test.jsonl", jsonl(rows(6, "abc")))
    bench.spec["data"]["test"] = {"uri": bench.uri("test.jsonl")}
    bench.refused(
        ExitCode.INVALID, "UnknownLabel", "test.jsonl:3: the label 'c'", "training and validation rows (a, b)"
    )


def test_a_label_named_twice_is_refused(bench: Bench) -> None:
    bench.spec["task"]["labels"] = ["a", "b", "a"]
    bench.refused(ExitCode.INVALID, "InvalidLabels", "names 'a' twice")


def test_a_csv_without_the_column_names_those_of_its_header(bench: Bench) -> None:
    bench.put("train.csv", b"body,intent\nx,y\n")
    bench.spec["data"]["train"] = [{"uri": bench.uri("train.csv")}]
    bench.refused(ExitCode.INVALID, "ColumnMissing", "train.csv:2: no column 'text'; columns found: body, intent")


def test_a_missing_group_column_is_named(bench: Bench) -> None:
    bench.spec["data"]["validation"] = {"fraction": 0.2, "groupBy": "customer"}
    bench.refused(ExitCode.INVALID, "ColumnMissing", "no column 'customer'", "spec.data.validation.groupBy")


def test_a_file_that_is_not_what_its_name_says_is_refused(bench: Bench) -> None:
    bench.put("train.jsonl.zst", gzip.compress(jsonl(rows())))
    bench.spec["data"]["train"] = [{"uri": bench.uri("train.jsonl.zst")}]
    bench.refused(ExitCode.INVALID, "InvalidFile", "is named train.jsonl.zst but is gzip data")


def test_overlong_rows_fail_when_the_document_says_so(bench: Bench) -> None:
    bench.put("train.jsonl", jsonl([*rows(), {"text": "word " * 100, "label": "a"}]))
    bench.spec["data"] |= {"maxLength": 32, "overlong": "Fail"}
    bench.refused(ExitCode.INVALID, "RowTooLong", "train.jsonl:61: the row has about 104 tokens, 32 are allowed")


def test_dropping_all_rows_is_refused(bench: Bench) -> None:
    bench.spec["data"] |= {"maxLength": 8, "overlong": "Drop"}
    bench.refused(ExitCode.INVALID, "EmptySplit", "rows were dropped as longer than data.maxLength allows")


BAD_MODELS: dict[str, tuple[Callable[[Path], Any], str, tuple[str, ...]]] = {
    "no config.json": (lambda m: (m / "config.json").unlink(), "ModelIncomplete", ("config.json is missing",)),
    "config.json is a list": (
        lambda m: (m / "config.json").write_text("[]"),
        "ModelIncomplete",
        ("config.json is not a JSON object",),
    ),
    "no tokenizer.json": (lambda m: (m / "tokenizer.json").unlink(), "ModelIncomplete", ("save_pretrained(DIR)",)),
    "a tokenizer of nothing": (
        lambda m: (m / "tokenizer.json").write_text("{}"),
        "ModelIncomplete",
        ("not a tokenizer of the tokenizers library",),
    ),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "ModelIncomplete", ("model.safetensors is missing",)),
    "weights cut short": (
        lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:-4]),
        "ModelIncomplete",
        ("where its header says",),
    ),
    "weights that are none": (
        lambda m: (m / "model.safetensors").write_bytes(b"<html>not found</html>"),
        "ModelIncomplete",
        ("not a safetensors file",),
    ),
    "a shard is missing": (
        lambda m: (m / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-1.safetensors"}}'),
        "ModelIncomplete",
        ("model-1.safetensors, which model.safetensors.index.json needs, is missing",),
    ),
    "pickles only": (
        lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
        "PickleModel",
        ("the weights are pickles (pytorch_model.bin)", "convert a model you trust with: python -c"),
    ),
    "an adapter": (
        lambda m: (m / "config.json").rename(m / "adapter_config.json"),
        "ModelIncomplete",
        ("publish an adapter with output.merge",),
    ),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_bad_model_ends_with_one_clear_sentence(bench: Bench, name: str) -> None:
    spoil, reason, parts = BAD_MODELS[name]
    spoil(bench.root / "model")
    bench.refused(ExitCode.INVALID, reason, bench.uri("model"), *parts)
    assert not list((bench.root / "output").rglob("*"))


def test_a_dropout_that_the_model_has_no_place_for_is_refused(bench: Bench) -> None:
    bench.spec["training"] = {"dropout": 0.2}
    assert bench.run().reason == "PreflightPassed"
    path = bench.root / "model/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in config.items() if "dropout" not in name}))
    bench.refused(ExitCode.INVALID, "NoDropout", "training.dropout", "config.json names none", "leave the field out")


def test_a_config_of_another_version_is_told(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"schemaVersion": 2}')
    code = preflight.main(
        config=tmp_path / "config.json", credentials=None, message=tmp_path / "message", work=tmp_path / "work"
    )
    assert code == ExitCode.INVALID
    assert "operator and trainer must match" in (tmp_path / "message").read_text()


# --- the environment: 49, and it passes once mended ---


def test_an_output_that_cannot_be_written_is_told(bench: Bench) -> None:
    bench.put("file", b"")
    bench.spec["output"]["uri"] = bench.uri("file/output")
    bench.refused(ExitCode.STORAGE, "OutputNotWritable", "spec.output.uri is not writable", "file/output")


@pytest.mark.parametrize("what", ["model", "train.jsonl"])
def test_a_missing_object_passes_once_it_is_uploaded(bench: Bench, what: str) -> None:
    (bench.root / what).rename(bench.root / "away")
    bench.refused(ExitCode.STORAGE, "ObjectNotFound", bench.uri(what), "upload")
    (bench.root / "away").rename(bench.root / what)
    assert bench.run().code == 0


@pytest.fixture
def s3_bench(bench: Bench, s3_server: Any, s3_bucket: str) -> Bench:
    """The same on a real S3 server."""
    client = s3_server.client()
    for path in sorted(bench.root.rglob("*")):
        if path.is_file():
            client.put_object(Bucket=s3_bucket, Key=path.relative_to(bench.root).as_posix(), Body=path.read_bytes())
    bench.credentials = s3_server.admin
    bench.spec |= {
        "model": {"uri": f"s3://{s3_bucket}/model"},
        "data": {"train": [{"uri": f"s3://{s3_bucket}/train.jsonl"}], "validation": {"fraction": 0.2}},
        "output": {"uri": f"s3://{s3_bucket}/output"},
        "storage": {"endpoint": s3_server.endpoint},
    }
    return bench


def test_a_good_document_passes_on_s3_twice(s3_bench: Bench) -> None:
    one, two = s3_bench.run(), s3_bench.run()
    assert (one.code, one.reason, two.reason) == (0, "PreflightPassed", "PreflightPassed")
    assert one.run_id == two.run_id


def damage(store: Store, server: Any, key: str) -> None:
    """Other bytes behind the store's back: what it tells of the object stays as it was."""
    place = {"Bucket": store.uri.split("/")[2], "Key": "/".join([*store.uri.split("/")[3:], key])}
    client = server.client()
    told = client.head_object(**place)
    client.put_object(**place, Body=b"x" * told["ContentLength"], Metadata=told["Metadata"])


def s3_output(bench: Bench, server: Any) -> Store:
    settings = StorageSettings(endpoint=server.endpoint, credentials_dir=server.admin)
    return open_store(bench.spec["output"]["uri"], settings)


def test_a_damaged_encoded_store_is_mended_on_s3(s3_bench: Bench, s3_server: Any) -> None:
    one, output = s3_bench.run(), s3_output(s3_bench, s3_server)
    stored = read_record(output, f"runs/{one.run_id}/run.json").encoded
    damage(output, s3_server, stored.key)
    last = s3_bench.run(begun=one.run_id)
    assert (last.code, last.run_id) == (0, one.run_id), last.message
    assert digest_of(output.read(stored.key)) == stored.digest


def test_a_run_goes_on_though_its_last_report_is_damaged(s3_bench: Bench, s3_server: Any) -> None:
    """It is for people: all that is lost is what they were told."""
    one, output = s3_bench.run(), s3_output(s3_bench, s3_server)
    (report,) = output.list(f"runs/{one.run_id}/preflight/")
    damage(output, s3_server, report.key)
    last = s3_bench.run(begun=one.run_id)
    assert (last.code, last.run_id) == (0, one.run_id), last.message
    assert json.loads(output.read(report.key))["record"]["runId"] == one.run_id


def test_the_same_rows_are_the_same_run_on_s3_and_in_a_directory(bench: Bench, request: pytest.FixtureRequest) -> None:
    one = bench.run()
    assert request.getfixturevalue("s3_bench").run().run_id == one.run_id


@pytest.mark.parametrize("field", ["model", "output", "data"])
def test_a_missing_bucket_is_named(s3_bench: Bench, field: str) -> None:
    for source in (s3_bench.spec[field],) if field != "data" else s3_bench.spec["data"]["train"]:
        source["uri"] = "s3://no-such-bucket/train.jsonl"
    s3_bench.refused(ExitCode.STORAGE, "BucketNotFound", "no-such-bucket does not exist", "create it or correct")


def test_wrong_credentials_pass_once_mended(s3_bench: Bench, s3_server: Any, tmp_path: Path) -> None:
    s3_bench.credentials = tmp_path / "credentials"
    shutil.copytree(s3_server.admin, s3_bench.credentials)
    (s3_bench.credentials / "AWS_SECRET_ACCESS_KEY").write_text("wrong-secret-wrong-secret")
    last = s3_bench.refused(ExitCode.STORAGE, "InvalidCredentials", "AWS_SECRET_ACCESS_KEY")
    assert "wrong-secret-wrong-secret" not in last.message
    shutil.copy(s3_server.admin / "AWS_SECRET_ACCESS_KEY", s3_bench.credentials)
    assert s3_bench.run().code == 0


def test_missing_credentials_are_told_with_their_place(s3_bench: Bench, tmp_path: Path) -> None:
    s3_bench.credentials = tmp_path / "nowhere"
    s3_bench.refused(ExitCode.STORAGE, "CredentialsMissing", "AWS_ACCESS_KEY_ID")


def test_an_identity_that_may_only_read_cannot_be_given_an_output(s3_bench: Bench, s3_server: Any) -> None:
    s3_bench.credentials = s3_server.read_only
    s3_bench.refused(ExitCode.STORAGE, "OutputNotWritable", "spec.output.uri is not writable", "denied")


@pytest.mark.parametrize("condition", ["if-none-match", "if-match"])
def test_a_store_that_ignores_a_condition_is_refused_and_keeps_nothing(
    s3_bench: Bench, s3_server: Any, s3_bucket: str, condition: str
) -> None:
    before = {item["Key"] for item in s3_server.client().list_objects_v2(Bucket=s3_bucket)["Contents"]}
    with forgetful.serve(s3_server.endpoint, s3_server.admin, ignores=condition) as endpoint:
        s3_bench.spec["storage"]["endpoint"] = endpoint
        last = s3_bench.refused(ExitCode.INVALID, "ConditionalWritesUnsupported")
    assert last.message == (
        f"s3://{s3_bucket}/output: the store ignores conditional writes (If-None-Match, If-Match), without which two "
        "attempts could both commit; use a store that honours them."
    )
    assert {item["Key"] for item in s3_server.client().list_objects_v2(Bucket=s3_bucket)["Contents"]} == before


def test_a_server_that_signs_anew_and_ignores_nothing_passes(s3_bench: Bench, s3_server: Any) -> None:
    with forgetful.serve(s3_server.endpoint, s3_server.admin, ignores="") as endpoint:
        s3_bench.spec["storage"]["endpoint"] = endpoint
        last = s3_bench.run()
        assert last.code == 0, last.message


def test_an_unreachable_endpoint_is_told_within_20_seconds(s3_bench: Bench) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    s3_bench.spec["storage"]["endpoint"] = f"http://127.0.0.1:{port}"
    s3_bench.refused(ExitCode.STORAGE, "EndpointUnreachable", f"127.0.0.1:{port}")
