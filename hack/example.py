"""`make example NAME=question-answering`: one of examples/*.yaml on this machine, without a cluster.

The document is the one in examples/, but that the buckets in it are directories here: the base models come out of an
installed package and out of tests/assets, the data out of what a bare machine has. Nothing is downloaded. Prints the
metrics of the tuned model beside those of its baselines; ends with 0 when the run has succeeded.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import arguments
import dataset
import digits
import names
import pairs
import prose
import questions
import yaml
from demo import base_model, published, say

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
WORK = ROOT / ".work/examples"
DATA: dict[str, Callable[[Path], object]] = {
    "arguments": arguments.make,
    "descriptions": partial(pairs.make, "translation"),
    "digits": digits.make,
    "docstrings": dataset.make,
    "instructions": partial(prose.make, "instructions"),
    "names": names.make,
    "preferences": partial(prose.make, "preferences"),
    "questions": partial(questions.make, rows=1000),
    "sentences": partial(names.make, rows=1000, test_rows=300),
    "summaries": partial(pairs.make, "summarization"),
    "text": partial(prose.make, "text"),
}
"""Directory in the bucket `data` -> what makes it."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(path.stem for path in EXAMPLES.glob("*.yaml") if is_job(path)))
    name = parser.parse_args().name
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    started = time.monotonic()
    work = WORK / name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    path = work / "job.yaml"
    text = here((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"), work)
    path.write_text(text, encoding="utf-8")
    say(f"document: {path.relative_to(ROOT)}\n\n{text}")
    command = [sys.executable, "-m", "finetune_trainer", "run", str(path), "--work", str(work / "scratch")]
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        say(f"finetune run ended with exit code {code}; what went wrong is said above")
        return code
    outcome = published(work / "output")
    show(outcome)
    say(f"model and report: {outcome['model']['uri']}; {time.monotonic() - started:.0f} s in all")
    return 0


def is_job(path: Path) -> bool:
    return "kind: FineTuneJob\n" in path.read_text(encoding="utf-8")


def here(text: str, work: Path) -> str:
    """The document with directories of this machine instead of buckets. What it reads is made where it is not there."""
    output = yaml.safe_load(text)["spec"]["output"]["uri"]
    text = text.replace(output, (work / "output").as_uri())
    for name, make in DATA.items():
        if f"s3://data/{name}/" in text:
            make(work / "data" / name)
            text = text.replace(f"s3://data/{name}/", f"{(work / 'data' / name).as_uri()}/")
    for name, path in bases().items():
        text = text.replace(f"s3://models/{name}}}", f"{path.as_uri()}}}")
    return text


def bases() -> dict[str, Path]:
    """Directory in the bucket `models` -> base model on this machine."""
    tiny = {path.name: path for path in (ROOT / "tests/assets").glob("tiny-*")}
    return {"minilm": base_model(), **tiny}


def show(outcome: dict[str, Any]) -> None:
    """The metrics, the tuned model's first."""
    evaluation = outcome["evaluation"]
    columns = [name for name in ("tuned", "base", "probe", "trivial") if evaluation.get(name)]
    print(
        f"\n{'on ' + str(evaluation['rows']) + ' ' + evaluation['on'] + ' rows':28}"
        + "".join(f"{c:>10}" for c in columns)
    )
    for metric in evaluation["tuned"]:
        values = [evaluation[column].get(metric) for column in columns]
        print(f"  {metric:26}" + "".join(f"{'' if v is None else format(v, '.3f'):>10}" for v in values))


if __name__ == "__main__":
    sys.exit(main())
