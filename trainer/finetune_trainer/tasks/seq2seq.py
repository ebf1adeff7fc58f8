"""What summarization and translation share: an encoder reads a text, a decoder writes another.

Targets are tokenised as what the decoder has to write, end token included. The decoder's inputs are made here, with the
start token in front, and not by the model out of labels: so a forward pass needs no labels.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from finetune_api.tasks import TASKS
from finetune_trainer.data.batch import Encoded
from finetune_trainer.data.order import Rows
from finetune_trainer.data.read import DataError
from finetune_trainer.data.text import Text
from finetune_trainer.tasks.base import (
    IGNORED,
    Column,
    Facts,
    Learner,
    Metrics,
    Outcomes,
    Piece,
    RowError,
    Sample,
    Task,
    Tools,
    mask_of,
    mean_loss,
    objects,
    padded,
    text_cell,
)
from finetune_trainer.tasks.continued import Spans, reproduced, spans
from finetune_trainer.tasks.generated import (
    GENERATED,
    Words,
    encoded_text,
    generation_metrics,
    scored,
    set_decoding,
    texts_of,
)

_LANGUAGE = re.compile(r"[a-z]{2,3}_[A-Z][A-Za-z]{1,3}|__[a-z]{2,3}__")
"""Tokens that stand for a language: en_XX (mBART), eng_Latn (NLLB), __en__ (M2M100)."""
_SHOWN = 8


@dataclass(frozen=True)
class Frame:
    """What stands around texts: fixed by preflight from the document and the base model's files."""

    prefix: str
    """Before each source, as text."""
    start: int
    """The decoder's first input."""
    end: int
    """What every target ends with."""
    source: int | None = None
    """The token of the source's language, in a base that marks languages."""
    target: int | None = None
    forced: int | None = None
    """The token that every target begins with, which the decoder need not find itself."""
    before: int | None = None
    """A token in front of each source that says what to translate into."""


class Seq2Seq(Task):
    """Rows with a text to read and a text to write."""

    store: ClassVar[Mapping[str, Column]] = {
        "input_ids": Column("I32", ragged=True),
        "target_ids": Column("I32", ragged=True),
        "reference": Column("U8", ragged=True),
        "trivial": Column("U8", ragged=True),
    }
    roles: ClassVar[tuple[str, str]]
    """Of the columns to read and to write."""

    def read_row(self, row: Mapping[str, Any]) -> Sample:
        source, target = (text_cell(row, self.columns, role) for role in self.roles)
        return Sample(source, target)

    def trivial(self, source: str) -> str:
        """What could be written without a model."""
        raise NotImplementedError  # each of the two tasks has its own

    def prefixes(self) -> Sequence[str]:
        """Under which names config.json may have the words to put before a text (task_specific_params)."""
        raise NotImplementedError  # each of the two tasks has its own

    def encode(self, samples: Sequence[Sample], tools: Tools) -> Sequence[Sequence[Piece] | RowError]:
        sources, targets, frame = self._reader(tools), self._writer(tools), self._frame(tools)
        read = sources.cut([frame.prefix + sample.content for sample in samples])
        write = targets.cut([sample.answer for sample in samples])
        found: list[Sequence[Piece] | RowError] = []
        for sample, (ids, tokens), (target, target_tokens) in zip(samples, read, write, strict=True):
            ids, target = _framed_source(ids, frame), _framed_target(target, frame, limit=targets.max_length)
            if target_tokens > targets.max_length and tools.overlong == "Fail":
                found.append(
                    RowError(
                        f"the text in the column {self.columns[self.roles[1]]!r} has {target_tokens} tokens, "
                        f"{targets.max_length} are allowed and overlong is Fail; raise data.maxTargetLength, choose "
                        "Truncate"
                    )
                )
                continue
            _check_vocabulary(target, sources)
            columns = {
                "input_ids": ids,
                "target_ids": target,
                "reference": encoded_text(sample.answer),
                "trivial": encoded_text(self.trivial(sample.content)),
            }
            cut = tokens > sources.max_length or target_tokens > targets.max_length
            found.append([Piece(columns, tokens=tokens, length=len(ids) + len(target), cut=cut)])
        return found

    def facts(self, tools: Tools) -> dict[str, Any]:
        return {**asdict(self._frame(tools)), "limit": self._reader(tools).own_limit}

    def learner(self, facts: Facts) -> Learner:
        return Writer(self.config, facts)

    def _reader(self, tools: Tools) -> Text:
        return self._texts(tools)[0]

    def _writer(self, tools: Tools) -> Text:
        return self._texts(tools)[1]

    def _frame(self, tools: Tools) -> Frame:
        return self._texts(tools)[2]

    def _texts(self, tools: Tools) -> tuple[Text, Text, Frame]:
        """Tokenizers for what is read and what is written, and the frame; made once a run. Raises DataError."""
        if self._made is None:
            assert tools.text is not None
            assert self.config.data.max_target_length is not None
            _check_model(self.config.task.type, tools)
            frame = self._framed(tools.text)
            room = 1 if frame.before is not None else 0
            read = tools.text.limited(tools.text.max_length - room)
            self._made = read, tools.text.limited(self.config.data.max_target_length), frame
        return self._made

    _made: tuple[Text, Text, Frame] | None = None

    def _framed(self, text: Text) -> Frame:
        task, template = self.config.task, text.ids([""])[0]
        known = _languages(text)
        slot = next((place for place, token in enumerate(template) if token in known.values()), None)
        asked = (task.source_language, task.target_language)
        end = _token(text.config, "eos_token_id")
        start = text.config.get("decoder_start_token_id")
        if slot is None:
            before = text.tokenizer.token_to_id(f">>{asked[1]}<<") if asked[1] else None
            prefix = self._prefix(text, marked=before is not None)
            return Frame(prefix, _start(start), end, before=before)
        source, target = self._spoken(known, template[slot])
        prefix = self._prefix(text, marked=True)
        if slot:  # the language stands behind the text, and the decoder begins with it
            return Frame(prefix, target, end, source=source, target=target)
        return Frame(prefix, _start(start), end, source=source, target=target, forced=target)

    def _spoken(self, known: Mapping[str, int], template: int) -> tuple[int, int]:
        """The tokens of both languages, in a base that marks them. Raises DataError."""
        task = self.config.task
        some = ", ".join(sorted(known)[:_SHOWN]) + (" and others" if len(known) > _SHOWN else "")
        if task.type == "translation" and task.target_language is None:
            raise _unsuitable(f"the base knows several languages; name task.targetLanguage, such as {some}")
        found = []
        for field, name in (("sourceLanguage", task.source_language), ("targetLanguage", task.target_language)):
            token = template if name is None else known.get(name, known.get(f"__{name}__"))
            if token is None:
                raise _unsuitable(f"task.{field}: the base has no language {name}; it has {some}")
            found.append(token)
        return found[0], found[1]

    def _prefix(self, text: Text, *, marked: bool) -> str:
        """The document's, else what config.json has for the task. Raises DataError where languages change nothing."""
        task = self.config.task
        if task.prefix is not None:
            return task.prefix
        for name in self.prefixes():
            entry = (text.config.get("task_specific_params") or {}).get(name)
            if isinstance(entry, Mapping) and isinstance(entry.get("prefix"), str):
                return str(entry["prefix"])
        if not marked and (task.source_language or task.target_language):
            raise _unsuitable(
                "task.sourceLanguage and targetLanguage mean nothing to the base, which has neither tokens nor a "
                "prefix for them; leave them out, or give task.prefix"
            )
        return ""


# --- the base model ---


def _unsuitable(what: str) -> DataError:
    return DataError("ModelUnsuitable", f"{what}.")


def _check_model(task: str, tools: Tools) -> None:
    """Raises DataError for what is no encoder-decoder, or has two vocabularies where tokenizer.json holds one."""
    assert tools.text is not None
    config, tokenizer = tools.model, tools.text.tokenizer_config
    if config.get("is_encoder_decoder") is not True:
        raise _unsuitable(
            f"{task} needs a base with an encoder and a decoder, such as T5, BART or mBART; config.json says "
            f"model_type {config.get('model_type')}"
        )
    apart = config.get("decoder_vocab_size") not in (None, config.get("vocab_size"))
    if apart or tokenizer.get("separate_vocabs") or str(tokenizer.get("tokenizer_class")).startswith("Marian"):
        raise _unsuitable(
            "the tokenizer of this Marian model splits source and target by different files (source.spm, target.spm), "
            "and tokenizer.json holds one of them at most; use T5, BART or mBART, or a Marian model saved with a "
            "PreTrainedTokenizerFast for both languages"
        )


def _token(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    value = value[0] if isinstance(value, list) and value else value
    if not isinstance(value, int):
        raise _unsuitable(f"config.json names no {name}, so the decoder's texts would have no end; add it")
    return value


def _start(value: Any) -> int:
    if not isinstance(value, int):
        raise _unsuitable("config.json names no decoder_start_token_id, which the decoder begins with; add it")
    return value


def _languages(text: Text) -> dict[str, int]:
    """The tokens that stand for languages."""
    added = text.tokenizer.get_added_tokens_decoder().items()
    return {token.content: number for number, token in added if token.special and _LANGUAGE.fullmatch(token.content)}


def _framed_source(ids: list[int], frame: Frame) -> list[int]:
    """With the token of its language in the place of the tokenizer's own."""
    if frame.before is not None:
        return [frame.before, *ids]
    return _speaking(ids, frame.source, forced=frame.forced is not None)


def _framed_target(ids: list[int], frame: Frame, *, limit: int) -> list[int]:
    """What the decoder has to write: never with its own first input in front, always with the end token."""
    ids = _speaking(ids, frame.target, forced=frame.forced is not None)
    if len(ids) > 1 and ids[0] == frame.start:
        ids = ids[1:]
    return ids if frame.end in ids[-2:] else [*ids[: limit - 1], frame.end]


def _speaking(ids: list[int], language: int | None, *, forced: bool) -> list[int]:
    if language is None:
        return ids
    return [language, *ids[1:]] if forced else [*ids[:-1], language]


def _check_vocabulary(ids: list[int], text: Text) -> None:
    if text.vocabulary is not None and max(ids) >= text.vocabulary:
        raise DataError(
            "ModelIncomplete",
            f"tokenizer.json has the token {max(ids)} where config.json says vocab_size {text.vocabulary}: the files "
            "belong to different models; upload those of one.",
        )


# --- training ---


class Writer(Learner):
    """Cross entropy of each token of the target, given the source and the tokens before it."""

    auto_class = "AutoModelForSeq2SeqLM"
    logits = "all"

    def set_up(self, model: Any, *, final: bool) -> None:
        assert self.config.decoding is not None
        set_decoding(
            model,
            self.config.decoding,
            final=final,
            limit=self.facts.more["limit"],
            decoder_start_token_id=self.facts.more["start"],
            eos_token_id=None if model.generation_config.eos_token_id is not None else self.facts.more["end"],
            forced_bos_token_id=self.facts.more["forced"],
            pad_token_id=self.facts.pad_token_id,
        )

    def collate(self, store: Encoded, rows: Rows) -> dict[str, NDArray[Any]]:
        sources, targets = store.each("input_ids", rows), store.each("target_ids", rows)
        start, pad = self.facts.more["start"], self.facts.pad_token_id
        return {
            "input_ids": padded(sources, pad),
            "attention_mask": mask_of(sources),
            "decoder_input_ids": padded([np.concatenate([[start], row[:-1]]) for row in targets], pad),
            "labels": padded(targets, IGNORED),
        }

    def count(self, store: Encoded, rows: Rows) -> int:
        return int(store.sizes("target_ids", rows).sum())

    def loss(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        return self._losses(self._logits(model, inputs), inputs["labels"]).sum()

    def _logits(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        return model(**self.model_inputs(inputs), use_cache=False).logits

    def _losses(self, logits: Any, labels: Any) -> Any:
        """[rows, positions], 0 where there is nothing to learn."""
        if logits.element_size() < 4:
            logits = logits.float()
        known = labels != IGNORED
        losses = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return losses * known

    def gold(self, store: Encoded, rows: Rows) -> Outcomes:
        return {"reference": texts_of(store.each("reference", rows))}

    def predict(self, model: Any, inputs: Mapping[str, Any], *, generate: bool) -> Outcomes:
        logits, labels = self._logits(model, inputs), inputs["labels"]
        found: Outcomes = {
            "loss": self._losses(logits, labels).double().sum(-1).cpu().numpy(),
            "count": (labels != IGNORED).sum(-1).cpu().numpy(),
            "correct": (logits.argmax(-1) == labels).sum(-1).cpu().numpy(),
        }
        if generate:
            read = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            written = model.generate(**read, **self.begins)
            found["hypothesis"] = objects(self._words.texts(written.tolist()))
        return found

    @property
    def begins(self) -> dict[str, int]:
        """What `generate` must know of this task: another one on the same model may begin its texts otherwise."""
        tokens = {"decoder_start_token_id": self.facts.more["start"], "forced_bos_token_id": self.facts.more["forced"]}
        return {name: token for name, token in tokens.items() if token is not None}

    @property
    def before(self) -> str:
        """What a tokenizer does not put before a text by itself. Empty in runs of before it was recorded."""
        named = self.facts.more.get("before") is not None  # a token says what to translate into
        marker = f">>{self.config.task.target_language}<< " if named else ""
        return marker + str(self.facts.more.get("prefix", ""))

    @property
    def languages(self) -> dict[str, str]:
        """Those that the document names, where the tokenizer marks them."""
        task = self.config.task
        asked = {"sourceLanguage": task.source_language, "targetLanguage": task.target_language}
        marked = self.facts.more.get("source") is not None
        return {name: language for name, language in asked.items() if language is not None and marked}

    def usage(self) -> str:
        return f"Put `{self.before}` before each text.\n" if self.before else ""

    @cached_property
    def _words(self) -> Words:
        return Words(self.facts.base)

    def settle(self, outcomes: Outcomes) -> Outcomes:
        task = self.config.task
        return scored(outcomes, wanted=TASKS[task.type].metrics, language=task.target_language)

    def metrics(self, outcomes: Outcomes) -> Metrics:
        found = generation_metrics(outcomes)
        if "correct" in outcomes:
            found["token-accuracy"] = float(outcomes["correct"].sum() / max(1, outcomes["count"].sum()))
        return {**found, **mean_loss(outcomes)}

    def shown(self, outcomes: Outcomes) -> tuple[list[str], list[str]] | None:
        if "hypothesis" not in outcomes:
            return None
        return list(outcomes["reference"]), list(outcomes["hypothesis"])

    def generates(self, metric: str) -> bool:
        return metric in GENERATED

    def continuations(self, store: Encoded, rows: Rows) -> Spans:
        """The beginning of each target, but the token that is forced on the decoder and the one that ends it."""
        ends = store.sizes("target_ids", rows) - 1
        first = 0 if self.facts.more["forced"] is None else 1
        return spans([first] * len(rows), ends.tolist())

    def reproduced(self, model: Any, inputs: Mapping[str, Any], asked: Spans) -> NDArray[np.bool_]:
        found = self._logits(model, inputs).argmax(-1) == inputs["labels"]
        return reproduced(found.cpu().numpy(), asked)

    def trivial(self, store: Encoded, train: Rows, rows: Rows) -> Outcomes:
        """The first sentence of each text, or the text as it is."""
        return {"hypothesis": texts_of(store.each("trivial", rows))}
