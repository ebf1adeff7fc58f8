"""Extractive question answering: the answer is a piece of the context, or there is none.

A context that does not fit beside its question is cut into windows that overlap, each a row of the store. A window that
holds no whole answer points at position 0, where most tokenizers put their CLS and none puts the context. The best
answer over the windows of a row is the row's (Devlin et al. 2019, Alberti et al. 2019).
"""

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.data.batch import Encoded
from finetune_trainer.data.order import Rows
from finetune_trainer.run import TRAIN
from finetune_trainer.tasks.base import (
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
    cell,
    encodable,
    kind_of,
    mask_of,
    mean_loss,
    objects,
    padded,
    text_cell,
)

CONTEXT_LIMIT = 1024 * 1024
"""Characters a context may have."""
LONGEST_ANSWER = 30
"""Tokens a predicted answer may have; where an answer of the training rows is longer, as many as that has."""
_BATCH_CHARACTERS = 256 * 1024


class Answer(NamedTuple):
    """An answer, where it begins in the context, in characters."""

    text: str
    start: int


@dataclass(frozen=True, slots=True)
class Question:
    """A row."""

    question: str
    context: str
    answers: tuple[Answer, ...]
    """All that count as right; none where the context does not tell."""


class QuestionAnswering(Task):
    """Rows with a question, a context and the answers in it."""

    store: ClassVar[Mapping[str, Column]] = {
        "input_ids": Column("I32", ragged=True),
        "token_type_ids": Column("U8", ragged=True),
        "start": Column("I32"),
        "end": Column("I32"),
        "context_at": Column("I32"),
        "spans": Column("I32", ragged=True),
        "context": Column("U8", ragged=True),
        "question": Column("U8", ragged=True),
        "answers": Column("U8", ragged=True),
        "answerable": Column("U8"),
    }
    # start, end: positions of the answer's first and last token in the window, 0 and 0 where it has none.
    # context_at: position of the window's first token of the context. spans: where each token of the context begins
    # and ends, in characters of `context`, which is the window's part of the context. answers: a JSON list of texts.
    # context, question and answers are UTF-8. token_type_ids is empty where the model takes none.

    def read_row(self, row: Mapping[str, Any]) -> Sample:
        question = text_cell(row, self.columns, "question").strip()
        context = text_cell(row, self.columns, "context")
        name = self.columns["context"]
        if len(context) > CONTEXT_LIMIT:
            raise RowError(
                f"the text in the column {name!r} has {len(context)} characters, {CONTEXT_LIMIT} are allowed: "
                "make several rows of it"
            )
        found = _Answers(self.columns["answers"], name, context).read(cell(row, self.columns, "answers"))
        if not found and self.config.task.unanswerable is False:
            raise RowError(f"the column {self.columns['answers']!r} holds no answer, and task.unanswerable is false")
        payload = Question(question, context, found)
        return Sample(f"{question}\n{context}", "\n".join(sorted({answer.text for answer in found})), payload=payload)

    def encode(self, samples: Sequence[Sample], tools: Tools) -> Sequence[Sequence[Piece] | RowError]:
        return [pieces for some in _portions(samples) for pieces in self._encoded(some, tools)]

    def facts(self, tools: Tools) -> dict[str, Any]:
        return {"token_types": _token_types(tools)}

    def learner(self, facts: Facts) -> Learner:
        return Answering(self.config, facts)

    def _encoded(self, samples: Sequence[Sample], tools: Tools) -> Iterator[Sequence[Piece] | RowError]:
        assert tools.text is not None
        pairs = [(sample.payload.question, sample.payload.context) for sample in samples]
        types = _token_types(tools)
        for sample, encoding in zip(samples, tools.text.tokenizer.encode_batch(pairs), strict=True):
            try:
                tokens = _Tokens(encoding, limit=tools.text.max_length, columns=self.columns)
                yield list(self._windows(sample.payload, tokens, types=types))
            except RowError as error:
                yield error

    def _windows(self, row: Question, tokens: "_Tokens", *, types: bool) -> Iterator[Piece]:
        answers = [tokens.holding(answer.start, answer.start + len(answer.text)) for answer in row.answers]
        texts = json.dumps([answer.text for answer in row.answers], ensure_ascii=False).encode()
        places = list(windows(tokens.count, room=tokens.room, stride=self.config.task.stride or 0))
        lost = bool(answers) and not any(_inside(answers, place) for place in places)
        for number, (first, end) in enumerate(places):
            inside = _inside(answers, (first, end))
            start, last = [token - first + tokens.at for token in inside] if inside else (0, 0)
            begin, finish = tokens.spans[first][0], tokens.spans[end - 1][1]
            ids = tokens.cut(tokens.ids, first, end)
            columns = {
                "input_ids": ids,
                "token_type_ids": tokens.cut(tokens.types, first, end) if types else [],
                "start": start,
                "end": last,
                "context_at": tokens.at,
                "spans": [place - begin for span in tokens.spans[first:end] for place in span],
                "context": row.context[begin:finish].encode(),
                "question": row.question.encode(),
                "answers": texts,
                "answerable": int(bool(row.answers)),
            }
            # the row's length is counted once, with its first window
            yield Piece(columns, tokens=0 if number else len(tokens.ids), length=len(ids), cut=lost)


def windows(count: int, *, room: int, stride: int) -> Iterator[tuple[int, int]]:
    """The first token of each window and the one behind its last: `room` tokens each, of which neighbours share
    `stride`, or half a window where that is less."""
    step = room - min(stride, room // 2)
    first = 0
    while True:
        end = min(first + room, count)
        yield first, end
        if end == count:
            return
        first += step


def _inside(answers: Sequence[tuple[int, int]], window: tuple[int, int]) -> tuple[int, int] | None:
    """The first answer that lies whole in a window."""
    return next((answer for answer in answers if window[0] <= answer[0] and answer[1] < window[1]), None)


def _token_types(tools: Tools) -> bool:
    """Whether the model tells question and context apart by token types."""
    kinds = tools.model.get("type_vocab_size", 0)
    return isinstance(kinds, int) and kinds > 1


def _portions(samples: Sequence[Sample]) -> Iterator[Sequence[Sample]]:
    """So that the tokenizer's working memory is bounded."""
    first = size = 0
    for number, sample in enumerate(samples):
        size += len(sample.content)
        if size >= _BATCH_CHARACTERS:
            yield samples[first : number + 1]
            first, size = number + 1, 0
    if first < len(samples):
        yield samples[first:]


class _Tokens:
    """A question and its whole context, encoded: what stands before the context, the context, what stands behind."""

    def __init__(self, encoding: Any, *, limit: int, columns: Mapping[str, str]) -> None:
        """Raises RowError where no window of at most `limit` tokens has room for any of the context."""
        sides = encoding.sequence_ids
        if 1 not in sides:
            raise RowError(f"the text in the column {columns['context']!r} gives no token")
        if (asked := sides.count(0)) > limit // 2:
            raise RowError(
                f"the question in the column {columns['question']!r} has {asked} tokens, more than half of the {limit} "
                "that fit with its context: shorten it or raise data.maxLength"
            )
        self.ids: list[int] = encoding.ids
        self.types: list[int] = encoding.type_ids
        self.at = sides.index(1)
        """Tokens before the context."""
        self._end = len(sides) - sides[::-1].index(1)
        self.count = self._end - self.at
        self.room = limit - (len(self.ids) - self.count)
        if self.room < 1:
            raise RowError(f"{limit} tokens leave no room for the context: raise data.maxLength")
        self.spans: list[tuple[int, int]] = encoding.offsets[self.at : self._end]
        self._starts = np.array([start for start, _ in self.spans])
        self._ends = np.array([end for _, end in self.spans])
        self._columns = columns

    def holding(self, start: int, end: int) -> tuple[int, int]:
        """The first and the last of the context's tokens that hold something of these characters. Raises RowError."""
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._starts, end, side="left")) - 1
        if first > last:
            raise RowError(f"an answer in the column {self._columns['answers']!r} gives no token")
        return first, last

    def cut(self, values: list[int], first: int, end: int) -> list[int]:
        """The values of a window: everything but the context, and these tokens of it."""
        return values[: self.at] + values[self.at + first : self.at + end] + values[self._end :]


class _Answers:
    """Reads a row's answers. Messages tell places and never text."""

    def __init__(self, column: str, context_column: str, context: str) -> None:
        self._column, self._context_column, self._context = column, context_column, context

    def read(self, value: Any) -> tuple[Answer, ...]:
        """All ways to write answers. Raises RowError."""
        if value is None or value == "":
            return ()
        if isinstance(value, dict):
            value = self._columnar(value)
        elif not isinstance(value, list | tuple):
            value = [value]
        return tuple(self._one(item, number) for number, item in enumerate(value, start=1))

    def _columnar(self, value: Mapping[str, Any]) -> list[Any]:
        """SQuAD's {text: [...], answer_start: [...]}."""
        texts, starts = (_listed(value.get(name)) for name in ("text", "answer_start"))
        if starts and len(starts) != len(texts):
            raise RowError(
                f"the column {self._column!r} has {len(texts)} texts and {len(starts)} values of answer_start"
            )
        return [
            {"text": text, "start": start} for text, start in zip(texts, starts or [None] * len(texts), strict=True)
        ]

    def _one(self, value: Any, number: int) -> Answer:
        which = f"answer {number} in the column {self._column!r}"
        text, start = value, None
        if isinstance(value, dict):
            text, start = value.get("text"), value.get("start", value.get("answer_start"))
        if not isinstance(text, str):
            raise RowError(
                f"the column {self._column!r} must hold text, a list of {{text, start}} or "
                f"{{text: [...], answer_start: [...]}}; answer {number} is {kind_of(text)}"
            )
        if not text.strip() or not encodable(text):
            raise RowError(
                f"{which} is blank or holds half a surrogate pair; where there is no answer, give an empty list"
            )
        start = self._searched(text.strip(), which) if start is None else self._checked(text, start, which)
        return Answer(text.strip(), start)

    def _searched(self, text: str, which: str) -> int:
        found = self._context.find(text)
        if found < 0:
            raise RowError(f"{which} is not in the column {self._context_column!r}")
        if self._context.find(text, found + 1) >= 0:
            raise RowError(
                f"{which} is more than once in the column {self._context_column!r}; say which by answer_start, its "
                "first character, counted from 0"
            )
        return found

    def _checked(self, text: str, start: Any, which: str) -> int:
        if isinstance(start, bool) or not isinstance(start, int | float) or start < 0 or start != int(start):
            raise RowError(f"{which} must begin at a whole number of characters, found {kind_of(start)}")
        at = int(start)
        if self._context[at : at + len(text)] != text:
            found = self._context.find(text)
            where = f"it is there at {found}" if found >= 0 else "it is nowhere in it"
            raise RowError(
                f"{which}, of {len(text)} characters, is not what the column {self._context_column!r} has at its "
                f"answer_start {at} ({where}; characters are counted from 0)"
            )
        return at + len(text) - len(text.lstrip())


def _listed(value: Any) -> list[Any]:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


# --- training and evaluation ---


@lru_cache(maxsize=2)
def _known(store: Encoded) -> tuple[int, bool]:
    """Of the training rows: tokens of the longest answer, and whether some row has no answer."""
    rows = store.rows(TRAIN)
    if not len(rows):
        return LONGEST_ANSWER, False
    widths = store.values("end", rows) - store.values("start", rows) + 1
    return max(LONGEST_ANSWER, int(widths.max())), not bool(store.values("answerable", rows).all())


NONE = "(no answer)"
"""Shown to people."""
_OF_WINDOWS = frozenset({"context", "spans", "first", "last", "score", "null"})
"""What nobody asks of a row."""


class Answering(Learner):
    """Two scores a token: that the answer begins there, and that it ends there."""

    auto_class = "AutoModelForQuestionAnswering"
    targets = frozenset({"labels", "context"})

    def model_settings(self) -> dict[str, Any]:
        return {"num_labels": 2}

    def collate(self, store: Encoded, rows: Rows) -> dict[str, NDArray[Any]]:
        """`labels` [rows, 2]: first and last token of the answer. `context` [rows, 3]: the context's first token, its
        number of tokens, and how many an answer may have."""
        texts = store.each("input_ids", rows)
        found = {"input_ids": padded(texts, self.facts.pad_token_id), "attention_mask": mask_of(texts)}
        if self.facts.more.get("token_types"):
            found["token_type_ids"] = padded(store.each("token_type_ids", rows), 0)
        places = [store.values(name, rows) for name in ("start", "end")]
        longest = np.full(len(rows), _known(store)[0])
        context = [store.values("context_at", rows), store.sizes("spans", rows) // 2, longest]
        found["labels"] = np.stack(places, axis=1).astype(np.int64)
        found["context"] = np.stack(context, axis=1).astype(np.int64)
        return found

    def count(self, store: Encoded, rows: Rows) -> int:
        return len(rows)

    def loss(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        return self._losses(*self._logits(model, inputs), inputs).sum()

    def _logits(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Scores of first and last tokens, [rows, tokens] each, in at least fp32."""
        found = model(**self.model_inputs(inputs))
        start, end = (x.float() if x.element_size() < 4 else x for x in (found.start_logits, found.end_logits))
        return start, end

    def _losses(self, start: Any, end: Any, inputs: Mapping[str, Any]) -> Any:
        """The mean of both cross entropies, [rows]. Padding is no answer, or the loss would depend on how much of it a
        micro-batch happens to have."""
        outside, labels = inputs["attention_mask"] == 0, inputs["labels"]
        losses = [
            -scores.masked_fill(outside, -np.inf).log_softmax(-1).gather(-1, labels[:, place, None])[:, 0]
            for place, scores in enumerate((start, end))
        ]
        return (losses[0] + losses[1]) / 2

    def gold(self, store: Encoded, rows: Rows) -> Outcomes:
        asked = self.config.task.unanswerable
        abstains = _known(store)[1] if asked is None else asked
        return {
            "source": store.values("source", rows),
            "row": store.values("row", rows),
            "answers": objects([json.loads(text.tobytes()) for text in store.each("answers", rows)]),
            "context": objects([text.tobytes().decode() for text in store.each("context", rows)]),
            "spans": objects([spans.reshape(-1, 2) for spans in store.each("spans", rows)]),
            "abstains": np.full(len(rows), abstains),
        }

    def predict(self, model: Any, inputs: Mapping[str, Any], *, generate: bool) -> Outcomes:
        start, end = self._logits(model, inputs)
        losses = self._losses(start, end, inputs)
        score, first, last = best_spans(start, end, inputs["context"])
        return {
            "first": first.cpu().numpy(),
            "last": last.cpu().numpy(),
            "score": score.double().cpu().numpy(),
            "null": (start[:, 0] + end[:, 0]).double().cpu().numpy(),
            "loss": losses.double().cpu().numpy(),
            "count": np.ones(len(losses), np.int64),
        }

    def settle(self, outcomes: Outcomes) -> Outcomes:
        """The best answer over a row's windows; none where all of them prefer none."""
        groups: dict[tuple[int, int], list[int]] = {}
        for number, key in enumerate(zip(outcomes["source"].tolist(), outcomes["row"].tolist(), strict=True)):
            groups.setdefault(key, []).append(number)
        chosen = [max(group, key=lambda number: float(outcomes["score"][number])) for group in groups.values()]
        texts = []
        for group, best in zip(groups.values(), chosen, strict=True):
            none = outcomes["abstains"][best] and outcomes["null"][group].min() > outcomes["score"][best]
            texts.append("" if none else self._text(outcomes, best))
        first = [group[0] for group in groups.values()]
        found = {name: values[first] for name, values in outcomes.items() if name not in _OF_WINDOWS}
        for name in {"loss", "count"} & outcomes.keys():
            found[name] = np.array([outcomes[name][group].sum() for group in groups.values()])
        return {**found, "predicted": objects(texts), **scores(texts, list(found["answers"]))}

    def _text(self, outcomes: Outcomes, number: int) -> str:
        spans, context = outcomes["spans"][number], outcomes["context"][number]
        found: str = context[spans[outcomes["first"][number]][0] : spans[outcomes["last"][number]][1]]
        return found.strip()

    def metrics(self, outcomes: Outcomes) -> Metrics:
        found = {name: float(outcomes[name].mean()) for name in ("exact-match", "f1")} | mean_loss(outcomes)
        if outcomes["abstains"].any():
            gives, has = outcomes["gives"], outcomes["has"]
            if has.any():
                found["has-answer-accuracy"] = float(gives[has].mean())
            if not has.all():
                found["no-answer-accuracy"] = float(1 - gives[~has].mean())
        return found

    def shown(self, outcomes: Outcomes) -> tuple[list[str], list[str]]:
        """Of several right answers the one that was given, where it was one of them."""
        answers = [text or NONE for text in outcomes["predicted"]]
        right = [
            answer if met == 1.0 else " or ".join(dict.fromkeys(texts)) or NONE
            for answer, met, texts in zip(answers, outcomes["exact-match"], outcomes["answers"], strict=True)
        ]
        return right, answers

    def trivial(self, store: Encoded, train: Rows, rows: Rows) -> Outcomes | None:
        """Of some answers that need no model, the one that scores best on training rows: see `guesses`."""
        known = _sampled(train)
        best = max(guesses(), key=lambda guess: self._guessed(store, known, guess) if len(known) else 0.0)
        return self._guesses(store, rows, best)

    def _guessed(self, store: Encoded, rows: Rows, guess: "Guess") -> float:
        return self.metrics(self.settle({**self.gold(store, rows), **self._guesses(store, rows, guess)}))["f1"]

    def _guesses(self, store: Encoded, rows: Rows, guess: "Guess") -> Outcomes:
        found = []
        for question, context, spans in zip(
            *(store.each(name, rows) for name in ("question", "context", "spans")), strict=True
        ):
            score, start, end = guess(question.tobytes().decode(), context.tobytes().decode())
            first = int(np.searchsorted(spans[1::2], start, side="right"))
            last = int(np.searchsorted(spans[0::2], end, side="left")) - 1
            found.append((score, min(first, len(spans) // 2 - 1), max(last, first, 0)))
        scores, firsts, lasts = (np.array(column) for column in zip(*found, strict=True))
        lasts = np.minimum(lasts, store.sizes("spans", rows) // 2 - 1)
        null = np.where(np.isinf(scores), 0.0, -np.inf)
        return {"score": scores, "first": firsts, "last": np.maximum(firsts, lasts), "null": null}


def best_spans(start: Any, end: Any, context: Any) -> tuple[Any, Any, Any]:
    """The best sum of a first and a last token's scores within the context, over all spans of allowed length.

    `start` and `end` [rows, tokens], `context` as in `collate`. Returns the score [rows] and both tokens [rows],
    counted from the context's first. Every span is looked at, not only those of the best few starts and ends.
    """
    rows, tokens = start.shape
    at, count, longest = (context[:, column, None] for column in range(3))
    positions = context.new_ones(1, tokens).cumsum(1) - 1
    outside = (positions < at) | (positions >= at + count)
    start, end = start.masked_fill(outside, -np.inf), end.masked_fill(outside, -np.inf)
    best, width = start + end, context.new_zeros(rows, tokens)
    for more in range(1, min(tokens, int(longest.max()))):
        found = start[:, :-more] + end[:, more:]
        better = (found > best[:, :-more]) & (more < longest)
        best[:, :-more] = found.where(better, best[:, :-more])
        width[:, :-more] = width[:, :-more].masked_fill(better, more)
    score, first = best.max(-1)
    last = first + width.gather(-1, first[:, None])[:, 0]
    return score, first - at[:, 0], last - at[:, 0]


# --- metrics: Rajpurkar et al. 2016 and 2018 ---

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normal(text: str) -> str:
    """Lower case, without ASCII punctuation, articles and superfluous spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def score(predicted: str, answers: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 over words with the answer that fits best; an empty list is answered by an empty text."""
    golds = [text for text in map(normal, answers) if text] or [""]
    found = normal(predicted)
    return float(found in golds), max(_f1(found.split(), gold.split()) for gold in golds)


def scores(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> Outcomes:
    """Both scores of each row, whether it is given an answer, and whether it has one."""
    found = np.array([score(*pair) for pair in zip(predicted, answers, strict=True)], np.float64).reshape(-1, 2)
    return {
        "exact-match": found[:, 0],
        "f1": found[:, 1],
        "gives": np.array([bool(text) for text in predicted], bool),
        "has": np.array([bool(texts) for texts in answers], bool),
    }


def _f1(found: Sequence[str], gold: Sequence[str]) -> float:
    if not found or not gold:
        return float(found == gold)
    common = (Counter(found) & Counter(gold)).total()
    return 2 * common / (len(found) + len(gold))


# --- answers that need no model ---

Guess = Callable[[str, str], tuple[float, int, int]]
"""Question and context -> how sure it is, and where in the context its answer begins and ends, in characters."""
_WORD = re.compile(r"\w+(?:[-.']\w+)*")
_SENTENCE = re.compile(r"[^.!?\n]+(?:[.!?]+(?!\s)[^.!?\n]+)*")
_SMALL_WORDS = frozenset(
    "a an and are as at be by did do does for from how in is it of on or that the this to was were what when where "  # noqa: SIM905 - words
    "which who why with".split()
)
_NEAR = 10
_SAMPLED = 300


def guesses() -> list[Guess]:
    """No answer; the sentence with the most of the question's words; the first words; the words nearest to those of the
    question (after the sliding window of Richardson et al. 2013)."""
    return [
        lambda question, context: (-np.inf, 0, len(context)),
        _best_sentence,
        *(_first_words(count) for count in (3, 8)),
        *(_nearest_words(count) for count in (1, 2, 4, 8)),
    ]


def _sampled(rows: Rows) -> Rows:
    """Some rows in runs, so that windows of one context stay together."""
    if len(rows) <= _SAMPLED:
        return rows
    starts = np.linspace(0, len(rows) - _SAMPLED // 10, 10).astype(int)
    return rows[np.unique((starts[:, None] + np.arange(_SAMPLED // 10)).ravel())]


def _words(text: str) -> list[tuple[str, int, int]]:
    return [(match[0].lower(), match.start(), match.end()) for match in _WORD.finditer(text)]


def _asked(question: str) -> set[str]:
    return {word for word, _, _ in _words(question)} - _SMALL_WORDS


def _best_sentence(question: str, context: str) -> tuple[float, int, int]:
    asked = _asked(question)
    found = [
        (float(len(asked & {word for word, _, _ in _words(match[0])})), match.start(), match.end())
        for match in _SENTENCE.finditer(context)
    ]
    return max(found, key=lambda sentence: sentence[0], default=(0.0, 0, len(context)))


def _first_words(count: int) -> Guess:
    def guess(question: str, context: str) -> tuple[float, int, int]:
        words = _words(context)[:count]
        return (0.0, words[0][1], words[-1][2]) if words else (0.0, 0, len(context))

    return guess


def _nearest_words(count: int) -> Guess:
    def guess(question: str, context: str) -> tuple[float, int, int]:
        words, asked = _words(context), _asked(question)
        if not words:
            return 0.0, 0, len(context)
        seen = Counter(word for word, _, _ in words)
        weights = np.array([np.log1p(1 / seen[word]) if word in asked else 0.0 for word, _, _ in words])
        beside = np.zeros(max(1, len(words) - count + 1))
        for distance in range(1, _NEAR + 1):
            places = np.arange(len(beside))
            # an answer stands more often behind the question's words than before them
            for near, share in ((places - distance, 1.0), (places + count - 1 + distance, 0.9)):
                inside = (near >= 0) & (near < len(words))
                beside[inside] += share * weights[near[inside]] / distance
        sums = np.concatenate([[0.0], np.cumsum(weights)])
        within = sums[np.minimum(np.arange(len(beside)) + count, len(words))] - sums[: len(beside)]
        best = int((beside - within).argmax())  # a question's own words are rarely its answer
        last = min(best + count, len(words)) - 1
        return float((beside - within)[best]), words[best][1], words[last][2]

    return guess
