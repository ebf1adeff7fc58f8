"""Rows a second in training, beside transformers.Trainer: the same model, rows, batch size, precision and threads."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROWS, BATCH, LENGTH, ROUNDS = 640, 16, 64, 3
"""One epoch; the micro-batch is the batch, so that both do the same arithmetic a step."""


def run(scratch: Path) -> str:
    """The section of the report."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "hack"))
    from dataset import make
    from demo import base_model

    train, _ = make(scratch / "data", rows=ROWS, test_rows=50)
    speeds: dict[str, list[float]] = {"ours": [], "transformers.Trainer": []}
    for number in range(ROUNDS):
        print(f"training: round {number + 1} of {ROUNDS}", file=sys.stderr, flush=True)
        speeds["ours"].append(_ours(scratch / f"ours-{number}", base_model(), train))
        speeds["transformers.Trainer"].append(_theirs(base_model(), train))
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    lines = [
        f"## Full fine-tuning of MiniLM, {ROWS} rows of at most {LENGTH} tokens, batch {BATCH}, fp32 on the CPU",
        "",
        f"Median of {ROUNDS}; loading, evaluation and saving are left out on both sides, checkpoints are not due.",
        "",
        "| | rows/s | ratio |",
        "|-|-:|-:|",
        *(f"| {n} | {v:.1f} | {v / medians['transformers.Trainer']:.2f} |" for n, v in medians.items()),
    ]
    return "\n".join(lines)


def _ours(work: Path, model: Path, train: Path) -> float:
    """Preflight and train by the command lines that pods use; the speed is the one that /progress shows."""
    config, run_id = prepare(work, document(work, model, train))
    command = [sys.executable, "-m", "finetune_trainer", "train", "--config", str(config), "--run-id", run_id]
    _output([*command, "--message", str(work / "message.json"), "--work", str(work / "work"), "--port", "0"])
    progress = json.loads((work / "work/state/progress.json").read_text())
    return float(progress["samplesPerSecond"])


def prepare(work: Path, content: dict[str, Any]) -> tuple[Path, str]:
    """Let preflight do its part; the config's path and the run's id."""
    work.mkdir(parents=True)
    (work / "job.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    program = """
import json, sys, uuid
from pathlib import Path
from finetune_api.resolve import Defaults, resolve
from finetune_api.profile import FineTuneProfileSpec
from finetune_api.validate import load_job
job, problems = load_job(Path(sys.argv[1]).read_text(), name="job.yaml")
assert job is not None, problems
config = resolve(job.spec, FineTuneProfileSpec(), job="bench/bench", job_uid=uuid.uuid4().hex, generation=1,
                 defaults=Defaults("", "", in_cluster=False))
print(config.model_dump_json(by_alias=True))
"""
    config = work / "config.json"
    config.write_text(_output([sys.executable, "-c", program, str(work / "job.yaml")]), encoding="utf-8")
    command = [sys.executable, "-m", "finetune_trainer", "preflight", "--config", str(config)]
    _output([*command, "--message", str(work / "message.json"), "--work", str(work / "work")])
    return config, str(json.loads((work / "message.json").read_text())["runId"])


def document(work: Path, model: Path, train: Path) -> dict[str, Any]:
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "bench"},
        "spec": {
            "task": {"type": "text-classification"},
            "model": {"uri": model.as_uri()},
            "data": {"train": [{"uri": train.as_uri()}], "maxLength": LENGTH, "validation": {"fraction": 0.05}},
            "training": {"epochs": 1, "batchSize": BATCH, "microBatch": BATCH},
            "output": {"uri": (work / "output").as_uri()},
        },
    }


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode != 0:
        raise RuntimeError(f"{command[:4]} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout


def _theirs(model: Path, train: Path) -> float:
    return float(_output([sys.executable, "-m", "bench.training", str(model), str(train)]).splitlines()[-1])


def _trainer(model: str, train: Path) -> None:
    """In the child: transformers.Trainer as its guide sets it up for this task."""
    import tempfile

    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    rows = [json.loads(line) for line in train.read_text(encoding="utf-8").splitlines()]
    labels = sorted({row["label"] for row in rows})
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=LENGTH)
    data = [
        {"input_ids": ids, "attention_mask": mask, "labels": labels.index(row["label"])}
        for ids, mask, row in zip(encoded["input_ids"], encoded["attention_mask"], rows, strict=True)
    ]
    net = AutoModelForSequenceClassification.from_pretrained(model, num_labels=len(labels))
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH,
            learning_rate=2e-5,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(net, arguments, train_dataset=data, data_collator=DataCollatorWithPadding(tokenizer))
        print(trainer.train().metrics["train_samples_per_second"])


if __name__ == "__main__":
    _trainer(sys.argv[1], Path(sys.argv[2]))
