"""Summarization: a long text and a short one that says the same."""

import re

from finetune_trainer.tasks.seq2seq import Seq2Seq

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n\s*\n")


class Summarization(Seq2Seq):
    """Rows with a text and its summary. What needs no model is the first sentence (lead-1)."""

    roles = ("text", "summary")

    def trivial(self, source: str) -> str:
        return _SENTENCE_END.split(source.strip(), maxsplit=1)[0].strip()

    def prefixes(self) -> list[str]:
        return ["summarization"]
