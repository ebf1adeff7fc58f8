"""Pretrains a small decoder from random weights with `finetune run`, and writes it to tests/assets/tiny-decoder.

What it learns from (hack/prose.py makes it, on a Debian machine, without a download): docstrings of Python's standard
library and of scientific packages, and names with one-line descriptions of Debian packages. Of the packages of any test
row of the examples, and of the topics of Python's documentation, it sees nothing.

    nice -n 5 python hack/tiny-models/decoder.py [--steps N] [--work DIRECTORY]
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "hack"))
from demo import published  # noqa: E402
from prose import docstrings, in_tests, mixed, packages, write  # noqa: E402

ASSET = ROOT / "tests/assets/tiny-decoder"
SEED = 17
SPECIAL = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
"""The last two are for chats: nothing that it is pretrained on holds them."""
VOCABULARY = 3072
LENGTH = 128
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Pretrain the small decoder of tests and examples")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--work", type=Path, default=ROOT / ".work/tiny-decoder")
    arguments = parser.parse_args()
    work: Path = arguments.work.absolute()
    texts = make_texts()
    rows = write(work / "train.jsonl", [{"text": text} for text in texts])
    make_base(work / "base", texts)
    path = work / "job.yaml"
    path.write_text(yaml.safe_dump(job(work, rows, steps=arguments.steps), sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "finetune_trainer", "run", str(path), "--work", str(work / "scratch")]
    code = subprocess.run(command, check=False).returncode
    if code == 0:
        keep(published(work / "output"), texts=len(texts), steps=arguments.steps)
    return code


def make_texts() -> list[str]:
    """Docstrings and descriptions, mixed, none of them of a family that has test rows."""
    prose = [text for text, module in docstrings() if not in_tests(module)]
    described = [f"{package.name}: {package.description}" for package in packages() if not package.tests]
    return [row["text"] for row in mixed({"text": text} for text in [*prose, *described])]


def make_base(directory: Path, texts: list[str]) -> None:
    """A tokenizer of the texts, and random weights."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[1],
        additional_special_tokens=list(SPECIAL[2:]),
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)
    torch.manual_seed(SEED)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(directory)


def job(work: Path, rows: Path, *, steps: int) -> dict[str, Any]:
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "tiny-decoder"},
        "spec": {
            "task": {"type": "causal-lm"},
            "model": {"uri": (work / "base").as_uri()},
            "data": {"train": [{"uri": rows.as_uri()}], "validation": {"fraction": 0.01}, "maxLength": LENGTH},
            "training": {
                "maxSteps": steps,
                "batchSize": 8,
                "microBatch": 8,
                "learningRate": 3e-3,
                "schedule": {"type": "cosine", "minimum": 0.05, "warmup": {"steps": 100}},
                "optimizer": {"type": "adamw", "weightDecay": 0.1, "betas": [0.9, 0.95]},
                "packing": True,
                "evaluateEvery": {"steps": max(1, steps // 4)},
            },
            "output": {"uri": (work / "output").as_uri()},
            "resources": {"perNode": {"gpus": 0}},
        },
    }


def keep(outcome: dict[str, Any], *, texts: int, steps: int) -> None:
    """The published model in half precision, with its recipe."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = Path(outcome["model"]["uri"].removeprefix("file://"))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float16)
    model.save_pretrained(ASSET)
    AutoTokenizer.from_pretrained(directory).save_pretrained(ASSET)
    metrics = outcome["evaluation"]["tuned"]
    card = f"""# tiny-decoder

A Llama of {sum(parameter.numel() for parameter in model.parameters()):,} weights in float16:
{SIZES["num_hidden_layers"]} layers of width {SIZES["hidden_size"]}, byte-level BPE of {VOCABULARY} tokens, output layer
tied to the embedding. A base for tests and examples, small enough to lie in the repository; good for nothing else.

Made by `python hack/tiny-models/decoder.py --steps {steps}`, that is by `finetune run` with task causal-lm from random
weights: {steps} steps of 8 packed sequences of {LENGTH} tokens, AdamW, peak learning rate 3e-3, cosine schedule, seed
{SEED}. {texts:,} texts: docstrings of Python and of scientific packages, names and descriptions of Debian packages.

Families of the examples' test rows (`in_tests` in hack/prose.py) are left out, and all topics of Python's
documentation. `<|im_start|>` and `<|im_end|>` are in the vocabulary and were never trained. On held-out rows: loss
{metrics["loss"]:.3f}, perplexity {metrics["perplexity"]:.1f}, token accuracy {metrics["token-accuracy"]:.3f}.
"""
    (ASSET / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
