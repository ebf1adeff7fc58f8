"""Pretrains a small encoder-decoder from random weights with `finetune run`, and writes it to tests/assets/tiny-t5.

What it learns from (hack/pairs.py makes it, on a Debian machine, without a hub): one-line descriptions of Debian
packages in English and German, translated both ways and with words hidden; docstrings and their first lines. Of the
packages that the translation example is about it sees no English text translated into German, and of any test row it
sees nothing at all.

    nice -n 5 python hack/tiny-models/encoder_decoder.py [--steps N] [--work DIRECTORY]
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "hack"))
from demo import published  # noqa: E402
from pairs import DOMAIN, Row, descriptions, docstrings, write  # noqa: E402

ASSET = ROOT / "tests/assets/tiny-t5"
SEED = 17
SPECIAL = ("<pad>", "</s>", "<unk>", "<mask>", ">>de<<", ">>en<<")
VOCABULARY = 6000
SUMMARIES = 6000
HIDDEN = 0.3
"""Share of the words that are hidden."""
SUMMARIZE = "summarize: "
SIZES = {
    "vocab_size": VOCABULARY,
    "d_model": 256,
    "d_kv": 64,
    "d_ff": 512,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.1,
    "n_positions": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "task_specific_params": {"summarization": {"prefix": SUMMARIZE}},
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Pretrain the small encoder-decoder of tests and examples")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--work", type=Path, default=ROOT / ".work/tiny-t5")
    arguments = parser.parse_args()
    work: Path = arguments.work
    files = make_data(work / "data")
    make_base(work / "base", files)
    path = work / "job.yaml"
    path.write_text(yaml.safe_dump(job(work, files, steps=arguments.steps), sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "finetune_trainer", "run", str(path), "--work", str(work / "scratch")]
    code = subprocess.run(command, check=False).returncode
    if code == 0:
        keep(published(work / "output"), files, steps=arguments.steps)
    return code


# --- data ---


def make_data(directory: Path) -> dict[str, Path]:
    """The files of rows by name."""
    pairs, summaries = descriptions(directory / "apt"), docstrings()
    tested = {text for row in pairs if row.tests and row.kind in DOMAIN for text in (row.source, row.target)}
    pairs = [row for row in pairs if not row.tests and not tested & {row.source, row.target}]
    summaries = [row for row in summaries if not row.tests][:SUMMARIES]
    forward = [row for row in pairs if row.kind not in DOMAIN]
    texts = [text for row in pairs for text in (row.source, row.target)]
    rows = {
        "forward": [_swapped(row, f">>de<< {row.source}", row.target) for row in forward],
        "backward": [_swapped(row, f">>en<< {row.target}", row.source) for row in pairs],
        "hidden": list(_hidden(texts)),
        "summaries": [_swapped(row, SUMMARIZE + row.source, row.target) for row in summaries],
    }
    return {name: write(directory / f"{name}.jsonl", found, ("source", "target")) for name, found in rows.items()}


def _swapped(row: Row, source: str, target: str) -> Row:
    return Row(source, target, family=row.family, kind=row.kind)


def _hidden(texts: list[str]) -> Iterator[Row]:
    """Texts with runs of words hidden behind one mask each (Lewis et al. 2019), to be written out whole."""
    draw = random.Random(SEED)
    for text in sorted(set(texts)):
        words, shown = text.split(), list[str]()
        if len(words) > 2:
            while words:
                if draw.random() < HIDDEN / 2:
                    shown.append("<mask>")
                    del words[: draw.choice((1, 2, 3))]
                else:
                    shown.append(words.pop(0))
            yield Row(" ".join(shown), text, family="", kind="")


# --- model ---


def make_base(directory: Path, files: dict[str, Path]) -> None:
    """A tokenizer of the data, and random weights."""
    import torch
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    texts = [row[name] for row in _rows(files) for name in ("source", "target")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        additional_special_tokens=list(SPECIAL[4:]),
    ).save_pretrained(directory)
    torch.manual_seed(SEED)
    T5ForConditionalGeneration(T5Config(**SIZES)).save_pretrained(directory)


def _rows(files: dict[str, Path]) -> Iterator[dict[str, str]]:
    for path in files.values():
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def job(work: Path, files: dict[str, Path], *, steps: int) -> dict[str, Any]:
    weights = {"forward": 4.0}
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "tiny-t5"},
        "spec": {
            "task": {"type": "translation"},
            "model": {"uri": (work / "base").as_uri()},
            "data": {
                "train": [
                    {"uri": path.as_uri(), **({"weight": weights[name]} if name in weights else {})}
                    for name, path in files.items()
                ],
                "validation": {"fraction": 0.02},
                "maxLength": 80,
                "maxTargetLength": 48,
            },
            "training": {
                "maxSteps": steps,
                "batchSize": 64,
                "microBatch": 64,
                "learningRate": 2e-3,
                "schedule": {"type": "cosine", "minimum": 0.05, "warmup": {"steps": 100}},
                "evaluateEvery": {"steps": 300},
            },
            "evaluation": {"primary": "loss"},
            "generation": {"maxNewTokens": 32},
            "output": {"uri": (work / "output").as_uri()},
            "resources": {"perNode": {"gpus": 0}},
        },
    }


# --- result ---


def keep(outcome: dict[str, Any], files: dict[str, Path], *, steps: int) -> None:
    """The published model in half precision, with its recipe."""
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    directory = Path(outcome["model"]["uri"].removeprefix("file://"))
    model = AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=torch.float16)
    model.save_pretrained(ASSET)
    AutoTokenizer.from_pretrained(directory).save_pretrained(ASSET)
    counts = ", ".join(f"{name} {sum(1 for _ in _rows({name: path}))}" for name, path in files.items())
    metrics = outcome["evaluation"]["tuned"]
    card = f"""# tiny-t5

A T5 of {sum(parameter.numel() for parameter in model.parameters()):,} weights in float16: {SIZES["num_layers"]} encoder
and {SIZES["num_decoder_layers"]} decoder layers of width {SIZES["d_model"]}, byte-level BPE of {VOCABULARY} tokens.
A base for tests and examples, small enough to lie in the repository; good for nothing else.

Made by `python hack/tiny-models/encoder_decoder.py --steps {steps}`, that is by `finetune run` from random weights:
{steps} steps of 64 rows, AdamW, peak learning rate 2e-3, cosine schedule, seed {SEED}. Rows: {counts}.

- `>>de<<` or `>>en<<` in front of a text: translate it into German or English (one-line descriptions of Debian
  packages; into German none of libraries, which the example is about)
- `<mask>` for runs of words: write the text out
- `{SUMMARIZE}` in front of the body of a docstring and a signature: its first line

Families of test rows (`tests` in hack/pairs.py) are left out. On held-out rows: loss {metrics["loss"]:.3f}, token
accuracy {metrics["token-accuracy"]:.3f}.
"""
    (ASSET / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
