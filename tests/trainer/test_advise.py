"""`finetune advise` over real bases: one that knows words, one with random weights, one that cannot be used."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.matrix.kinds import marching

from finetune_api.contract import ExitCode
from finetune_api.validate import load_job
from finetune_trainer.__main__ import main

_FIELDS = {
    "animal": "dog cat horse cow sheep goat rabbit mouse rat lion tiger bear wolf fox deer camel monkey pig duck goose",
    "vehicle": "car truck bus train tram bicycle motorcycle airplane helicopter ship boat ferry taxi van scooter",
    "food": "bread cheese butter soup salad rice pasta pizza cake apple banana orange onion carrot potato tomato honey",
}
"""Most words come a few times in 200 rows: who knows what they mean needs fewer of them."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, minilm_dir: Path, base_of: Callable[[str], Path]) -> Path:
    """minilm, random (its tokenizer, random weights), broken (no weights), speaker and stutterer (decoders)."""
    import torch
    import transformers

    root = tmp_path_factory.mktemp("bases")
    shutil.copytree(minilm_dir, root / "minilm")
    for name in ("random", "broken"):
        (root / name).mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(minilm_dir / file, root / name / file)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    torch.manual_seed(0)
    config = transformers.BertConfig(**sizes, vocab_size=30522)
    transformers.BertModel(config).save_pretrained(root / "random")
    config.save_pretrained(root / "broken")
    shutil.copytree(base_of("llama"), root / "speaker")
    shutil.copytree(root / "speaker", root / "stutterer")
    speaker = transformers.AutoConfig.from_pretrained(root / "speaker")
    transformers.AutoModelForCausalLM.from_config(speaker).save_pretrained(root / "stutterer")
    return root


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _fields(count: int = 200) -> list[dict[str, Any]]:
    draw = random.Random(1)
    found = []
    for number in range(count):
        label = draw.choice(sorted(_FIELDS))
        word = draw.choice(_FIELDS[label].split())
        found.append({"body": f"note {number}: we saw a {word} there", "intent": label})
    return found


def _advise(*arguments: str, bases: Path, names: str) -> int:
    models = ",".join(str(bases / name) for name in names.split(","))
    return main(["advise", "--models", models, *arguments])


def test_the_base_that_knows_the_words_is_recommended_and_a_broken_one_listed(
    here: Path, bases: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = _written(here / "rows.jsonl", _fields())
    task = (
        "--data",
        data,
        "--task",
        "text-classification",
        "--columns",
        "text=body,label=intent",
        "--max-length",
        "32",
    )
    assert (
        _advise(
            *task,
            bases=bases,
            names="random,minilm,broken",
        )
        == ExitCode.DONE
    )
    said = capsys.readouterr().out
    listed, reason, job = said.split("\n\n")
    lines = listed.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["base", str(bases / "random"), str(bases / "minilm")]
    assert "apache-2.0" in lines[2]
    assert lines[3].startswith(f"{bases / 'broken'}: ")
    assert "model.safetensors is missing" in lines[3]
    assert reason.startswith(f"{bases / 'minilm'} has the best f1 of the probe")
    found, problems = load_job(job.encode(), name="job")
    assert not problems
    assert found is not None
    assert found.spec.model.uri == (bases / "minilm").as_uri()
    assert yaml.safe_load(job)["spec"]["task"]["columns"] == {"text": "body", "label": "intent"}


def test_of_decoders_the_one_that_needs_fewer_bits_for_the_text_is_recommended(
    here: Path, bases: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = _written(here / "rows.jsonl", marching(random.Random(1), 200))
    arguments = ("--data", data, "--task", "causal-lm", "--max-length", "32", "--json")
    assert _advise(*arguments, bases=bases, names="stutterer,speaker,minilm") == ExitCode.DONE
    document = json.loads(capsys.readouterr().out)
    stutterer, speaker, minilm = document["bases"]
    assert speaker["score"]["metric"] == "bits per byte"
    assert speaker["score"]["high"] < stutterer["score"]["low"]
    assert 0 < speaker["score"]["value"] < 8
    assert document["recommended"] == speaker["model"] == document["job"]["spec"]["model"]["uri"]
    assert minilm["refused"]
    for found in (stutterer, speaker):
        assert found["seconds_per_epoch"] > 0
        assert found["memory"] > found["size_bytes"] > 0
        assert found["parameters"] > 0
        assert found["tokens_mean"] <= found["tokens_p95"]


def test_what_is_wrong_with_the_rows_ends_it_in_a_sentence(
    here: Path, bases: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = _written(here / "rows.jsonl", _fields(20))
    assert _advise("--data", data, "--task", "text-classification", bases=bases, names="random") == ExitCode.INVALID
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "'text'" in shown.err
    assert "Traceback" not in shown.err


def test_rows_that_are_not_there_end_it_with_the_code_of_storage(
    here: Path, bases: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = _advise("--data", "nothing.jsonl", "--task", "text-classification", bases=bases, names="random")
    assert code == ExitCode.STORAGE
    assert "nothing.jsonl" in capsys.readouterr().err


def test_where_no_base_can_be_used_nothing_is_recommended(
    here: Path, bases: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = _written(here / "rows.jsonl", _fields(40))
    arguments = ("--data", data, "--task", "text-classification", "--columns", "text=body,label=intent")
    assert _advise(*arguments, bases=bases, names="broken") == ExitCode.INVALID
    assert "None of the bases can be used." in capsys.readouterr().out


def test_what_no_job_may_say_is_refused_as_in_a_job(
    here: Path, bases: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = _written(here / "rows.jsonl", _fields(40))
    code = _advise("--data", data, "--task", "causal-lm", "--method", "head", bases=bases, names="random")
    assert code == ExitCode.INVALID
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("spec: method head does not go with causal-lm")


def test_columns_are_given_as_roles_and_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["advise", "--data", "x", "--task", "causal-lm", "--models", "y", "--columns", "text"])
    assert "text=body,label=intent" in capsys.readouterr().err
