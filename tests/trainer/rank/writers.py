"""Tiny encoder-decoders with random weights whose tokenizers know a dozen words."""

from pathlib import Path
from typing import Any

from tests.trainer.rank.architectures import SEQ2SEQ, make
from tests.trainer.writers import END, PAD, STARTS, tokenizer


def save(directory: Path, kind: str = "t5", **changed: Any) -> Path:
    """Write a base model of that kind; `changed` goes into its configuration."""
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(kind), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    made.save_pretrained(directory)
    model_of(kind, **changed).save_pretrained(directory)
    return directory


def model_of(kind: str, **changed: Any) -> Any:
    """The model in eval mode, always with the same weights."""
    settings = {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": STARTS.get(kind), **changed}
    if not kind.startswith("mbart"):
        return make(kind, **settings)
    import torch
    from transformers import MBartConfig, MBartForConditionalGeneration

    torch.manual_seed(0)
    return MBartForConditionalGeneration(MBartConfig(**{**SEQ2SEQ, **settings})).eval()
