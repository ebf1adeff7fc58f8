"""Tiny encoder-decoders with random weights whose tokenizers know the words of conftest.py."""

from pathlib import Path
from typing import Any

from tests.trainer.rank.architectures import SEQ2SEQ, make
from tests.trainer.rank.conftest import COLOURS, WORDS

# pad, end, unknown, begin, and the tokens of two languages
SPECIAL = ("<pad>", "</s>", "<unk>", "<s>", "en_XX", "de_DE")
PAD, END, UNKNOWN, BEGIN, ENGLISH, GERMAN = range(6)
TEMPLATES = {
    "t5": "$A </s>",
    "bart": "<s> $A </s>",
    "marian": "$A </s>",
    "mbart": "$A </s> en_XX",
    "mbart50": "en_XX $A </s>",
}
"""What stands around a text, by kind of model."""
STARTS = {"t5": PAD, "bart": END, "marian": PAD, "mbart": None, "mbart50": END}
"""What the decoder begins with."""


def save(directory: Path, kind: str = "t5", **changed: Any) -> Path:
    """Write a base model of that kind; `changed` goes into its configuration."""
    tokenizer(TEMPLATES[kind]).save_pretrained(directory)
    settings = {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": STARTS[kind], **changed}
    model_of(kind, **settings).save_pretrained(directory)
    return directory


def model_of(kind: str, **settings: Any) -> Any:
    """The model in eval mode, always with the same weights."""
    if not kind.startswith("mbart"):
        return make(kind, **settings)
    import torch
    from transformers import MBartConfig, MBartForConditionalGeneration

    torch.manual_seed(0)
    return MBartForConditionalGeneration(MBartConfig(**{**SEQ2SEQ, **settings})).eval()


def tokenizer(template: str, special: tuple[str, ...] = SPECIAL) -> Any:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate([*special, *sorted({*WORDS, *COLOURS})])}
    found = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    around = [(token, vocabulary[token]) for token in special if token in template.split()]
    found.post_processor = processors.TemplateProcessing(single=template, special_tokens=around)
    return PreTrainedTokenizerFast(
        tokenizer_object=found,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
        additional_special_tokens=list(special[4:]),
    )
