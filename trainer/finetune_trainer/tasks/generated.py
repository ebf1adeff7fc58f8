"""What tasks share whose models write text: how it is written, read back from tokens, and measured against references.

Texts are columns of outcomes: `reference` is what the data has, `hypothesis` what the model has written. Metrics of a
whole corpus need them all; they are small beside logits, which are never kept.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_api.contract import GenerationConfig
from finetune_trainer.tasks.base import Metrics, Outcomes, objects

ROUGE = {"rouge-1": "rouge1", "rouge-2": "rouge2", "rouge-l": "rougeL"}
GENERATED = frozenset({*ROUGE, "bleu", "chrf", "exact-match"})
"""Metrics of written text."""
_BLEU_TOKENIZERS = {"zh": "zh"}
"""Of sacrebleu, by the first two letters of the target's language, where its usual one (13a) finds no words."""
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_BEAMS = ("length_penalty", "early_stopping", "num_beam_groups", "diversity_penalty", "constraints")
_OTHER_LIMITS = ("max_length", "max_time", "num_return_sequences")


def set_decoding(
    model: Any, decoding: GenerationConfig, *, final: bool, limit: int | None = None, **tokens: int | list[int] | None
) -> None:
    """Make the model's generation_config say what the document asks for, and leave the rest as the base has it.

    Nothing is ever drawn at random. Evaluations during training (not `final`) are greedy, so that `generation` never
    decides which weights are best. `limit` is the number of positions the model has; `tokens` are special tokens by
    their names in transformers, None where the base's stays. save_pretrained publishes it all.
    """
    config = model.generation_config
    plain = type(config)()
    beams = decoding.beams if final else 1
    dropped = (*_SAMPLING, *_OTHER_LIMITS, *(_BEAMS if beams == 1 else ()))
    values = {name: getattr(plain, name, None) for name in dropped if hasattr(config, name)}
    values |= {"do_sample": False, "num_beams": beams, "use_cache": True, "_from_model_config": False}
    values["max_new_tokens"] = min(decoding.max_new_tokens, limit or decoding.max_new_tokens)
    if beams > 1 and decoding.length_penalty is not None:
        values["length_penalty"] = decoding.length_penalty
    values |= {name: token for name, token in tokens.items() if token is not None}
    for name, value in values.items():
        setattr(config, name, value)


class Words:
    """Texts out of tokens, special ones left out."""

    def __init__(self, base: Path) -> None:
        """`base` is the directory of the base model's files."""
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))

    def texts(self, ids: Iterable[Sequence[int]]) -> list[str]:
        """One text for each sequence of token ids, without blanks around it."""
        found = self._tokenizer.decode_batch([list(row) for row in ids], skip_special_tokens=True)
        return [text.strip() for text in found]


def encoded_text(text: str) -> bytes:
    """A text for a ragged column of kind U8."""
    return text.encode()


def texts_of(values: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """The texts of rows of such a column: an array of objects, as outcomes hold them."""
    return objects([row.tobytes().decode() for row in values])


# --- metrics: what they need of each row is found once, and then summed over whichever rows are asked for ---


def scored(outcomes: Outcomes, *, wanted: Iterable[str], language: str | None = None) -> Outcomes:
    """Outcomes with what the wanted ones of GENERATED need of each row; as they are where there is no hypothesis.

    `language` is that of the references.
    """
    if "hypothesis" not in outcomes:
        return outcomes
    references, hypotheses = list(outcomes["reference"]), list(outcomes["hypothesis"])
    names = GENERATED & set(wanted)
    found = {**outcomes, **_rouge(references, hypotheses, [name for name in ROUGE if name in names])}
    for name in ("bleu", "chrf"):
        if name in names:
            counts = _corpus_metric(name, language)._extract_corpus_statistics(hypotheses, [references])
            found[name] = np.array(counts, dtype=np.int64)
    if "exact-match" in names:
        found["exact-match"] = np.array([a.strip() == b.strip() for a, b in zip(references, hypotheses, strict=True)])
    return found


def generation_metrics(outcomes: Outcomes) -> Metrics:
    """Those that `scored` outcomes hold.

    ROUGE (rouge-score, F-measure, no stemming) and exact match are means over rows between 0 and 1, BLEU and chrF
    (sacrebleu) are of the whole corpus, between 0 and 100.
    """
    means = {name: float(outcomes[name].mean()) for name in (*ROUGE, "exact-match") if name in outcomes}
    sums = {name: outcomes[name].sum(0).tolist() for name in ("bleu", "chrf") if name in outcomes}
    return means | {
        name: float(_corpus_metric(name, None)._compute_score_from_stats(found).score) for name, found in sums.items()
    }


class _AnyScript:
    """Words as rouge-score finds them in ASCII text, in other scripts and with accents as well: the library's own
    tokenizer drops every other letter."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def _rouge(references: list[str], hypotheses: list[str], names: list[str]) -> Outcomes:
    if not names:
        return {}
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([ROUGE[name] for name in names], tokenizer=_AnyScript())
    scores = [scorer.score(a, b) for a, b in zip(references, hypotheses, strict=True)]
    return {name: np.array([score[ROUGE[name]].fmeasure for score in scores]) for name in names}


def _corpus_metric(name: str, language: str | None) -> Any:
    """Of sacrebleu, which sums counts of segments, as its own bootstrap does."""
    from sacrebleu.metrics import BLEU, CHRF

    if name == "chrf":
        return CHRF()
    return BLEU(tokenize=_BLEU_TOKENIZERS.get((language or "")[:2].lower(), "13a"), force=True)
