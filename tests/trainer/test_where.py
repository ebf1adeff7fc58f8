"""`finetune data where` on the command line, before anything is trained."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save_file

from finetune_api.contract import ExitCode
from finetune_trainer.__main__ import main
from finetune_trainer.local import load
from finetune_trainer.preflight import preflight

ROWS, BATCH = 45, 8


@pytest.fixture
def document(tmp_path: Path, minilm_dir: Path) -> dict[str, Any]:
    rows = [{"text": f"note {n} " + "and more " * (n % 7), "label": "ab"[n % 2]} for n in range(ROWS)]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    held = [{"text": f"held {n}", "label": "ab"[n % 2]} for n in range(6)]
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, held)))
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "notes"},
        "spec": {
            "task": {"type": "text-classification"},
            "model": {"uri": minilm_dir.as_uri()},
            "data": {
                "train": [{"uri": (tmp_path / "train.jsonl").as_uri()}],
                "validation": {"uri": (tmp_path / "held.jsonl").as_uri()},
            },
            "training": {"epochs": 2, "batchSize": BATCH},
            "output": {"uri": (tmp_path / "output").as_uri()},
        },
    }


def write(tmp_path: Path, document: dict[str, Any]) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def prepared(tmp_path: Path, document: dict[str, Any]) -> Path:
    """The document, with preflight done."""
    path = write(tmp_path, document)
    assert preflight(load(path, None), credentials=None, work=tmp_path / "work").run_id is not None
    return path


def test_each_row_of_an_epoch_is_named_once(
    tmp_path: Path, document: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = prepared(tmp_path, document)
    seen: Counter[str] = Counter()
    for step in range(1, 7):
        assert main(["data", "where", str(path), "--step", str(step)]) == 0
        shown = capsys.readouterr()
        assert f"step {step} of 12: batch {step} of 6 of epoch 1" in shown.err
        seen.update(shown.out.splitlines())
    uri = (tmp_path / "train.jsonl").as_uri()
    assert seen == Counter(f"{uri}:{line}" for line in range(1, ROWS + 1))


@pytest.mark.parametrize("step", [0, 13])
def test_a_step_beyond_the_run_is_refused(
    tmp_path: Path, document: dict[str, Any], capsys: pytest.CaptureFixture[str], step: int
) -> None:
    path = prepared(tmp_path, document)
    assert main(["data", "where", str(path), "--step", str(step)]) == ExitCode.INVALID
    assert f"has steps 1 to 12, not {step}" in capsys.readouterr().err


def test_a_run_that_is_not_there_is_refused_with_what_to_do(
    tmp_path: Path, document: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, document)
    question = ["data", "where", str(path), "--step", "1"]
    assert main(question) == ExitCode.INVALID
    assert "has no run of this document as it stands: start it" in capsys.readouterr().err
    prepared(tmp_path, document)
    assert main([*question, "--run", "0123456789abcdef"]) == ExitCode.INVALID
    assert "has no run 0123456789abcdef: status.run.id names it" in capsys.readouterr().err
    run = next((tmp_path / "output/runs").iterdir()).name
    document["spec"]["training"]["seed"] = 4
    write(tmp_path, document)
    assert main([*question, "--run", run]) == ExitCode.INVALID
    assert f"Run {run} is of another document" in capsys.readouterr().err


def test_of_several_runs_of_a_document_the_newest_is_meant(
    tmp_path: Path, document: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = prepared(tmp_path, document)
    (before,) = (tmp_path / "output/runs").iterdir()
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write(json.dumps({"text": "one more", "label": "a"}) + "\n")
    prepared(tmp_path, document)
    (after,) = {*(tmp_path / "output/runs").iterdir()} - {before}
    question = ["data", "where", str(path), "--step", "1"]
    assert main(question) == 0
    assert f"run {after.name}, step 1 of 12" in capsys.readouterr().err
    assert main([*question, "--run", before.name]) == 0
    assert f"run {before.name}, step 1 of 12" in capsys.readouterr().err


def test_a_damaged_record_of_another_run_is_not_in_the_way(
    tmp_path: Path, document: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = prepared(tmp_path, document)
    (mine,) = (tmp_path / "output/runs").iterdir()
    for name, record in (("a" * 16, "{}"), ("b" * 16, '{"cut": ')):
        (tmp_path / "output/runs" / name).mkdir()
        (tmp_path / "output/runs" / name / "run.json").write_text(record)
    question = ["data", "where", str(path), "--step", "1"]
    assert main(question) == 0
    assert f"run {mine.name}, step 1 of 12" in capsys.readouterr().err
    assert main([*question, "--run", "a" * 16]) == ExitCode.DAMAGED
    assert "restore it, or delete it" in capsys.readouterr().err


def test_images_of_a_folder_are_named_by_their_files(
    tmp_path: Path, document: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "vit", "image_size": 8, "patch_size": 4}))
    normal = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, **normal}
    (base / "preprocessor_config.json").write_text(json.dumps(processor))
    save_file({"weight": np.arange(12, dtype=np.float32)}, base / "model.safetensors")
    for side, shades in (("train", range(24)), ("held", range(100, 106))):
        for shade in shades:
            path = tmp_path / side / "ab"[shade % 2] / f"{shade}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (shade, 2 * shade, 7)).save(path)
    document["spec"] |= {
        "task": {"type": "image-classification"},
        "model": {"uri": base.as_uri()},
        "data": {
            "train": [{"uri": f"{(tmp_path / 'train').as_uri()}/"}],
            "validation": {"uri": f"{(tmp_path / 'held').as_uri()}/"},
        },
    }
    path = prepared(tmp_path, document)
    named = []
    for step in (1, 2, 3):
        assert main(["data", "where", str(path), "--step", str(step)]) == 0
        named += capsys.readouterr().out.splitlines()
    assert sorted(named) == sorted(file.as_uri() for file in (tmp_path / "train").rglob("*.png"))


def test_a_bad_document_is_told_with_its_line(
    tmp_path: Path, document: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    document["spec"]["task"]["type"] = "guessing"
    assert main(["data", "where", str(write(tmp_path, document)), "--step", "1"]) == ExitCode.INVALID
    assert "spec.task.type" in capsys.readouterr().err
