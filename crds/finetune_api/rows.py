"""spec.data: where rows come from and which of them count."""

from typing import ClassVar

from finetune_api.base import Model, Rule, exactly_one_of, spec_field
from finetune_api.scalars import AuditMode, Column, Leakage, Overlong, PartName, S3OrFile, SourceUri

ROWS = (
    "jsonl, csv, tsv, txt (a row a line, column text) and tar (WebDataset), each also with .gz or .zst, parquet, arrow; a "
    "pattern such as s3://bucket/2026-*.jsonl; or a folder of images, one directory a class, with a slash at its end: "
    f"{S3OrFile}, or hf://datasets/org/name@revision/file"
)


class DataSource(Model):
    uri: SourceUri = spec_field("train", f"Rows: {ROWS}.", required=True)
    weight: float | None = spec_field(
        "train",
        "How often a row is seen in an epoch; 0.5 shows another half of the rows in the next epoch. For rehearsal against "
        "forgetting, give rows of the kind the base was trained on a small weight. Default: 1.",
        gt=0,
        le=100,
    )
    task: PartName | None = spec_field(
        "train", "With multi-task, and there always: which of task.tasks the rows are of."
    )


class ValidationSource(Model):
    task: PartName = spec_field("train", "Which of task.tasks the rows are of.", required=True)
    uri: SourceUri = spec_field("train", "Validation rows, as in data.train.", required=True)


class Validation(Model):
    rules: ClassVar[tuple[Rule, ...]] = (
        exactly_one_of("fraction", "uri", "sources"),
        Rule(
            "has(self.fraction)",
            "groupBy goes only with fraction",
            lambda model: model.group_by is None or model.fraction is not None,
            on="groupBy",
        ),
    )

    fraction: float | None = spec_field(
        "train", "Share of the training rows held out, chosen by a hash of their content.", gt=0, lt=1
    )
    group_by: Column | None = spec_field(
        "train", "Rows with the same value in this column stay on one side of the split."
    )
    uri: SourceUri | None = spec_field("train", "Validation rows, as in data.train.")
    sources: list[ValidationSource] | None = spec_field(
        None, "With multi-task, instead of uri: validation rows of every task.", min_length=1, max_length=64
    )


class PartTestSource(Model):
    task: PartName = spec_field("evaluate", "Which of task.tasks the rows are of.", required=True)
    uri: SourceUri = spec_field("evaluate", "Test rows, as in data.train.", required=True)


class TestSource(Model):
    __test__ = False
    rules: ClassVar[tuple[Rule, ...]] = (exactly_one_of("uri", "sources"),)

    uri: SourceUri | None = spec_field("evaluate", "Test rows, as in data.train.")
    sources: list[PartTestSource] | None = spec_field(
        None, "With multi-task, instead of uri: test rows of every task.", min_length=1, max_length=64
    )


class Deduplicate(Model):
    exact: bool | None = spec_field(
        "train",
        "Leave out training rows whose content and answer are those of an earlier one. Default: false; they are counted.",
    )
    near: bool | None = spec_field(
        "train",
        "Leave out training rows whose text nearly repeats an earlier one (MinHash, estimated similarity of at least 0.8). "
        "Takes about a millisecond a row. Default: false.",
    )


class Data(Model):
    train: list[DataSource] = spec_field(None, "Files of training rows.", required=True, min_length=1, max_length=64)
    validation: Validation | None = spec_field(None, "Rows that choose the best checkpoint. Default: fraction 0.1.")
    test: TestSource | None = spec_field(None, "Rows the final metrics are measured on. Default: the validation rows.")
    max_length: int | None = spec_field(
        "train", "Tokens a row may have. Default: 256, or the model's limit if that is lower.", ge=8, le=131072
    )
    max_target_length: int | None = spec_field(
        "train",
        "Tokens a summary or translation may have, its end included; longer ones are overlong, too. Default: 128, or the "
        "model's limit if that is lower.",
        ge=2,
        le=131072,
    )
    overlong: Overlong | None = spec_field(
        "train",
        "What happens to longer rows; they are always counted. Split makes several of one, for causal-lm. Default: Truncate, "
        "for causal-lm Split.",
    )
    deduplicate: Deduplicate | None = spec_field(None, "Which repeated training rows are left out. Default: none.")
    leakage: Leakage | None = spec_field(
        "train",
        "What happens to training rows whose content is among the validation or test rows: they are left out and counted, or "
        "nothing is trained. Default: Drop.",
    )
    audit: AuditMode | None = spec_field(
        "live",
        "How many rows preflight searches for near-duplicates and personal data: 20,000 by chance, or all, at about a "
        "millisecond each. Default: Sample.",
    )
