"""Pretrains a small encoder-decoder from random weights with `finetune run`, and writes it to tests/assets/tiny-marian.

First it learns to copy words drawn by chance, in which there is no language to fall back on: only so does the decoder
learn within minutes to look at the encoder (Wu et al. 2021, "LIME", pretrain on such tasks, too). Then it reads and
writes texts.

What it learns from (hack/pairs.py makes it, on a Debian machine, without a hub): one-line descriptions of Debian
packages in English and German, translated both ways and with words hidden; docstrings and their first lines. Of the
packages that the translation example is about, and of the test rows of summaries, it sees nothing at all.

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
from pairs import DOMAIN, PRETRAINED, Row, descriptions, docstrings, write  # noqa: E402

ASSET = ROOT / "tests/assets/tiny-marian"
SEED = 17
SPECIAL = ("<pad>", "</s>", "<unk>", "<mask>", ">>de<<", ">>en<<")
VOCABULARY = 6000
HIDDEN = 0.3
"""Share of the words that are hidden."""
SUMMARIZE = "summarize: "
COPIED, COPY_STEPS = 20_000, 300
SIZES = {
    "vocab_size": VOCABULARY,
    "decoder_vocab_size": VOCABULARY,
    "d_model": 256,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 512,
    "decoder_ffn_dim": 512,
    "max_position_embeddings": 256,
    "dropout": 0.1,
    "init_std": 0.06,
    "scale_embedding": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    "task_specific_params": {"summarization": {"prefix": SUMMARIZE}},
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Pretrain the small encoder-decoder of tests and examples")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--work", type=Path, default=ROOT / ".work/tiny-marian")
    arguments = parser.parse_args()
    work: Path = arguments.work
    files = make_data(work / "data")
    make_base(work / "base", files)
    copied = work / "data/copied.jsonl"
    write(copied, list(_copied(work / "base")), ("source", "target"))
    first = job(work / "copying", work / "base", {"copied": copied}, steps=COPY_STEPS)
    first["spec"]["training"]["dropout"] = 0.0  # as nothing can be learned by heart
    code, outcome = run(first, work / "copying")
    if code == 0:
        base = Path(outcome["model"]["uri"].removeprefix("file://"))
        code, outcome = run(job(work / "texts", base, files, steps=arguments.steps), work / "texts")
    if code == 0:
        keep(outcome, files, steps=arguments.steps)
    return code


def run(document: dict[str, Any], work: Path) -> tuple[int, dict[str, Any]]:
    """The exit code, and what was published."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "job.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "finetune_trainer", "run", str(path), "--work", str(work / "scratch")]
    code = subprocess.run(command, check=False).returncode
    return code, published(work / "output") if code == 0 else {}


# --- data ---


def make_data(directory: Path) -> dict[str, Path]:
    """The files of rows by name."""
    pairs, summaries = descriptions(directory / "apt"), docstrings()
    kept = {text for row in pairs if row.kind in DOMAIN for text in (row.source, row.target)}
    pairs = [row for row in pairs if row.kind not in DOMAIN and not kept & {row.source, row.target}]
    summaries = [row for row in summaries if not row.tests][:PRETRAINED]
    texts = [text for row in pairs for text in (row.source, row.target)]
    rows = {
        "forward": [_swapped(row, f">>de<< {row.source}", row.target) for row in pairs],
        "backward": [_swapped(row, f">>en<< {row.target}", row.source) for row in pairs],
        "hidden": list(_hidden(texts)),
        "summaries": [_swapped(row, SUMMARIZE + row.source, row.target) for row in summaries],
    }
    return {name: write(directory / f"{name}.jsonl", found, ("source", "target")) for name, found in rows.items()}


def _swapped(row: Row, source: str, target: str) -> Row:
    return Row(source, target, family=row.family, kind=row.kind)


def _copied(base: Path) -> Iterator[Row]:
    """Words of one token each, drawn by chance, to be written as they are."""
    from tokenizers import Tokenizer

    draw, tokenizer = random.Random(SEED), Tokenizer.from_file(str(base / "tokenizer.json"))
    words = sorted(token[1:] for token in tokenizer.get_vocab() if token[0] == "\u0120" and token[1:].isascii())
    words = [word for word in words if word.isalpha()]
    for _ in range(COPIED):
        text = " ".join(draw.choices(words, k=draw.randint(4, 16)))
        yield Row(text, text, family="", kind="")


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
    from transformers import MarianConfig, MarianMTModel, PreTrainedTokenizerFast

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
    MarianMTModel(MarianConfig(**SIZES)).save_pretrained(directory)


def _rows(files: dict[str, Path]) -> Iterator[dict[str, str]]:
    for path in files.values():
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def job(work: Path, base: Path, files: dict[str, Path], *, steps: int) -> dict[str, Any]:
    weights = {"forward": 0.5}
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "tiny-marian"},
        "spec": {
            "task": {"type": "translation"},
            "model": {"uri": base.as_uri()},
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
                "learningRate": 1e-3,
                "dropout": SIZES["dropout"],
                "schedule": {"type": "cosine", "minimum": 0.02, "warmup": {"steps": 100}},
                "evaluateEvery": {"steps": 1000},
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
    card = f"""# tiny-marian

A Marian of {sum(parameter.numel() for parameter in model.parameters()):,} weights in float16: {SIZES["encoder_layers"]}
encoder and {SIZES["decoder_layers"]} decoder layers of width {SIZES["d_model"]}, byte-level BPE of {VOCABULARY} tokens.
A base for tests and examples, small enough to lie in the repository; good for nothing else.

Made by `python hack/tiny-models/encoder_decoder.py --steps {steps}`, that is by `finetune run` from random weights:
{COPY_STEPS} steps in which it copies words drawn by chance, then {steps} on texts, of 64 rows each, AdamW, peak
learning rate 1e-3, cosine schedule, seed {SEED}. Rows: {counts}.

- `>>de<<` or `>>en<<` in front of a text: translate it into German or English (one-line descriptions of Debian
  packages, but none for programmers, which the example is about)
- `<mask>` for runs of words: write the text out
- `{SUMMARIZE}` in front of the body of a docstring and a signature: its first line

Test rows of the examples (hack/pairs.py) are left out. On held-out rows: loss {metrics["loss"]:.3f}, token
accuracy {metrics["token-accuracy"]:.3f}.
"""
    (ASSET / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
