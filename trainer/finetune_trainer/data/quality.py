"""What preflight makes of the quality of all rows: which are left out of training, what is reported of the others."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune_api.contract import RunConfig
from finetune_api.status import AuditFigure, DroppedRows
from finetune_trainer.data.audit import Audit
from finetune_trainer.data.check import Example, Survey, warnings
from finetune_trainer.data.duplicates import Contents, Mark, Marks, Repeated
from finetune_trainer.data.encode import Encoded
from finetune_trainer.data.near import NearDuplicates
from finetune_trainer.data.read import DataError
from finetune_trainer.run import TRAIN

_UNKNOWN_PERCENT = 1.0


@dataclass(frozen=True)
class Quality:
    """All that is known of the rows beside their number."""

    marks: Marks
    """Why a row is left out, in the order in which rows were read."""
    repeated: Repeated
    audit: dict[str, Any]
    dropped: DroppedRows
    leaked: list[int]
    """Contents of the training rows that the test rows alone exclude: a part of the run's identity."""
    figures: tuple[AuditFigure, ...] = ()
    warnings: tuple[str, ...] = ()

    def report(self, encoded: Encoded, survey: Survey, *, labels: Sequence[str], max_length: int) -> "Quality":
        """The same with what the encoded rows tell, in words and figures."""
        dropped = self.dropped.model_copy(update={"overlong": encoded.dropped})
        said = warnings(
            survey,
            self.repeated,
            labels=labels,
            truncated=encoded.truncated,
            dropped=dropped,
            max_length=max_length,
        )
        unknown = 100 * encoded.unknown / max(1, encoded.tokens)
        figures = list(_figures(self.audit))
        if encoded.unknown:
            figures.append(AuditFigure(name="unknown-tokens", percent=unknown, exact=True))
        if unknown > _UNKNOWN_PERCENT:
            said.append(f"{unknown:.0f} % of the tokens are unknown to the tokenizer: is the model of this language?")
        said += self.audit["warnings"]
        tokens = {"count": encoded.tokens, "unknown": encoded.unknown, "exact": True}
        audit = {**self.audit, "tokens": tokens}
        return replace(self, audit=audit, dropped=dropped, figures=tuple(figures), warnings=tuple(said))


class Inspector:
    """Looks at every row once, and decides in the end which training rows are left out."""

    def __init__(self, config: RunConfig, *, text: bool, scratch: Path) -> None:
        """`text`: whether what goes into the model is text."""
        self._data = config.data
        self._text = text
        (scratch / "audit").mkdir()
        self._audit = Audit(full=config.data.audit == "Full", seed=config.training.seed, scratch=scratch / "audit")
        self._near = NearDuplicates(scratch) if text and config.data.deduplicate == "near" else None
        self._numbers = array("q")
        self._count = 0

    def add(self, example: Example, *, split: int, source: int) -> None:
        """One row; `source` is the position of its file in the manifest."""
        content = example.sample.content if self._text else ""
        self._audit.add((source, example.row), text=content, values=example.values)
        if self._near is not None and split == TRAIN:
            self._near.add(content, apart=example.sample.part)
            self._numbers.append(self._count)
        self._count += 1

    def decide(self, contents: Contents, *, sources: Sequence[str]) -> Quality:
        """`sources` names the files by position. Raises DataError Leakage where data.leakage is Fail."""
        repeated = contents.find()
        if self._data.leakage == "Fail" and repeated.examples:
            raise _leakage(repeated, contents, sources)
        marks = repeated.marks
        if self._data.deduplicate is None:
            marks = np.where(marks == Mark.DUPLICATE, np.uint8(Mark.KEPT), marks)
        if self._near is not None:
            near = np.frombuffer(self._numbers, dtype=np.int64)[self._near.find()]
            marks[near[marks[near] == Mark.KEPT]] = Mark.NEAR
            self._near.close()
        leaked = contents.leaked(marks) if (marks == Mark.TEST).any() else []
        contents.close()
        counts = np.bincount(marks, minlength=len(Mark)).tolist()
        dropped = DroppedRows(
            duplicates=counts[Mark.DUPLICATE],
            near_duplicates=counts[Mark.NEAR],
            leaked=counts[Mark.VALIDATION] + counts[Mark.TEST],
            overlong=0,  # known when all rows are encoded
        )
        return Quality(marks, repeated, self._audit.report(sources), dropped, leaked)


def _leakage(repeated: Repeated, contents: Contents, sources: Sequence[str]) -> DataError:
    row, twin = (contents.place(number, sources) for number in repeated.examples[0])
    count = int(np.isin(repeated.marks, (Mark.VALIDATION, Mark.TEST)).sum())
    return DataError(
        "Leakage",
        f"{row}: the training row has the content of {twin}, which is held out (so have {count} training rows in all); "
        "remove one of them, or choose data.leakage: Drop.",
    )


def _figures(audit: dict[str, Any]) -> list[AuditFigure]:
    """What was found, in the form of the status."""
    named = {"near-duplicates": audit["nearDuplicates"], **audit["personalData"]}
    found = []
    for name, figure in named.items():
        if figure["rows"]:
            low, high = (100 * end for end in figure["interval"]) if figure["interval"] else (None, None)
            found.append(
                AuditFigure(name=name, percent=100 * figure["share"], exact=figure["exact"], low=low, high=high)
            )
    return found
