"""Instruction tuning: the model learns to answer in chats."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
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
    MissingColumn,
    Outcomes,
    Piece,
    RowError,
    Sample,
    Task,
    Tools,
    cell,
    kind_of,
    listed,
    objects,
)
from finetune_trainer.tasks.chat import Chat, Chats, Message, ends_with_assistant, messages_of, tools_of
from finetune_trainer.tasks.continued import Spans, spans
from finetune_trainer.tasks.generated import GENERATED, Words, generation_metrics, scored, set_decoding
from finetune_trainer.tasks.language import LanguageLearner, check_causal, end_of, token_metrics

MESSAGES, PAIR = "messages", "a prompt and a completion"
_PROBE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
_LOOKED_AT = 10_000
"""Training rows whose answers are counted for the trivial one."""


class Instruction(Task):
    """Rows with messages, or with a prompt and a completion."""

    store: ClassVar[Mapping[str, Column]] = {
        "input_ids": Column("I32", ragged=True),
        "learned": Column("U8", ragged=True),
        "turn": Column("I32"),
    }

    def read_row(self, row: Mapping[str, Any]) -> Sample:
        messages, form = chat_of(row, self.columns)
        tools = tools_of(row.get(self.columns["tools"]), self.columns["tools"])
        asked = json.dumps([messages[:-1], tools], ensure_ascii=False, sort_keys=True, default=str)
        answer = json.dumps(messages[-1], ensure_ascii=False, sort_keys=True, default=str)
        return Sample(asked, answer, form=form, payload=(messages, tools))

    def facts(self, tools: Tools) -> dict[str, Any]:
        return self._reader.facts(tools)

    def encode(self, samples: Sequence[Sample], tools: Tools) -> Sequence[Sequence[Piece] | RowError]:
        found = self._reader.read([sample.payload for sample in samples], tools)
        return [read if isinstance(read, RowError) else self._piece(*read, tools) for read in found]

    def _piece(self, ids: list[int], mine: NDArray[np.bool_], tools: Tools) -> Sequence[Piece] | RowError:
        assert tools.text is not None
        learned = mine.copy() if self.config.task.train_on == "assistant" else np.ones_like(mine)
        learned[0] = False
        limit, tokens = tools.text.max_length, len(ids)
        ids, kept, learned = ids[:limit], mine[:limit], learned[:limit]
        cut = tokens > limit
        if not kept.any() and not (cut and tools.overlong != "Truncate"):
            return RowError(
                f"none of the {limit} tokens that data.maxLength allows is the assistant's, whose last answer begins "
                f"at token {last_turn(mine)}; raise it, or choose Drop"
            )
        turn = last_turn(kept) if kept.any() else 0
        columns = {"input_ids": ids, "learned": learned.astype(np.uint8), "turn": turn}
        return [Piece(columns, tokens=tokens, length=len(ids), cut=cut)]

    @property
    def _reader(self) -> "ChatReader":
        if self._made is None:
            self._made = ChatReader(self.config.task.chat_template)
        return self._made

    _made: "ChatReader | None" = None

    def learner(self, facts: Facts) -> Learner:
        return Answerer(self.config, facts)


class ChatReader:
    """Chats as tokens."""

    def __init__(self, template: str | None) -> None:
        """`template` is the document's."""
        self._given = template
        self._made: tuple[Chats, bool] | None = None

    def facts(self, tools: Tools) -> dict[str, Any]:
        """`ends`: tokens that end an answer; `template`: what is to be published with the tokenizer; `limit`: tokens
        that the model can read.

        Raises DataError.
        """
        text = check_causal(tools)
        end = end_of(text)
        try:
            chats, adds_end = self._chats(text)
        except RowError as error:
            raise DataError("ChatTemplateUnsuitable", f"A chat cannot be written: {error}.") from error
        last = None if adds_end else end_token(text, chats.template.chat(_PROBE))
        ends = list(dict.fromkeys([end if last is None else last, end]))
        return {"ends": ends, "template": chats.source if chats.ours else None, "limit": text.own_limit}

    def read(
        self, chats: Sequence[tuple[Sequence[Message], Sequence[Any] | None]], tools: Tools
    ) -> list[tuple[list[int], NDArray[np.bool_]] | RowError]:
        """For messages and tools their tokens, and which of them are the assistant's; or why that cannot be told."""
        assert tools.text is not None
        text, (template, adds_end) = tools.text, self._chats(tools.text)
        written: list[Chat | RowError] = []
        for messages, given in chats:
            try:
                written.append(template.template.chat(messages, tools=given))
            except RowError as error:
                written.append(error)
        whole = [chat.text for chat in written if isinstance(chat, Chat)]
        encodings = iter(text.tokenizer.encode_batch(whole, add_special_tokens=False))
        begin, end = text.special("bos"), end_of(text) if adds_end else None
        return [
            chat if isinstance(chat, RowError) else _tokens(chat, next(encodings), begin=begin, end=end)
            for chat in written
        ]

    def _chats(self, text: Text) -> tuple[Chats, bool]:
        """The template, and whether it leaves it to us to say that an answer is over. Raises RowError."""
        if self._made is None or self._made[0].text is not text:
            chats = Chats(text, self._given)
            self._made = chats, end_token(text, chats.template.chat(_PROBE)) is None
        return self._made


def _tokens(
    chat: Chat, encoding: Any, *, begin: int | None, end: int | None
) -> tuple[list[int], NDArray[np.bool_]] | RowError:
    """Token ids and whose they are; at most one `begin`, and `end` behind them where it is given."""
    ids, mine = list(encoding.ids), spoken(chat, encoding.offsets)
    while begin is not None and ids[:2] == [begin, begin]:
        ids, mine = ids[1:], mine[1:]
    if not mine.any():
        return RowError("the assistant's messages give no token")
    return (ids, mine) if end is None else ([*ids, end], np.append(mine, True))


def chat_of(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[list[dict[str, Any]], str]:
    """The messages of a row, which end with the assistant's, and how they are written. Raises RowError."""
    name = columns["messages"]
    if name in row and row[name] is not None:
        messages = messages_of(row[name], name)
        ends_with_assistant(messages, name)
        return messages, MESSAGES
    if columns["prompt"] not in row:
        raise MissingColumn("messages", name, row)
    if columns["completion"] not in row:
        raise RowError(f"the column {columns['completion']!r} is missing; columns found: {listed(row)}")
    messages = [*turns(row, columns, "prompt", "user"), *turns(row, columns, "completion", "assistant")]
    ends_with_assistant(messages, columns["completion"])
    return messages, PAIR


def turns(row: Mapping[str, Any], columns: Mapping[str, str], role: str, speaker: str) -> list[dict[str, Any]]:
    """Messages, or a text that is one message of `speaker`. Raises RowError."""
    value, name = cell(row, columns, role), columns[role]
    if isinstance(value, str):
        if not value.strip():
            raise RowError(f"the text in the column {name!r} is empty")
        return messages_of([{"role": speaker, "content": value}], name)
    if not isinstance(value, list):
        raise RowError(f"the column {name!r} must hold text or messages, found {kind_of(value)}")
    return messages_of(value, name)


def spoken(chat: Chat, offsets: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Which tokens hold any character of the assistant's messages: [tokens]."""
    starts = np.array([start for start, _ in offsets], dtype=np.int64)
    ends = np.array([end for _, end in offsets], dtype=np.int64)
    found = np.zeros(len(offsets), dtype=bool)
    for start, end in chat.spans:
        found |= (starts < end) & (ends > start)
    return found


def last_turn(mine: NDArray[np.bool_]) -> int:
    """Where the last run of the assistant's tokens begins."""
    last = int(np.flatnonzero(mine)[-1])
    others = np.flatnonzero(~mine[:last])
    return int(others[-1]) + 1 if len(others) else 0


def _end_of_run(learned: NDArray[Any], start: int) -> int:
    """Where the run of learned tokens that begins at `start` is over."""
    others = np.flatnonzero(learned[start:] == 0)
    return start + int(others[0]) if len(others) else len(learned)


def end_token(text: Text, chat: Chat) -> int | None:
    """The special token that ends the assistant's last message; None where there is none."""
    encoding = text.tokenizer.encode(chat.text, add_special_tokens=False)
    mine = np.flatnonzero(spoken(chat, encoding.offsets))
    if not len(mine):
        return None
    last = int(encoding.ids[int(mine[-1])])
    known = text.tokenizer.get_added_tokens_decoder().get(last)
    return last if known is not None and known.special else None


class Answerer(LanguageLearner):
    """Learns the assistant's tokens, and is measured by what it answers to the last turn."""

    targets: ClassVar[frozenset[str]] = frozenset({"labels", "turn"})

    def set_up(self, model: Any, *, final: bool) -> None:
        assert self.config.decoding is not None
        ends = self.facts.more["ends"]
        set_decoding(
            model,
            self.config.decoding,
            final=final,
            eos_token_id=ends[0] if len(ends) == 1 else ends,
            pad_token_id=self.facts.pad_token_id,
        )

    def files(self) -> dict[str, str]:
        template = self.facts.more["template"]
        return {} if template is None else {"chat_template.jinja": template}

    def labels(self, store: Encoded, rows: Rows) -> list[NDArray[Any]]:
        texts, learned = store.each("input_ids", rows), store.each("learned", rows)
        return [np.where(mine, ids, IGNORED).astype(np.int64) for ids, mine in zip(texts, learned, strict=True)]

    def count(self, store: Encoded, rows: Rows) -> int:
        return sum(int(row.sum()) for row in store.each("learned", rows))

    def collate(self, store: Encoded, rows: Rows) -> dict[str, NDArray[Any]]:
        return {**super().collate(store, rows), "turn": store.values("turn", rows).astype(np.int64)}

    def gold(self, store: Encoded, rows: Rows) -> Outcomes:
        return {"reference": objects(self._answers(store, rows))}

    def _answers(self, store: Encoded, rows: Rows) -> list[str]:
        """What is to be answered to the last turn, through the same tokens as what is."""
        texts, turns = store.each("input_ids", rows), store.values("turn", rows)
        return self._words.texts([ids[turn:].tolist() for ids, turn in zip(texts, turns, strict=True)])

    @cached_property
    def _words(self) -> Words:
        return Words(self.facts.base)

    def predict(self, model: Any, inputs: Mapping[str, Any], *, generate: bool) -> Outcomes:
        found = self.scores(model, inputs)
        if generate:
            found["hypothesis"] = objects(self._written(model, inputs))
        return found

    def _written(self, model: Any, inputs: Mapping[str, Any]) -> list[str]:
        """Answers to the last turns, whose beginnings are put side by side at the right."""
        assert self.config.decoding is not None
        turns = inputs["turn"].tolist()
        width = max(turns)
        ids = inputs["input_ids"].new_full((len(turns), width), self.facts.pad_token_id)
        mask = ids.new_zeros(ids.shape)
        for number, turn in enumerate(turns):
            turn = min(turn, inputs["input_ids"].shape[1])
            ids[number, width - turn :] = inputs["input_ids"][number, :turn]
            mask[number, width - turn :] = 1
        limit, most = self.facts.more["limit"], self.config.decoding.max_new_tokens
        room = most if limit is None else limit - width - (self.config.method.virtual_tokens or 0)
        written = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max(1, min(most, room)))
        return self._words.texts(written[:, width:].tolist())

    def settle(self, outcomes: Outcomes) -> Outcomes:
        return scored(outcomes, wanted=self._wanted)

    @property
    def _wanted(self) -> Sequence[str]:
        return TASKS[self.config.task.type].metrics

    def metrics(self, outcomes: Outcomes) -> Metrics:
        found = generation_metrics(outcomes) | token_metrics(outcomes)
        return {name: found[name] for name in self._wanted if name in found}

    def shown(self, outcomes: Outcomes) -> tuple[list[str], list[str]] | None:
        if "hypothesis" not in outcomes:
            return None
        return list(outcomes["reference"]), list(outcomes["hypothesis"])

    def generates(self, metric: str) -> bool:
        return metric in GENERATED

    def continuations(self, store: Encoded, rows: Rows) -> Spans:
        """The answer to the last turn, without the token that ends it."""
        turns = store.values("turn", rows)
        learned = store.each("learned", rows)
        ends = [_end_of_run(mine, int(turn)) - 1 for mine, turn in zip(learned, turns, strict=True)]
        return spans(np.maximum(1, turns).tolist(), ends)

    def trivial(self, store: Encoded, train: Rows, rows: Rows) -> Outcomes:
        """Always the most frequent answer of training."""
        known = Counter(self._answers(store, train[:_LOOKED_AT]))
        usual = min(known, key=lambda answer: (-known[answer], answer))
        return {"hypothesis": objects([usual] * len(rows))}
