"""One entry a task: tiny bases, 300 rows that can be learned, and the margin a tuned model must have.

The matrix asks of every task and method whether training works at all, on one process and on two: whether the metric
on rows never seen beats the baseline by the margin that stands here. Bases are real classes of transformers, pretrained
for seconds and so small that a cell takes seconds; what they can learn in 300 rows is small, and so are some margins.
"""

import fcntl
import hashlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune_api.tasks import MethodType, TaskType

ROWS, TEST_ROWS = 300, 100
PRETRAIN_STEPS = 400
PRETRAIN_WRITER_STEPS = 1200
PRETRAIN_IMAGES = 3000
WORDS = tuple(f"{first}{last}" for first in ("al", "be", "ga", "de", "ep", "ze") for last in ("pha", "ta", "mma"))
COLOURS = ("red", "green", "blue")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[BOS]", "[EOS]")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """How a task is tried."""

    bases: tuple[str, ...]
    """Names in BASES; each method takes the next."""
    rows: Callable[[random.Random, int], Rows]
    over: str
    """The baseline to beat: trivial, base or probe."""
    margin: float
    """In the direction of the primary metric."""
    spec: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[MethodType, str] = field(default_factory=dict)
    """The base of a method that some of the bases cannot take, or learn too little by."""
    knobs: Mapping[MethodType, Mapping[str, Any]] = field(default_factory=dict)
    """Fields of spec.method."""
    rates: Mapping[MethodType, float] = field(default_factory=dict)
    """Learning rates other than those of most tasks."""
    epochs: Mapping[MethodType, float] = field(default_factory=dict)
    """Of methods that learn enough in fewer than others, or need more."""
    margins: Mapping[MethodType, float] = field(default_factory=dict)
    """Of methods that learn less in so few steps."""
    metrics: tuple[str, ...] = ()
    """What is measured in place of the primary metric: each has to beat the baseline."""


# --- rows ---


def coloured(draw: random.Random, count: int) -> Rows:
    """Which of three words is in the text."""
    found = []
    for _ in range(count):
        colour = draw.choice(COLOURS)
        words = [draw.choice(WORDS) for _ in range(draw.randint(2, 9))]
        words.insert(draw.randint(0, len(words)), colour)
        found.append({"text": " ".join(words), "label": colour})
    return found


def marching(draw: random.Random, count: int) -> Rows:
    """Walks in which each word is the fifth after the one before it, two a sentence, so that hardly any sentence comes
    twice; the base knows steps of other lengths, too."""
    return [{"text": " ".join(_walk(draw, 5) + _walk(draw, 5))} for _ in range(count)]


def continued(draw: random.Random, count: int) -> Rows:
    """Told a walk in steps of 5 and the first word of another one, the assistant goes on with it."""
    found = []
    for _ in range(count):
        told, (start, *rest) = _walk(draw, 5), _walk(draw, 5)
        found.append({"prompt": " ".join([*told, start]), "completion": " ".join(rest)})
    return found


def preferred(draw: random.Random, count: int) -> Rows:
    """To go on in steps of 5 is better than in those of another length, which the base knows, too."""
    found = []
    for _ in range(count):
        told, (start, *right) = _walk(draw, 5), _walk(draw, 5)
        _, *wrong = _walk(draw, draw.choice((1, 11)), start)
        found.append({"prompt": " ".join([*told, start]), "chosen": " ".join(right), "rejected": " ".join(wrong)})
    return found


def rewritten(source: str, target: str) -> Callable[[random.Random, int], Rows]:
    """Four words go on from a walk in steps of 5; the base goes on in steps of any length."""

    def rows(draw: random.Random, count: int) -> Rows:
        found = []
        for _ in range(count):
            told = _walk(draw, draw.choice((1, 5, 11)))
            found.append({source: " ".join(told), target: " ".join(_stepped(told[-1], 5, 4))})
        return found

    return rows


def _stepped(last: str, step: int, count: int) -> list[str]:
    """So many words after the last one."""
    words = sorted({*WORDS, *COLOURS})
    return [words[(words.index(last) + step * place) % len(words)] for place in range(1, count + 1)]


def _walk(draw: random.Random, step: int, start: str | None = None) -> list[str]:
    """Words each of which is so many words after the one before it."""
    words = sorted({*WORDS, *COLOURS})
    first = draw.randrange(len(words)) if start is None else words.index(start)
    return [words[(first + step * place) % len(words)] for place in range(draw.randint(3, 6))]


def tagged(draw: random.Random, count: int) -> Rows:
    """Words that begin alike are entities of one kind."""
    kinds = {"al": "B-one", "be": "B-two"}
    rows = [[draw.choice(WORDS) for _ in range(draw.randint(3, 9))] for _ in range(count)]
    return [{"tokens": words, "tags": [kinds.get(word[:2], "O") for word in words]} for words in rows]


def asked(draw: random.Random, count: int) -> Rows:
    """The answer is one of three words of the context."""
    return [
        {"question": draw.choice(WORDS), "context": row["text"], "answers": row["label"]}
        for row in coloured(draw, count)
    ]


SIDE = 16
"""Pixels of both sides of an image."""
SHAPES = ("disc", "ring", "square", "cross", "triangle", "bars")

_DARK = bytes(value * 110 // 256 for value in range(256))


def drawn(draw: random.Random, shape: str) -> bytes:
    """A PNG of a shape somewhere in noise, in some colour on a darker one."""
    from PIL import Image, ImageDraw

    image = Image.frombytes("RGB", (SIDE, SIDE), draw.randbytes(3 * SIDE * SIDE).translate(_DARK))
    size = draw.randint(9, SIDE - 2)
    left, top = draw.randint(0, SIDE - size - 1), draw.randint(0, SIDE - size - 1)
    right, bottom, third = left + size, top + size, size // 3
    colour = tuple(draw.randint(150, 255) for _ in range(3))
    pen = ImageDraw.Draw(image)
    match shape:
        case "disc":
            pen.ellipse((left, top, right, bottom), fill=colour)
        case "ring":
            pen.ellipse((left, top, right, bottom), outline=colour, width=2)
        case "square":
            pen.rectangle((left, top, right, bottom), fill=colour)
        case "cross":
            pen.rectangle((left + third, top, right - third, bottom), fill=colour)
            pen.rectangle((left, top + third, right, bottom - third), fill=colour)
        case "triangle":
            pen.polygon(((left, bottom), (right, bottom), ((left + right) // 2, top)), fill=colour)
        case _:
            for row in range(top, bottom + 1, 4):
                pen.rectangle((left, row, right, row + 1), fill=colour)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def pictured(draw: random.Random, count: int) -> Rows:
    """Which of three shapes is in the image; the base has seen others, too."""
    labels = [draw.choice(SHAPES[1:4]) for _ in range(count)]
    return [{"image": drawn(draw, label), "label": label} for label in labels]


def both(draw: random.Random, count: int) -> Rows:
    """Rows of two tasks that read other columns: which of three words is in a text, and which words begin alike."""
    return [{**one, **other} for one, other in zip(coloured(draw, count), tagged(draw, count), strict=True)]


_SMALL = {"training": {"batchSize": 2}}
"""Where rows are packed: few sequences are left."""


_BY_BART: Mapping[MethodType, str] = {"adapter": "bart", "ia3": "bart", "prompt": "bart", "prefix": "bart"}
_SHORT_PROMPT: Mapping[MethodType, Mapping[str, Any]] = {"prompt": {"virtualTokens": 2}}
"""Rows have five words in the mean: twenty learned tokens would drown them."""
_WRITERS: Mapping[str, Any] = {"only": _BY_BART, "knobs": _SHORT_PROMPT, "rates": {"prefix": 1e-1}}
_WRITTEN = {"generation": {"maxNewTokens": 8}, "training": {"epochs": 6.0}}


def counted(draw: random.Random, count: int) -> Rows:
    """A number that depends on one word."""
    worth = {"red": 10.0, "green": 20.0, "blue": 40.0}
    return [{"text": row["text"], "value": worth[row["label"]]} for row in coloured(draw, count)]


KINDS: Mapping[TaskType, Kind] = {
    "text-classification": Kind(("bert", "roberta", "distilbert"), coloured, "trivial", 0.2, only={"prefix": "bert"}),
    "token-classification": Kind(
        ("bert", "roberta", "distilbert"),
        tagged,
        "trivial",
        0.2,
        {"training": {"epochs": 6.0}},
        only={"prefix": "bert"},
    ),
    "regression": Kind(("bert", "roberta", "distilbert"), counted, "trivial", 0.2, only={"prefix": "bert"}),
    "summarization": Kind(("bart", "t5"), rewritten("text", "summary"), "base", 0.3, _WRITTEN, **_WRITERS),
    "translation": Kind(("t5", "bart"), rewritten("source", "target"), "base", 30.0, _WRITTEN, **_WRITERS),
    "causal-lm": Kind(
        ("llama", "gpt2"),
        marching,
        "base",
        0.3,
        _SMALL,
        only={"prefix": "llama", "qlora": "llama"},
        epochs={"prompt": 2.0, "prefix": 2.0},  # packs are not for them: four times the batches of the others
    ),
    "instruction": Kind(
        ("llama", "gpt2"),
        continued,
        "base",
        0.3,
        {"training": {"batchSize": 4}, "generation": {"maxNewTokens": 8}},
        only={"prefix": "llama", "qlora": "llama"},
    ),
    "preference": Kind(
        ("llama", "gpt2"),
        preferred,
        "base",
        0.2,
        {"task": {"beta": 0.5}},
        only={"prefix": "llama", "qlora": "llama"},
    ),
    "question-answering": Kind(
        ("bert", "roberta", "distilbert"), asked, "trivial", 0.2, {"training": {"epochs": 8.0}}, only={"prefix": "bert"}
    ),
    "image-classification": Kind(
        ("vit", "resnet"),
        pictured,
        "trivial",
        0.6,  # the probe, which method head comes close to, is far above the most frequent shape, too
        {"training": {"epochs": 6.0}},
        only={"qlora": "vit", "adapter": "vit", "ia3": "vit"},
        epochs={"adapter": 12.0},  # after six it is at the margin on some processors, far above it on others
    ),
    "multi-task": Kind(
        ("bert", "roberta", "distilbert"),
        both,
        "trivial",
        0.2,
        {
            "task": {
                "tasks": [
                    {"name": "colour", "type": "text-classification"},
                    {"name": "tags", "type": "token-classification"},
                ]
            },
            "training": {"epochs": 6.0},
        },
        only={"prefix": "bert"},
        metrics=("colour.f1", "tags.f1"),
    ),
}


# --- bases ---


def words_tokenizer(directory: Path) -> int:
    """Save a tokenizer that knows the words above; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *sorted({*WORDS, *COLOURS})))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(directory)
    return len(vocabulary)


_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 66,
    "pad_token_id": 0,
}
BASES: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", _ENCODER),
    "roberta": ("RobertaModel", "RobertaConfig", _ENCODER),
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_ENCODER, "num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 3},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 66,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": 32,
            "d_kv": 16,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 2,
            "n_positions": 66,
            "pad_token_id": 0,
            "eos_token_id": 3,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 66,
            "init_std": 0.1,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "forced_eos_token_id": None,
            "decoder_start_token_id": 2,
        },
    ),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 66, "pad_token_id": 0},
    ),
    "vit": (
        "ViTModel",
        "ViTConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": SIDE,
            "patch_size": 4,
        },
    ),
    "resnet": (
        "ResNetModel",
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"},
    ),
}


IMAGE_BASES = ("vit", "resnet")

CACHE = Path(os.environ.get("FINETUNE_CACHE", Path.home() / ".cache/finetune-operator")) / "bases"


def kept_base(name: str) -> Path:
    """The directory of a base, to be read only. It is made once on a machine, as long as this file and the libraries
    stay as they are; whoever else asks meanwhile waits."""
    versions = [version(library) for library in ("tokenizers", "torch", "transformers")]
    root = CACHE / hashlib.sha256("\n".join([Path(__file__).read_text(), *versions]).encode()).hexdigest()[:16]
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / name).exists():
            shutil.rmtree(root / f"{name}.new", ignore_errors=True)  # of a process that ended in its midst
            make_base(name, root / f"{name}.new").rename(root / name)
    return root / name


def make_base(name: str, directory: Path) -> Path:
    """A model that knows a little, the same each time, and its tokenizer."""
    import torch
    import transformers

    directory.mkdir(parents=True)
    kind, config, sizes = BASES[name]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if name in IMAGE_BASES:
        model = getattr(transformers, kind)(getattr(transformers, config)(**sizes))
        images_processor(directory)
        pretrain_on_images(model)
        model.save_pretrained(directory)
        return directory
    size = words_tokenizer(directory)
    model = getattr(transformers, kind)(getattr(transformers, config)(vocab_size=size, **sizes))
    pretrain = pretrain_encoder
    if kind.endswith(("CausalLM", "LMHeadModel")):
        pretrain = pretrain_decoder
    elif kind.endswith("ConditionalGeneration"):
        pretrain = pretrain_writer
    pretrain(model, size)
    model.save_pretrained(directory)
    return directory


def pretrain_encoder(model: Any, size: int) -> None:
    """Some seconds of pretraining, without which nothing that is frozen would be worth anything: the first position
    learns which words are in a text, every position which word comes next."""
    import torch

    draw = torch.Generator().manual_seed(1)
    present, following = torch.nn.Linear(32, size), torch.nn.Linear(32, size)
    optimizer = torch.optim.AdamW([*model.parameters(), *present.parameters(), *following.parameters()], lr=3e-3)
    cross_entropy, binary = torch.nn.functional.cross_entropy, torch.nn.functional.binary_cross_entropy_with_logits
    model.train()
    for _ in range(PRETRAIN_STEPS):
        length = int(torch.randint(3, 12, (), generator=draw))
        words = torch.randint(len(SPECIAL), size, (32, length), generator=draw)
        ids = torch.cat([torch.full((32, 1), 2), words, torch.full((32, 1), 3)], dim=1)
        states = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        found = torch.zeros(32, size).scatter_(1, words, 1.0)
        loss = 5 * binary(present(states[:, 0]), found) + cross_entropy(following(states[:, :-1]).mT, ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def pretrain_decoder(model: Any, size: int) -> None:
    """Some seconds of pretraining: sentences whose words are 1, 5 or 11 words apart."""
    import torch

    draw = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    known, steps = size - len(SPECIAL), torch.tensor([1, 5, 11])
    model.train()
    for _ in range(PRETRAIN_STEPS):
        length = int(torch.randint(3, 7, (), generator=draw))
        first, step = torch.randint(known, (32, 1), generator=draw), steps[torch.randint(3, (32, 1), generator=draw)]
        words = len(SPECIAL) + (first + step * torch.arange(length)) % known
        ids = torch.cat([torch.full((32, 1), 2), words, torch.full((32, 1), 3)], dim=1)
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        optimizer.step()
    model.eval()


def pretrain_writer(model: Any, size: int) -> None:
    """Some seconds of pretraining: the encoder reads a sentence, and the decoder goes on from its last word in steps of
    1, 5 or 11 words, as a colour in front says; every other sentence has none, and any step is right."""
    import torch

    draw = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    known, written = size - len(SPECIAL), 4
    steps, colours = torch.tensor([1, 5, 11]), torch.tensor([sorted({*WORDS, *COLOURS}).index(c) for c in COLOURS])
    start, end = torch.full((32, 1), model.config.decoder_start_token_id), torch.full((32, 1), 3)
    model.train()
    for number in range(PRETRAIN_WRITER_STEPS):
        length = int(torch.randint(3, 7, (), generator=draw))
        last = torch.randint(known, (32, 1), generator=draw)
        told, step = (torch.randint(3, (32, 1), generator=draw) for _ in range(2))
        read = (last - steps[told] * torch.arange(length).flip(0)) % known
        if number % 2:
            read = torch.cat([colours[step], read], dim=1)
        ids = torch.cat([torch.full((32, 1), 2), len(SPECIAL) + read, end], dim=1)
        labels = torch.cat([len(SPECIAL) + (last + steps[step] * torch.arange(1, written + 1)) % known, end], dim=1)
        inputs = torch.cat([start, labels[:, :-1]], dim=1)
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=inputs, use_cache=False)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(found.logits.mT, labels).backward()
        optimizer.step()
    model.eval()


_NORMAL = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def images_processor(directory: Path) -> None:
    """Save how images become input."""
    document = {"image_processor_type": "ViTImageProcessor", "size": {"height": SIDE, "width": SIDE}}
    (directory / "preprocessor_config.json").write_text(json.dumps({**document, **_NORMAL}))


def pretrain_on_images(model: Any) -> None:
    """Some seconds of pretraining: which of six shapes is in an image."""
    import numpy as np
    import torch

    from finetune_trainer.data.pixels import Processor

    source = random.Random(1)
    labels = [source.randrange(len(SHAPES)) for _ in range(PRETRAIN_IMAGES)]
    processor = Processor.of({"size": SIDE, **_NORMAL}, asked=None, uri="")
    images = torch.from_numpy(processor.batch([drawn(source, SHAPES[label]) for label in labels]))
    known = torch.tensor(np.array(labels))
    draw = torch.Generator().manual_seed(1)
    head = torch.nn.Linear(32, len(SHAPES))
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=3e-3)
    model.train()
    for _ in range(PRETRAIN_STEPS):
        rows = torch.randint(len(known), (32,), generator=draw)
        found = model(pixel_values=images[rows])
        states = found.last_hidden_state
        pooled = states[:, 0] if states.ndim == 3 else states.mean((2, 3))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(pooled), known[rows]).backward()
        optimizer.step()
    model.eval()
