"""Tokenizers and config.json of encoder-decoders, as preflight reads them; tests/trainer/rank makes models of them."""

import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu")
SPECIAL = ("<pad>", "</s>", "<unk>", "<s>", "en_XX", "de_DE")
PAD, END, UNKNOWN, BEGIN, ENGLISH, GERMAN = range(6)
ALPHA = len(SPECIAL)
"""The token of the first word; the others follow."""
TEMPLATES = {
    "t5": "$A </s>",
    "bart": "<s> $A </s>",
    "marian": "$A </s>",
    "mbart": "$A </s> en_XX",
    "mbart50": "en_XX $A </s>",
}
"""What stands around a text, by kind of model."""
STARTS = {"t5": PAD, "bart": END, "marian": PAD, "mbart50": END}
"""What the decoder begins with, where config.json says it."""


def tokenizer(kind: str = "t5", *more: str) -> Tokenizer:
    """One token a word; `more` are further special tokens."""
    found = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    special = SPECIAL if kind.startswith("mbart") else SPECIAL[:4]
    found.add_special_tokens([AddedToken(token, special=True) for token in (*special, *more)])
    around = [(token, SPECIAL.index(token)) for token in special if token in TEMPLATES[kind].split()]
    found.post_processor = processors.TemplateProcessing(single=TEMPLATES[kind], special_tokens=around)
    return found


def config(kind: str = "t5", **changed: Any) -> dict[str, Any]:
    """config.json; what is changed to None is left out."""
    found = {
        "model_type": kind.removesuffix("50"),
        "is_encoder_decoder": True,
        "vocab_size": 60,
        "pad_token_id": PAD,
        "eos_token_id": END,
        "decoder_start_token_id": STARTS.get(kind),
        **changed,
    }
    return json.loads(json.dumps({name: value for name, value in found.items() if value is not None}))
