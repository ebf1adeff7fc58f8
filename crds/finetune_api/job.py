"""FineTuneJob: what a user asks for, and what the operator says of it."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, Field, StringConstraints
from pydantic.alias_generators import to_snake

from finetune_api.base import (
    Model,
    Rule,
    at,
    at_most_one_of,
    exactly_one_of,
    has_path,
    never_beside,
    only_beside,
    only_with,
    spec_field,
)
from finetune_api.tasks import (
    CLASSIFYING,
    GENERATING,
    LABELLED_PARTS,
    PACKING,
    ROLES,
    SPLITTING,
    TASKS,
    WITH_TARGETS,
    WRITING_PARTS,
    MethodType,
    PartType,
    RetentionType,
    TaskKind,
    TaskType,
    retention_types,
    tasks_with,
)

Uri = Annotated[str, StringConstraints(pattern=r"^(s3|file)://[^ \t\r\n]+$", max_length=1024)]
SourceUri = Annotated[str, StringConstraints(pattern=r"^(s3|file|hf)://[^ \t\r\n]+$", max_length=1024)]
S3OrFile = "an s3:// or file:// address (file:// only outside a cluster)"
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
Column = Annotated[str, StringConstraints(min_length=1, max_length=256)]
License = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.+-]*$", max_length=64)]
Label = Annotated[str, StringConstraints(min_length=1, max_length=256)]
PartName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=40)]
MetricName = Annotated[
    str, StringConstraints(pattern=r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?\.)?[a-z0-9][-a-z0-9]*$", max_length=64)
]
Language = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][-A-Za-z0-9_]*$", max_length=32)]
Template = Annotated[str, StringConstraints(min_length=1, max_length=65536)]
Prefix = Annotated[str, StringConstraints(max_length=256)]
Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$", max_length=32)]
Duration = Annotated[str, StringConstraints(pattern=r"^([0-9]+h)?([0-9]+m)?([0-9]+s)?$", min_length=2, max_length=32)]
LabelValue = Annotated[str, StringConstraints(pattern=r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$", max_length=63)]
Key = Annotated[str, StringConstraints(max_length=317)]
Text = Annotated[str, StringConstraints(max_length=1024)]

Overlong = Literal["Truncate", "Split", "Drop", "Fail"]
Strategy = Literal["greedy", "beam"]
Leakage = Literal["Drop", "Fail"]
AuditMode = Literal["Sample", "Full"]
OptimizerType = Literal["adamw", "adafactor", "sgd", "adamw-8bit"]
ScheduleType = Literal["linear", "cosine", "constant", "polynomial", "inverse-sqrt", "one-cycle"]
LossType = Literal["cross-entropy", "focal"]
Share = Annotated[float, Field(ge=0, lt=1)]


def _role(role: str) -> Rule:
    """A column may be named only for a task that reads it."""
    allowed = tasks_with(role)
    options = ", ".join(f"'{name}'" for name in allowed)
    return Rule(
        f"self.type in [{options}] || !has(self.columns) || !has(self.columns.{role})",
        f"columns.{role} goes only with type: {' or '.join(allowed)}",
        lambda task: task.type in allowed or at(task, f"columns.{role}") is None,
    )


class PartColumns(Model):
    text: Column | None = spec_field("train", "Column that holds the text. Default: text.")
    label: Column | None = spec_field(
        "train", "Column that holds the label: one value, or a list of values for multi-label rows. Default: label."
    )
    pair: Column | None = spec_field(
        "train",
        "Column that holds a second text, where the label or number is about two of them (inference, paraphrase, similarity). Default: none.",
    )
    tokens: Column | None = spec_field(
        "train", "Column that holds the words of token-classification, a list. Default: tokens."
    )
    tags: Column | None = spec_field("train", "Column that holds a tag for each word, a list. Default: tags.")
    spans: Column | None = spec_field(
        "train",
        "Column that holds the spans of the text, a list of objects with start, end (in characters) and label, where there "
        "are no tokens. Default: spans.",
    )
    summary: Column | None = spec_field("train", "Column that holds the summary of a text. Default: summary.")
    source: Column | None = spec_field("train", "Column that holds the text to translate. Default: source.")
    target: Column | None = spec_field("train", "Column that holds its translation. Default: target.")


class Columns(PartColumns):
    value: Column | None = spec_field("train", "Column that holds the number of regression. Default: value.")
    image: Column | None = spec_field(
        "train", "Column that holds the image: bytes, or a path relative to the file of rows. Default: image."
    )
    question: Column | None = spec_field(
        "train", "Column that holds the question of question-answering. Default: question."
    )
    context: Column | None = spec_field("train", "Column that holds the text the answer is in. Default: context.")
    answers: Column | None = spec_field(
        "train",
        "Column that holds the answers: {text: [...], answer_start: [...]}, a list of {text, start}, or text that is in the context once. Default: answers.",
    )
    messages: Column | None = spec_field(
        "train",
        "Column that holds a chat: a list of messages with role (system, user, assistant, tool) and content. Default: messages.",
    )
    prompt: Column | None = spec_field(
        "train",
        "Column that holds what is asked, a text or messages; in instruction instead of messages. Default: prompt.",
    )
    completion: Column | None = spec_field(
        "train", "Column that holds the answer to a prompt, a text or messages. Default: completion."
    )
    chosen: Column | None = spec_field(
        "train", "Column that holds the better answer, a text or messages. Default: chosen."
    )
    rejected: Column | None = spec_field(
        "train", "Column that holds the worse answer, a text or messages. Default: rejected."
    )
    tools: Column | None = spec_field(
        "train", "Column that holds the tools of a chat as JSON schemas, where there are any. Default: tools."
    )


class Augment(Model):
    flip: bool | None = spec_field(
        "train", "Mirror left and right in half of the cases; not for what means something else then. Default: false."
    )
    crop: float | None = spec_field(
        "train",
        "Show a random part of the image: the smallest share of its area, such as 0.5. Default: all of it.",
        gt=0,
        le=1,
    )
    color: float | None = spec_field(
        "train",
        "Change brightness, contrast and saturation by up to this share, such as 0.3. Default: 0.",
        ge=0,
        lt=1,
    )
    mixup: float | None = spec_field(
        "train",
        "Blend images and labels in pairs; alpha of the Beta distribution the shares are drawn from, such as 0.2. "
        "Default: not at all.",
        gt=0,
        le=100,
    )


def _items(value: Any) -> list[Any]:
    """Of a list; the validator asks rules about documents whose types are still wrong."""
    return value if isinstance(value, list) else []


class Part(Model):
    rules: ClassVar[tuple[Rule, ...]] = (
        *(
            _role(role)
            for role in ROLES
            if to_snake(role) in PartColumns.model_fields and len(tasks_with(role)) < len(TASKS)
        ),
        only_with("type", values=LABELLED_PARTS, fields=("labels",)),
        only_with("type", values=("translation",), fields=("sourceLanguage", "targetLanguage")),
        only_with("type", values=WRITING_PARTS, fields=("prefix",)),
    )

    name: PartName = spec_field(
        "train",
        "Names the task in data.train[].task, in metrics (NAME.f1) and, where it has a head, as the directory of its model.",
        required=True,
    )
    type: PartType = spec_field("train", "What the model learns to do.", required=True)
    columns: PartColumns | None = spec_field(None, "Names of the columns in the task's files.")
    labels: list[Label] | None = spec_field(
        "train",
        "The task's labels, in the order of its outputs. Default: found in the data by preflight and fixed from then on.",
        min_length=2,
        max_length=10000,
    )
    loss_weight: float | None = spec_field(
        "train", "What the task's mean loss is multiplied by. Default: 1.", gt=0, le=1000
    )
    source_language: Language | None = spec_field(
        "train",
        "Language of the source as the base names it, such as en_XX (mBART) or en. Default: what its tokenizer is set to.",
    )
    target_language: Language | None = spec_field(
        "train", "Language of the target as the base names it. Required where the base knows several."
    )
    prefix: Prefix | None = spec_field(
        "train",
        "Words put before each text, such as `summarize: `. Default: those that task_specific_params of the base's config.json "
        "name for the task and its languages, else none. No two of the tasks may look the same.",
    )


class Task(Model):
    rules: ClassVar[tuple[Rule, ...]] = (
        *(_role(role) for role in ROLES if len(tasks_with(role)) < len(TASKS)),
        only_with("type", values=("translation",), fields=("sourceLanguage", "targetLanguage")),
        only_with("type", values=("summarization", "translation"), fields=("prefix",)),
        only_with("type", values=("multi-task",), fields=("tasks",)),
        Rule(
            "self.type != 'multi-task' || has(self.tasks)",
            "type: multi-task needs tasks, those that share the model",
            lambda task: task.type != "multi-task" or task.tasks is not None,
        ),
        Rule(
            "!has(self.tasks) || self.tasks.all(one, self.tasks.exists_one(other, other.name == one.name))",
            "give each of tasks a name of its own",
            lambda task: len({str(at(part, "name")) for part in _items(task.tasks)}) == len(_items(task.tasks)),
        ),
        Rule(
            f"!has(self.tasks) || self.tasks.all(one, one.type in {list(WRITING_PARTS)}) || "
            f"!self.tasks.exists(one, one.type in {list(WRITING_PARTS)})",
            "all of tasks have heads on one encoder (text-classification, token-classification), or all write texts "
            "with one encoder-decoder (summarization, translation): no model is both",
            lambda task: len({at(part, "type") in WRITING_PARTS for part in _items(task.tasks)}) < 2,
        ),
        only_with("type", values=("question-answering",), fields=("stride", "unanswerable")),
        only_with("type", values=("instruction",), fields=("trainOn",)),
        only_with("type", values=("instruction", "preference"), fields=("chatTemplate",)),
        only_with("type", values=("preference",), fields=("beta", "loss")),
        only_with("type", values=("image-classification",), fields=("imageSize", "augment")),
    )

    type: TaskType = spec_field("train", "What the model learns to do.", required=True)
    columns: Columns | None = spec_field(None, "Names of the columns in the data.")
    labels: list[Label] | None = spec_field(
        "train",
        "The labels, in the order of the model's outputs. Default: found in the data by preflight and fixed from then on.",
        min_length=2,
        max_length=10000,
    )
    source_language: Language | None = spec_field(
        "train",
        "Language of the source as the base names it, such as en_XX (mBART) or en. Default: what its tokenizer is set to.",
    )
    target_language: Language | None = spec_field(
        "train", "Language of the target as the base names it. Required where the base knows several."
    )
    chat_template: Template | None = spec_field(
        "train",
        "How a chat becomes a text: a Jinja template, as transformers has them. Default: auto, the base's own, or a plain one made "
        "of what tokens it has; a template that is not the base's is published with the model.",
    )
    beta: float | None = spec_field(
        "train",
        "How closely the model stays to the base: rewards are beta times the log-ratio of both. Default: 0.1.",
        gt=0,
        le=100,
    )
    loss: Literal["sigmoid", "ipo", "hinge"] | None = spec_field(
        "train", "What preferences are learned by: DPO (sigmoid), IPO or a hinge. Default: sigmoid."
    )
    train_on: Literal["assistant", "all"] | None = spec_field(
        "train", "Whose tokens are learned. Default: assistant, the end of each of its messages included."
    )
    prefix: Prefix | None = spec_field(
        "train",
        "Words put before each text, such as `summarize: `. Default: those that task_specific_params of the base's config.json "
        "name for the task and its languages, else none.",
    )
    tasks: list[Part] | None = spec_field(
        None,
        "The tasks that share one encoder, each with a head of its own, or that share all of one encoder-decoder.",
        min_length=2,
        max_length=8,
    )
    stride: int | None = spec_field(
        "train",
        "Tokens that neighbouring windows of a long context share; at most half a window. Default: 64.",
        ge=0,
        le=65536,
    )
    unanswerable: bool | None = spec_field(
        "train",
        "Whether a question may have no answer in its context: true lets the model say so, false refuses such rows. Default: as the training rows have it.",
    )
    image_size: int | None = spec_field(
        "train",
        "Pixels of both sides that images are resized to; a model with learned positions takes its own size alone. Default: as the base's preprocessor_config.json has it.",
        ge=8,
        le=4096,
    )
    augment: Augment | None = spec_field(
        None, "How training images are changed at random, anew each time they are seen. Default: not at all."
    )


class ModelSource(Model):
    uri: SourceUri = spec_field(
        "train",
        f"Directory of the base model, with config.json, tokenizer.json and safetensors weights: {S3OrFile}, or "
        "hf://org/name@revision.",
        required=True,
    )
    license: License | None = spec_field(
        "publish",
        "License of the base model, by its name on the Hub, such as apache-2.0; goes into the model card. Where a profile allows only some, it must be one of them. Default: what the card of the base says.",
    )


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
            "!has(self.groupBy) || has(self.fraction)",
            "groupBy goes only with fraction",
            lambda model: model.group_by is None or model.fraction is not None,
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


class Freeze(Model):
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.embeddings) || has(self.layers) || has(self.patterns)",
            "give at least one of embeddings, layers and patterns",
            lambda model: any(value is not None for value in (model.embeddings, model.layers, model.patterns)),
        ),
    )

    embeddings: bool | None = spec_field("train", "Whether the embeddings stay as they are. Default: false.")
    layers: int | None = spec_field(
        "train",
        "Blocks that stay as they are, counted from the input; where encoder and decoder differ in length, their last blocks "
        "have the same number. Default: 0.",
        ge=1,
        le=1000,
    )
    patterns: list[Column] | None = spec_field(
        "train",
        "Parameters or modules that stay as they are, by name; * stands for anything, as in bert.encoder.layer.*.attention.",
        min_length=1,
        max_length=64,
    )


class Unfreeze(Model):
    every_steps: int = spec_field(
        "train",
        "Training begins with what lies above the blocks; after so many steps the next block joins, down to the embeddings.",
        required=True,
        ge=1,
        le=10_000_000,
    )


class Method(Model):
    rules: ClassVar[tuple[Rule, ...]] = (
        only_with("type", values=("full",), fields=("freeze", "unfreeze")),
        only_with("type", values=("lora", "qlora", "dora"), fields=("rank", "alpha", "dropout", "rankStabilized")),
        only_with("type", values=("lora", "qlora", "dora", "ia3"), fields=("targets",)),
        only_with("type", values=("qlora",), fields=("quantization", "doubleQuant")),
        only_with("type", values=("adapter",), fields=("reduction", "variant")),
        only_with("type", values=("prompt", "prefix"), fields=("virtualTokens",)),
    )

    type: MethodType = spec_field(
        "train",
        "full trains all weights, head only the new output layer, lora low-rank additions, qlora those over a base of four bits, dora those with magnitudes of "
        "their own, adapter small layers between the base's, ia3 factors on keys, values and feed-forward layers, prompt tokens before each row, prefix keys and "
        "values before each layer's.",
        required=True,
    )
    freeze: Freeze | None = spec_field(None, "Weights that do not train. Default: none.")
    unfreeze: Unfreeze | None = spec_field(
        None, "Gradual unfreezing from the output towards the input. Default: all layers train from the first step."
    )
    rank: int | None = spec_field("train", "Rank of the LoRA matrices. Default: 16.", ge=1, le=1024)
    alpha: float | None = spec_field(
        "train", "Scale of the LoRA update, divided by the rank. Default: twice the rank.", gt=0
    )
    rank_stabilized: bool | None = spec_field(
        "train", "Divide alpha by the root of the rank instead (rsLoRA), for high ranks. Default: false."
    )
    dropout: float | None = spec_field("train", "Dropout in front of the LoRA matrices. Default: 0.05.", ge=0, lt=1)
    targets: list[Column] | None = spec_field(
        "train",
        "Name endings of the layers that are added to. Default: every linear layer of the trunk; for ia3 keys, values and "
        "the second layer of each feed-forward part.",
        min_length=1,
        max_length=64,
    )
    quantization: Literal["nf4", "fp4"] | None = spec_field(
        "train", "The four-bit numbers the base is kept in. Default: nf4."
    )
    double_quant: bool | None = spec_field(
        "train", "Whether the scales of blocks of four-bit numbers are quantised, too. Default: true."
    )
    reduction: int | None = spec_field(
        "train", "By how much narrower than the model the inside of an adapter is. Default: 16.", ge=1, le=1024
    )
    variant: Literal["houlsby", "pfeiffer"] | None = spec_field(
        "train",
        "Adapters after attention and feed-forward parts (houlsby), or after the latter alone. Default: pfeiffer.",
    )
    virtual_tokens: int | None = spec_field(
        "train", "Learned tokens; data.maxLength leaves room for them. Default: 20.", ge=1, le=4096
    )


class Warmup(Model):
    rules: ClassVar[tuple[Rule, ...]] = (exactly_one_of("percent", "steps"),)

    percent: float | None = spec_field("train", "Share of all steps, in percent.", ge=0, le=100)
    steps: int | None = spec_field("train", "Number of steps.", ge=0, le=10_000_000)


class Schedule(Model):
    rules: ClassVar[tuple[Rule, ...]] = (
        only_with("type", values=("cosine", "polynomial"), fields=("minimum",)),
        only_with("type", values=("polynomial",), fields=("power",)),
    )

    type: ScheduleType = spec_field("train", "How the learning rate falls after the warm-up.", required=True)
    warmup: Warmup | None = spec_field(
        None, "How long the learning rate rises at first. Default: percent 6, for one-cycle percent 30."
    )
    minimum: float | None = spec_field(
        "train", "Where the learning rate ends, as a share of its peak. Default: 0.", ge=0, lt=1
    )
    power: float | None = spec_field(
        "train", "Exponent of the polynomial; 1 is a straight line. Default: 1.", gt=0, le=100
    )


class Optimizer(Model):
    rules: ClassVar[tuple[Rule, ...]] = (
        only_with("type", values=("adamw", "adamw-8bit"), fields=("betas", "epsilon")),
        only_with("type", values=("sgd",), fields=("momentum",)),
    )

    type: OptimizerType = spec_field(
        "train",
        "The optimizer. adafactor and adamw-8bit need less memory for their state than adamw.",
        required=True,
    )
    weight_decay: float | None = spec_field(
        "train", "Decay of the weights; biases and norms are spared. Default: 0.01.", ge=0, le=1
    )
    betas: list[Share] | None = spec_field(
        "train",
        "Decay rates of the running means of the gradient and of its square. Default: 0.9 and 0.999.",
        min_length=2,
        max_length=2,
    )
    epsilon: float | None = spec_field("train", "Added to the denominator of a step. Default: 1e-8.", gt=0, le=1)
    momentum: float | None = spec_field("train", "Share of the last step in the next one. Default: 0.", ge=0, lt=1)


class Every(Model):
    rules: ClassVar[tuple[Rule, ...]] = (exactly_one_of("steps", "epochs"),)

    steps: int | None = spec_field("train", "Optimizer steps between two evaluations.", ge=1, le=10_000_000)
    epochs: float | None = spec_field("train", "Epochs between two evaluations.", gt=0, le=1000)


class EarlyStopping(Model):
    patience: int = spec_field(
        "train",
        "Evaluations without an improvement of evaluation.primary after which training ends.",
        required=True,
        ge=1,
        le=1000,
    )
    min_delta: float | None = spec_field("train", "Smallest change that counts as an improvement. Default: 0.", ge=0)


class Ema(Model):
    decay: float = spec_field(
        "train",
        "Share of the mean that each step keeps; less in the first steps, so that the mean leaves the base weights.",
        required=True,
        gt=0,
        lt=1,
    )


class L2sp(Model):
    alpha: float = spec_field(
        "train",
        "Strength of the pull; it takes the place of weightDecay for these weights.",
        required=True,
        gt=0,
        le=100,
    )


class Neftune(Model):
    alpha: float = spec_field(
        "train",
        "Strength of the noise: uniform up to alpha / sqrt(tokens of the row * width); 5 to 15 are usual.",
        required=True,
        gt=0,
        le=1000,
    )


class Loss(Model):
    rules: ClassVar[tuple[Rule, ...]] = (only_with("type", values=("focal",), fields=("gamma",)),)

    type: LossType = spec_field(
        "train",
        "cross-entropy, or focal, in which labels that the model is sure of count less.",
        required=True,
    )
    gamma: float | None = spec_field(
        "train",
        "By how much less: labels count (1 - p)^gamma, with p the model's probability. Default: 2.",
        ge=1,
        le=10,
    )


class Training(Model):
    rules: ClassVar[tuple[Rule, ...]] = (at_most_one_of("epochs", "maxSteps"),)

    epochs: float | None = spec_field("train", "How often each row is seen. Default: 3.", gt=0, le=1000)
    max_steps: int | None = spec_field("train", "Optimizer steps, instead of epochs.", ge=1, le=10_000_000)
    batch_size: int | None = spec_field(
        "train",
        "Rows per optimizer step over the whole job, whatever the number of GPUs; with packing, full sequences of data.maxLength "
        "tokens. Default: 32.",
        ge=1,
        le=65536,
    )
    learning_rate: float | None = spec_field(
        "train",
        "Peak learning rate. Default: 2e-5 for full, 1e-3 for head, 2e-4 for lora, qlora and dora, 1e-3 for adapter, 3e-3 for ia3, 3e-2 for prompt, 1e-2 for prefix; with optimizer sgd 1e-2.",
        gt=0,
        le=10,
    )
    schedule: Schedule | None = spec_field(None, "Learning rate over time. Default: linear.")
    optimizer: Optimizer | None = spec_field(None, "What turns gradients into steps. Default: adamw.")
    layerwise_decay: float | None = spec_field(
        "train",
        "Factor of the learning rate from each layer to the one below it, from the head down to the embeddings. "
        "Default: 1, the same rate everywhere.",
        gt=0,
        le=1,
    )
    dropout: float | None = spec_field(
        "train",
        "Every dropout that the model's configuration names; a model without one is refused. Default: the model's own.",
        ge=0,
        lt=1,
    )
    loss: Loss | None = spec_field(None, "What training makes small, over labels. Default: cross-entropy.")
    label_smoothing: float | None = spec_field(
        "train", "Share of each label that is spread evenly over all labels. Default: 0.", ge=0, lt=1
    )
    class_weights: Literal["balanced"] | None = spec_field(
        "train",
        "balanced: labels weigh in the loss by how rare they are among the training rows. Default: all weigh the same.",
    )
    ema: Ema | None = spec_field(
        None, "A running mean of the weights is evaluated and published in their place. Default: off."
    )
    l2sp: L2sp | None = spec_field(
        None,
        "Pulls the weights of the base that train towards what they were, against forgetting. Default: off.",
        alias="l2sp",  # not l2Sp
    )
    neftune: Neftune | None = spec_field(None, "Noise on the token embeddings while training. Default: off.")
    max_grad_norm: float | None = spec_field("train", "Gradients are clipped to this norm. Default: 1.0.", gt=0)
    precision: Literal["auto", "fp32", "bf16"] | None = spec_field(
        "train", "Arithmetic. Default: auto, bf16 where the GPU has it, else fp32, kept for the whole run."
    )
    micro_batch: int | None = spec_field(
        "attempt",
        "Rows that go through the model at once; batchSize is cut into such pieces, which are halved when memory runs out. "
        "Default: 16 on CPUs and 64 on GPUs, fewer where rows may have more than 512 tokens, and at most a GPU's share of "
        "the batch.",
        ge=1,
        le=65536,
    )
    gradient_checkpointing: bool | None = spec_field(
        "attempt",
        "Activations are computed again in the backward pass instead of kept: less memory, about a third slower, the same "
        "result. Default: false.",
    )
    packing: bool | None = spec_field(
        "train",
        "Several rows share one sequence of data.maxLength tokens, none seeing another, so that nothing is spent on padding. "
        "Default: where the model proves at the start to answer packed rows as it answers them alone; true refuses another.",
    )
    seed: int | None = spec_field("train", "Seed of everything random. Default: 17.", ge=0, le=2**31 - 1)
    evaluate_every: Every | None = spec_field(None, "How often the validation rows are evaluated. Default: epochs 1.")
    early_stopping: EarlyStopping | None = spec_field(None, "When training ends before its last step. Default: never.")


class Generation(Model):
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "(has(self.strategy) && self.strategy == 'beam') || !(has(self.beams) || has(self.lengthPenalty))",
            "beams and lengthPenalty go only with strategy: beam",
            lambda model: model.strategy == "beam" or (model.beams is None and model.length_penalty is None),
        ),
    )

    strategy: Strategy | None = spec_field(
        "evaluate",
        "How text is written: the most likely token each time (greedy), or the best of several beams. Evaluations during "
        "training are always greedy. Default: greedy.",
    )
    beams: int | None = spec_field("evaluate", "Beams that are followed. Default: 4.", ge=2, le=64)
    max_new_tokens: int | None = spec_field(
        "evaluate", "Tokens that are written at most. Default: data.maxTargetLength.", ge=1, le=131072
    )
    length_penalty: float | None = spec_field(
        "evaluate",
        "Exponent of the length that a beam's score is divided by: above 0 longer texts win. Default: the base's own.",
        ge=-10,
        le=10,
    )


Bound = Annotated[float, Field(ge=-1e12, le=1e12)]


class Gate(Model):
    rules: ClassVar[tuple[Rule, ...]] = (
        exactly_one_of("atLeast", "atMost", "improvesBaselineBy"),
        Rule(
            "self.metric != 'slice-gap' || has(self.atMost)",
            "a gate on slice-gap goes with atMost: the smaller the gap, the better",
            lambda model: model.metric != "slice-gap" or model.at_most is not None,
        ),
    )

    metric: MetricName = spec_field(
        "judge",
        "What is judged: one of the task's metrics; memorisation, the share of training rows that a model which writes text goes on "
        "with word for word; or slice-gap, the widest gap of evaluation.primary between two values of a column of evaluation.slices.",
        required=True,
    )
    at_least: Bound | None = spec_field("judge", "The metric must not be lower.")
    at_most: Bound | None = spec_field("judge", "The metric must not be higher.")
    improves_baseline_by: Bound | None = spec_field(
        "judge",
        "The metric must be better than the best baseline by so much; with a metric of which less is better, lower by so much.",
    )


def _retained_role(role: str) -> Rule:
    """A column may be named only for a retention set that reads it."""
    allowed = tuple(name for name in get_args(RetentionType) if name in tasks_with(role))
    return Rule(
        f"self.type in {list(allowed)} || !has(self.columns) || !has(self.columns.{role})",
        f"columns.{role} of a retention set goes only with type: {' or '.join(allowed)}",
        lambda task: task.type in allowed or at(task, f"columns.{role}") is None,
    )


class RetentionColumns(Model):
    text: Column | None = spec_field("evaluate", "Column that holds the text. Default: text.")
    label: Column | None = spec_field("evaluate", "Column that holds the label. Default: label.")
    pair: Column | None = spec_field("evaluate", "Column that holds a second text. Default: none.")
    summary: Column | None = spec_field("evaluate", "Column that holds the summary of a text. Default: summary.")
    source: Column | None = spec_field("evaluate", "Column that holds the text to translate. Default: source.")
    target: Column | None = spec_field("evaluate", "Column that holds its translation. Default: target.")
    image: Column | None = spec_field("evaluate", "Column that holds the image. Default: image.")


class RetentionTask(Model):
    rules: ClassVar[tuple[Rule, ...]] = (
        *(_retained_role(role) for role in RetentionColumns.model_fields),
        only_with("type", values=("translation",), fields=("sourceLanguage", "targetLanguage")),
        only_with("type", values=("summarization", "translation"), fields=("prefix",)),
    )

    type: RetentionType = spec_field("evaluate", "What the rows are of.", required=True)
    columns: RetentionColumns | None = spec_field(None, "Names of the columns in the set's files.")
    source_language: Language | None = spec_field("evaluate", "As task.sourceLanguage.")
    target_language: Language | None = spec_field("evaluate", "As task.targetLanguage.")
    prefix: Prefix | None = spec_field("evaluate", "As task.prefix.")


class RetentionData(Model):
    uri: SourceUri = spec_field("evaluate", "The set's rows, as in data.train.", required=True)


def _kept(name: str, kind: TaskKind) -> Rule:
    """The metric of a retention set is one of its task's."""
    return Rule(
        f"self.task.type != '{name}' || !has(self.metric) || self.metric in {list(kind.kept)}",
        f"the metric of a retention set of {name} is {' or '.join(kind.kept)}",
        lambda model: at(model, "task.type") != name or model.metric is None or model.metric in kind.kept,
    )


def _bounded(field: str, *, falling: bool) -> Rule:
    """Which bound makes sense is a matter of the direction of the metric."""
    types, how = retention_types(falling=falling), "falls" if falling else "rises"
    return Rule(
        f"!has(self.{field}) || self.task.type in {list(types)}",
        f"{field} goes with task.type: {' or '.join(types)}, whose metric {how} when a model forgets",
        lambda model: at(model, field) is None or at(model, "task.type") in types,
    )


class Retention(Model):
    rules: ClassVar[tuple[Rule, ...]] = (
        at_most_one_of("maxDrop", "maxRisePercent"),
        *(_kept(name, TASKS[name]) for name in get_args(RetentionType)),
        _bounded("maxDrop", falling=True),
        _bounded("maxRisePercent", falling=False),
    )

    name: PartName = spec_field("evaluate", "Names the set in status, report and model card.", required=True)
    task: RetentionTask = spec_field(None, "What the rows are of.", required=True)
    data: RetentionData = spec_field(None, "The rows, which should not be among the training rows.", required=True)
    metric: MetricName | None = spec_field(
        "evaluate",
        "What is measured: perplexity or loss of causal-lm, loss of summarization and translation, probe-accuracy of "
        "classification: the accuracy of a linear probe on frozen features of the trunk. Default: the first of these.",
    )
    max_drop: float | None = spec_field("judge", "The metric must not fall by more than this.", ge=0, le=1)
    max_rise_percent: float | None = spec_field(
        "judge", "The metric must not rise by more than this share of the base's.", ge=0, le=1e6
    )


class Evaluation(Model):
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.baseline) || self.baseline != 'None' || !has(self.gates) || "
            "!self.gates.exists(gate, has(gate.improvesBaselineBy))",
            "a gate with improvesBaselineBy needs a baseline: leave out baseline: None",
            lambda model: (
                model.baseline != "None" or all(at(gate, "improvesBaselineBy") is None for gate in model.gates or ())
            ),
        ),
        Rule(
            "has(self.slices) || !has(self.gates) || !self.gates.exists(gate, gate.metric == 'slice-gap')",
            "a gate on slice-gap needs slices",
            lambda model: (
                model.slices is not None or all(at(gate, "metric") != "slice-gap" for gate in model.gates or ())
            ),
        ),
        Rule(
            "!has(self.retention) || self.retention.all(one, self.retention.exists_one(other, other.name == one.name))",
            "give each of retention a name of its own",
            lambda model: (
                len({str(at(one, "name")) for one in _items(model.retention)}) == len(_items(model.retention))
            ),
        ),
    )

    primary: MetricName | None = spec_field(
        "train",
        "Metric that chooses the best checkpoint, one of the task's; f1, precision and recall are macro averages, for token-classification micro averages over entities. "
        "With multi-task mean, the mean of the tasks' own defaults, or that of one task, such as intent.f1. Default: by task, such as f1.",
    )
    metrics: list[MetricName] | None = spec_field(
        "evaluate",
        "Metrics that the status and the model card show beside evaluation.primary. Default: all of the task's.",
        min_length=1,
        max_length=32,
    )
    baseline: Literal["auto", "Base", "Probe", "Trivial", "None"] | None = spec_field(
        "evaluate",
        "What the tuned model is compared with: the untouched base, where it can do the task, a linear model on its frozen "
        "features, an answer that needs no model, or nothing. Default: auto, all that there are; gates take the best.",
    )
    slices: list[Column] | None = spec_field(
        "evaluate",
        "Columns whose values split the rows: metrics for each value with at least 20 rows, and the gap between the best and "
        "the worst, where bias shows. The first 100 values of a column count.",
        min_length=1,
        max_length=8,
    )
    gates: list[Gate] | None = spec_field(
        None,
        "What the model must reach, on data.test or, without it, on the validation rows; else the job fails and current.json "
        "stays as it is. Default: no gates.",
        min_length=1,
        max_length=16,
    )
    retention: list[Retention] | None = spec_field(
        None,
        "Sets of rows that the model must not forget: measured on the untouched base and on the published weights. Where a set "
        "has a bound that is broken, the job fails as with a gate. Default: none.",
        min_length=1,
        max_length=8,
    )


class CheckpointEvery(Model):
    rules: ClassVar[tuple[Rule, ...]] = (exactly_one_of("duration", "steps"),)

    duration: Duration | None = spec_field(
        "live", "Time between two checkpoints, such as 10m. A change holds from the next attempt on."
    )
    steps: int | None = spec_field(
        "live", "Optimizer steps between two checkpoints. A change holds from the next attempt on.", ge=1, le=10_000_000
    )


class Checkpoint(Model):
    every: CheckpointEvery | None = spec_field(
        None,
        "Time or steps between two checkpoints. Default: a minute, or longer where checkpoints would cost more than 1 % of the time.",
    )
    keep_last: int | None = spec_field(
        "live", "Checkpoints that are kept beside the best one. Default: 2.", ge=2, le=100
    )


class Output(Model):
    uri: Uri = spec_field("train", f"Where checkpoints, reports and the model go: {S3OrFile}.", required=True)
    merge: bool | None = spec_field(
        "publish",
        "Write a LoRA result as a plain model with the base merged in. Default: false, an adapter in PEFT's format.",
    )
    weights: Literal["Best", "Last"] | None = spec_field("publish", "Which weights are published. Default: Best.")


class Storage(Model):
    endpoint: Annotated[str, StringConstraints(pattern=r"^https?://[^ \t\r\n/]+/?$", max_length=512)] | None = (
        spec_field(
            "attempt", "Address of the S3 server. Default: the profile's, else AWS. Only what the profile allows."
        )
    )
    region: Annotated[str, StringConstraints(max_length=64)] | None = spec_field(
        "attempt", "Region of the S3 server. Default: the profile's, else us-east-1."
    )
    credentials_secret: Name | None = spec_field(
        "attempt",
        "Secret of the job's namespace with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and perhaps AWS_SESSION_TOKEN and HF_TOKEN, mounted "
        "as files. Default: the profile's, else the SDK's own chain (workload identity).",
    )


class PerNode(Model):
    gpus: int | None = spec_field("attempt", "GPUs a pod; 0 trains on CPUs. Default: 1.", ge=0, le=64)
    cpu: Quantity | None = spec_field("attempt", 'CPU request a pod, such as "4". Default: "2".')
    memory: Quantity | None = spec_field("attempt", "Memory request and limit a pod. Default: 8Gi.")


class Resources(Model):
    nodes: int | None = spec_field("attempt", "Pods that train together, one a node. Default: 1.", ge=1, le=512)
    per_node: PerNode | None = spec_field(None, "What each pod gets.")


_OURS = ("HOME", "JOB_COMPLETION_INDEX")


class EnvVar(Model):
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!(self.name in ['HOME', 'JOB_COMPLETION_INDEX']) && !self.name.startsWith('FINETUNE_')",
            "HOME, JOB_COMPLETION_INDEX and names that begin with FINETUNE_ are set by the operator",
            # str: the validator asks about documents whose types are still wrong
            lambda model: model.name not in _OURS and not str(model.name).startswith("FINETUNE_"),
        ),
    )

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)] = spec_field(
        "attempt", "Name of the environment variable.", required=True
    )
    value: Annotated[str, StringConstraints(max_length=4096)] = spec_field("attempt", "Its value.", required=True)


class Toleration(Model):
    key: Key | None = spec_field("attempt", "Taint key.")
    operator: Literal["Exists", "Equal"] | None = spec_field("attempt", "How the taint is compared. Default: Equal.")
    value: LabelValue | None = spec_field("attempt", "Taint value.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = spec_field(
        "attempt", "Effect of the taint. Default: every effect."
    )
    toleration_seconds: int | None = spec_field(
        "attempt", "Seconds for which a NoExecute taint is tolerated.", ge=0, le=2**31 - 1
    )


class PullSecret(Model):
    name: Name = spec_field("attempt", "Name of the Secret.", required=True)


class PodMetadata(Model):
    labels: dict[Key, LabelValue] | None = spec_field("attempt", "Added to the pods' labels.", max_length=32)
    annotations: dict[Key, Text] | None = spec_field("attempt", "Added to the pods' annotations.", max_length=32)


class PodSpec(Model):
    node_selector: dict[Key, LabelValue] | None = spec_field("attempt", "Labels the node must have.", max_length=32)
    tolerations: list[Toleration] | None = spec_field(None, "Taints the pods tolerate.", max_length=32)
    runtime_class_name: Name | None = spec_field("attempt", "RuntimeClass of the pods.")
    priority_class_name: Name | None = spec_field("attempt", "PriorityClass of the pods.")
    service_account_name: Name | None = spec_field(
        "attempt", "Service account of the pods, for workload identity. No API token is mounted. Default: default."
    )
    image_pull_secrets: list[PullSecret] | None = spec_field(None, "Secrets the images are pulled with.", max_length=8)
    termination_grace_period_seconds: int | None = spec_field(
        "attempt", "Time to commit a checkpoint when a pod is asked to stop. Default: 120.", ge=5, le=3600
    )
    env: list[EnvVar] | None = spec_field(None, "Environment variables of the trainer.", max_length=64)


class PodTemplate(Model):
    metadata: PodMetadata | None = spec_field(None, "Labels and annotations of the pods.")
    spec: PodSpec | None = spec_field(None, "The parts of a pod's spec that may be chosen.")


class Retries(Model):
    max: int | None = spec_field(
        "live", "Crashes after which the job fails; preemptions are free. Default: 3.", ge=0, le=100
    )


def _known(named: list[Any], metrics: Sequence[str]) -> bool:
    """Whether metrics are among these; what is no text has another problem."""
    return all(metric in metrics for metric in named if isinstance(metric, str))


def _gated(spec: Any) -> list[Any]:
    return [at(gate, "metric") for gate in _items(at(spec, "evaluation.gates"))]


def _primary(name: str, kind: TaskKind) -> Rule:
    """The primary metric is one of the task's."""
    options = ", ".join(f"'{metric}'" for metric in kind.metrics)
    return Rule(
        f"self.task.type != '{name}' || !has(self.evaluation) || !has(self.evaluation.primary) || "
        f"self.evaluation.primary in [{options}]",
        f"evaluation.primary for {name} is one of {', '.join(kind.metrics)}",
        lambda spec: at(spec, "task.type") != name or _known([at(spec, "evaluation.primary")], kind.metrics),
    )


def _metrics(name: str, kind: TaskKind) -> Rule:
    """So are those that are shown."""
    known = (*kind.metrics, *kind.later)
    options = ", ".join(f"'{metric}'" for metric in known)
    return Rule(
        f"self.task.type != '{name}' || !has(self.evaluation) || !has(self.evaluation.metrics) || "
        f"self.evaluation.metrics.all(metric, metric in [{options}])",
        f"evaluation.metrics for {name} are among {', '.join(known)}",
        lambda spec: at(spec, "task.type") != name or _known(_items(at(spec, "evaluation.metrics")), known),
    )


def _gates(name: str, kind: TaskKind) -> Rule:
    """And those that are judged."""
    known = (*kind.metrics, *kind.later)
    options = ", ".join(f"'{metric}'" for metric in known)
    return Rule(
        f"self.task.type != '{name}' || !has(self.evaluation) || !has(self.evaluation.gates) || "
        f"self.evaluation.gates.all(gate, gate.metric in [{options}, 'slice-gap'])",
        f"evaluation.gates for {name} judge {', '.join(known)} or slice-gap",
        lambda spec: at(spec, "task.type") != name or _known(_gated(spec), (*known, "slice-gap")),
    )


def _method(name: str, kind: TaskKind, method: MethodType) -> Rule:
    """Some methods make no sense with a task."""
    return Rule(
        f"self.task.type != '{name}' || !has(self.method) || self.method.type != '{method}'",
        f"method {method} does not go with {name}: {kind.refused[method]}",
        lambda spec: at(spec, "task.type") != name or at(spec, "method.type") != method,
    )


def _named(metric: str) -> str:
    """CEL that says whether a string is a metric of one of task.tasks, such as intent.f1."""
    kinds = " || ".join(
        f"(part.type == '{name}' && {list(TASKS[name].metrics)}.exists(name, {metric} == part.name + '.' + name))"
        for name in get_args(PartType)
    )
    return f"self.task.tasks.exists(part, {kinds})"


def _metrics_of_parts(spec: Any) -> list[str]:
    parts = [(at(part, "name"), str(at(part, "type"))) for part in _items(at(spec, "task.tasks"))]
    return [
        f"{name}.{metric}"
        for name, kind in parts
        for other in TASKS
        if other == kind
        for metric in TASKS[other].metrics
    ]


def _sourced(path: str) -> Rule:
    """Rows of several tasks come from files that name theirs, and every task has some."""
    names = path.split(".")
    there = " && ".join(f"has(self.{'.'.join(names[:end])})" for end in range(2, len(names) + 1))
    return Rule(
        f"self.task.type != 'multi-task' || !has(self.task.tasks) || !({there}) || "
        f"(self.task.tasks.all(part, self.{path}.exists(source, has(source.task) && source.task == part.name)) && "
        f"self.{path}.all(source, has(source.task) && self.task.tasks.exists(part, part.name == source.task)))",
        f"with multi-task each source in {path} names one of task.tasks as its task, and each of these has a source",
        lambda spec: (
            at(spec, "task.type") != "multi-task"
            or not _items(at(spec, "task.tasks"))
            or not _items(at(spec, path))
            or {str(at(source, "task")) for source in at(spec, path)}
            == {str(at(part, "name")) for part in at(spec, "task.tasks")}
        ),
    )


def _judged(field: str, cel: str, metric: str, named: Callable[[Any], list[Any]], more: tuple[str, ...] = ()) -> Rule:
    """Metrics of several tasks are `mean`, `loss`, or those of one task; `cel` says it with a place for "is one"."""
    own = (*TASKS["multi-task"].metrics, *more)
    return Rule(
        "self.task.type != 'multi-task' || !has(self.task.tasks) || !has(self.evaluation) || "
        + cel.format(f"({metric} in {list(own)} || {_named(metric)})"),
        f"evaluation.{field} for multi-task: {', '.join(own)}, or NAME.METRIC with the name of one of task.tasks and a metric "
        "of its type",
        lambda spec: (
            at(spec, "task.type") != "multi-task"
            or not _items(at(spec, "task.tasks"))
            or _known(named(spec), [*own, *_metrics_of_parts(spec)])
        ),
    )


_OF_PARTS: tuple[Rule, ...] = (
    *(_sourced(path) for path in ("data.train", "data.validation.sources", "data.test.sources")),
    Rule(
        "self.task.type == 'multi-task' || self.data.train.all(source, !has(source.task))",
        "data.train[].task goes only with task.type: multi-task",
        lambda spec: (
            at(spec, "task.type") == "multi-task"
            or all(at(source, "task") is None for source in _items(at(spec, "data.train")))
        ),
    ),
    *(
        only_beside(path, "task.type", values=("multi-task",), default="")
        for path in ("data.validation.sources", "data.test.sources")
    ),
    _judged(
        "primary",
        "!has(self.evaluation.primary) || {0}",
        "self.evaluation.primary",
        lambda spec: [at(spec, "evaluation.primary")],
    ),
    _judged(
        "metrics",
        "!has(self.evaluation.metrics) || self.evaluation.metrics.all(metric, {0})",
        "metric",
        lambda spec: _items(at(spec, "evaluation.metrics")),
    ),
    _judged(
        "gates",
        "!has(self.evaluation.gates) || self.evaluation.gates.all(gate, {0})",
        "gate.metric",
        _gated,
        more=("slice-gap",),
    ),
)
_WRITE_TEXTS = f"part.type in {list(WRITING_PARTS)}"


def _write_texts(spec: Any) -> list[bool]:
    """Which of several tasks do; all of them or none, or another rule is broken."""
    return [at(part, "type") in WRITING_PARTS for part in _items(at(spec, "task.tasks"))]


def _of_texts(field: str, *, values: tuple[str, ...]) -> Rule:
    """What says how texts are written goes with tasks that write some, and with several of them."""
    return Rule(
        f"!({has_path(field)}) || self.task.type in {list(values)} || (self.task.type == 'multi-task' && "
        f"(!has(self.task.tasks) || self.task.tasks.exists(part, {_WRITE_TEXTS})))",
        f"{field} goes only with task.type: {', '.join(values[:-1])} or {values[-1]}, or multi-task of tasks that "
        "write texts",
        lambda spec: (
            at(spec, field) is None
            or at(spec, "task.type") in values
            or (at(spec, "task.type") == "multi-task" and any(_write_texts(spec) or [True]))
        ),
    )


_HEADLESS = Rule(
    "self.task.type != 'multi-task' || !has(self.task.tasks) || !has(self.method) || self.method.type != 'head' || "
    f"!self.task.tasks.exists(part, {_WRITE_TEXTS})",
    f"method head does not go with tasks that write texts: {TASKS['summarization'].refused['head']}",
    lambda spec: (
        at(spec, "task.type") != "multi-task" or at(spec, "method.type") != "head" or not any(_write_texts(spec))
    ),
)


def _retention(name: str, kind: TaskKind, *, writes: bool | None = None) -> Rule:
    """What a model has kept is measured on rows that its like can be asked about. `writes`: which of the two kinds of
    several tasks is meant."""
    parts = f"self.task.tasks.exists(part, {_WRITE_TEXTS})"
    meant = "" if writes is None else f"!has(self.task.tasks) || {'!' if writes else ''}{parts} || "
    what = name if writes is None else f"{name} of tasks that {'write texts' if writes else 'have heads'}"
    return Rule(
        f"self.task.type != '{name}' || {meant}!has(self.evaluation) || !has(self.evaluation.retention) || "
        f"self.evaluation.retention.all(one, one.task.type in {list(kind.retains)})",
        f"evaluation.retention for {what} goes only with sets of {' or '.join(kind.retains)}: what counts there is {kind.retains_by}",
        lambda spec: (
            at(spec, "task.type") != name
            or (writes is not None and any(_write_texts(spec)) != writes)
            or _known([at(one, "task.type") for one in _items(at(spec, "evaluation.retention"))], kind.retains)
        ),
    )


_UNMERGED = ("adapter", "prompt", "prefix")
"""Methods without weights that could be folded into the base."""


class FineTuneJobSpec(Model):
    rules: ClassVar[tuple[Rule, ...]] = (
        *(
            rule(name, kind)
            for name, kind in TASKS.items()
            if name != "multi-task"
            for rule in (_primary, _metrics, _gates)
        ),
        *_OF_PARTS,
        *(_retention(name, kind) for name, kind in TASKS.items() if name != "multi-task"),
        _retention("multi-task", TASKS["multi-task"], writes=False),
        _retention("multi-task", TASKS["summarization"], writes=True),
        *(_method(name, kind, method) for name, kind in TASKS.items() for method in kind.refused),
        _HEADLESS,
        *(
            never_beside(field, "task.type", values=(name,), reason=reason)
            for name, kind in TASKS.items()
            for field, reason in kind.without.items()
        ),
        Rule(
            f"!has(self.output.merge) || !self.output.merge || !has(self.method) || !(self.method.type in {list(_UNMERGED)})",
            "output.merge makes no sense with method adapter, prompt or prefix: what they learn cannot be folded into weights",
            lambda spec: at(spec, "output.merge") is not True or at(spec, "method.type") not in _UNMERGED,
        ),
        _of_texts("generation", values=GENERATING),
        _of_texts("data.maxTargetLength", values=WITH_TARGETS),
        Rule(
            f"!has(self.data.overlong) || self.data.overlong != 'Split' || self.task.type in {list(SPLITTING)}",
            f"data.overlong Split goes only with task.type: {' or '.join(SPLITTING)}",
            lambda spec: at(spec, "data.overlong") != "Split" or at(spec, "task.type") in SPLITTING,
        ),
        only_beside("training.packing", "task.type", values=PACKING, default="text-classification"),
        only_beside("training.loss", "task.type", values=CLASSIFYING, default=""),
        only_beside("training.labelSmoothing", "task.type", values=CLASSIFYING, default=""),
        only_beside("training.classWeights", "task.type", values=CLASSIFYING, default=""),
        never_beside(
            "training.labelSmoothing",
            "training.loss.type",
            values=("focal",),
            reason="which weighs by the probability of one label alone",
        ),
        only_beside("training.l2sp", "method.type", values=("full",), default="full"),
        never_beside(
            "training.layerwiseDecay",
            "method.type",
            values=("head", "prompt", "prefix"),
            reason="in which no layer of the trunk has a learning rate",
        ),
        never_beside(
            "training.gradientCheckpointing",
            "method.type",
            values=("prefix",),
            reason="whose learned keys and values a second forward pass would not see",
        ),
        never_beside(
            "training.neftune", "method.type", values=("head",), reason="whose trunk, embeddings too, stays as it is"
        ),
    )

    profile: Name | None = spec_field(
        "attempt", "FineTuneProfile with the platform's defaults. Default: the one named default."
    )
    task: Task = spec_field(None, "What the model learns to do.", required=True)
    model: ModelSource = spec_field(None, "The base model.", required=True)
    data: Data = spec_field(None, "The rows.", required=True)
    method: Method | None = spec_field(None, "How the weights are tuned. Default: full.")
    training: Training | None = spec_field(None, "Hyperparameters.")
    generation: Generation | None = spec_field(None, "How text is written when the result is measured and used.")
    evaluation: Evaluation | None = spec_field(None, "How the result is measured.")
    checkpoint: Checkpoint | None = spec_field(None, "How often progress is committed to storage.")
    output: Output = spec_field(None, "Where the result goes.", required=True)
    storage: Storage | None = spec_field(None, "How object storage is reached.")
    resources: Resources | None = spec_field(None, "What the pods get.")
    pod_template: PodTemplate | None = spec_field(None, "What else the pods need.")
    retries: Retries | None = spec_field(None, "What happens after crashes.")


# --- status ---

Phase = Literal[
    "Pending", "Preflight", "Queued", "Starting", "Training", "Evaluating", "Succeeded", "Failed", "Suspended"
]
Time = Annotated[str, Field(json_schema_extra={"format": "date-time"}, max_length=40)]
Figure = Annotated[float, AfterValidator(lambda value: float(f"{value:.5g}"))]
"""A measured number, to five digits: more of them say nothing and fill the screen."""
Metrics = Annotated[dict[Annotated[str, StringConstraints(max_length=64)], Figure], Field(max_length=32)]


class RunStatus(Model):
    id: str = Field(description="Hash of everything that determines the weights.", max_length=64)
    generation: int = Field(description="metadata.generation this run was resolved from.")
    attempt: int | None = Field(None, description="Number of the attempt's claim in storage.")
    started_at: Time | None = Field(None, description="When the first attempt began.")
    interruptions: int | None = Field(
        None,
        description="How often in a row an attempt ended through no fault of its own and without one more committed step; at "
        "10 the run is given up.",
    )


class BestCheckpoint(Model):
    step: int = Field(description="Optimizer step of the best checkpoint.")
    metric: str = Field(description="The metric that chose it, evaluation.primary.", max_length=64)
    value: Figure = Field(description="Its value on the validation rows.")


class CheckpointStatus(Model):
    step: int = Field(description="Optimizer step of the last committed checkpoint.")
    uri: str | None = Field(None, description="Where it lies.", max_length=2048)
    committed_at: Time | None = Field(None, description="When it was committed.")
    best: BestCheckpoint | None = Field(None, description="The best one so far.")


class ProgressStatus(Model):
    step: int = Field(description="Optimizer steps done.")
    total_steps: int = Field(description="Optimizer steps to do.")
    epoch: Figure | None = Field(None, description="How often the training rows were seen so far.")
    percent: int = Field(description="Share of the steps done.")
    loss: Figure | None = Field(None, description="Training loss of the last steps, a mean over labels.")
    learning_rate: Figure | None = Field(None, description="Learning rate of the last step.")
    samples_per_second: Figure | None = Field(None, description="Training rows per second over the whole job.")
    estimated_completion_time: Time | None = Field(None, description="When the last step is expected to be done.")
    updated_at: Time | None = Field(None, description="When the trainer said this.")


class Restart(Model):
    attempt: int = Field(description="The attempt that ended.")
    reason: str = Field(description="Why it ended, in one word.", max_length=64)
    at: Time = Field(description="When it ended.")
    resumed_from_step: int | None = Field(None, description="Step of the checkpoint the next attempt began with.")
    lost_steps: int | None = Field(None, description="Steps that had to be done again.")


class RowCounts(Model):
    train: int = Field(description="Rows trained on.")
    validation: int = Field(description="Rows that choose the best checkpoint.")
    test: int | None = Field(None, description="Rows of data.test.")


class TokenLengths(Model):
    p50: int = Field(description="Half of the rows have at most so many tokens.")
    p95: int | None = Field(None, description="95 of 100 rows have at most so many tokens.")
    p99: int = Field(description="99 of 100 rows have at most so many tokens.")
    max: int = Field(
        description="Tokens of the longest row; of one far longer than data.maxLength about how many, by its beginning."
    )


class DroppedRows(Model):
    duplicates: int = Field(description="Training rows that repeat an earlier one exactly.")
    near_duplicates: int = Field(description="Training rows that nearly repeat an earlier one.")
    leaked: int = Field(description="Training rows whose content is among the validation or test rows.")
    overlong: int = Field(description="Rows longer than data.maxLength.")


class AuditFigure(Model):
    name: Literal["near-duplicates", "card", "iban", "ip", "email", "phone", "unknown-tokens"] = Field(
        description="What was found: rows that nearly repeat another, rows with suspected personal data, or tokens that the "
        "tokenizer does not know."
    )
    percent: Figure = Field(description="Share of the rows, or of the tokens.")
    exact: bool = Field(description="Counted in all rows, or estimated from 20,000.")
    low: Figure | None = Field(None, description="Lower end of the 95 % interval of an estimate.")
    high: Figure | None = Field(None, description="Upper end.")


class PreflightStatus(Model):
    rows: RowCounts | None = Field(None, description="Rows found.")
    labels: int | None = Field(None, description="Number of labels.")
    form: str | None = Field(
        None, description="How the rows are written, such as one label or a list of labels.", max_length=640
    )
    tokens: TokenLengths | None = Field(None, description="Lengths of the rows, before any cut.")
    truncated_percent: Figure | None = Field(None, description="Share of rows longer than data.maxLength.")
    dropped: DroppedRows | None = Field(None, description="Rows that are left out.")
    audit: list[AuditFigure] | None = Field(
        None, description="What the search of data.audit has found; nothing where all is well.", max_length=8
    )
    warnings: list[Text] | None = Field(
        None, description="What looks wrong but stops nothing; the first ten.", max_length=10
    )
    steps: int | None = Field(None, description="Optimizer steps of the whole run, unless it is stopped early.")
    predicted_memory: Quantity | None = Field(
        None,
        description="What training is predicted to take at most of a GPU's memory, or without GPUs of a pod's; absent where "
        "the architecture of the base is not known.",
    )
    report_uri: str | None = Field(None, description="The full report.", max_length=2048)


class Interval(Model):
    low: Figure = Field(description="Lower end.")
    high: Figure = Field(description="Upper end.")


class Gain(Model):
    metric: str = Field(description="The metric, evaluation.primary.", max_length=64)
    over: str = Field(description="The best baseline: trivial, base or probe.", max_length=64)
    value: Figure = Field(description="By how much the tuned model is better on the same rows.")
    low: Figure | None = Field(None, description="Lower end of its 95 % interval.")
    high: Figure | None = Field(None, description="Upper end of its 95 % interval.")


class GateStatus(Model):
    metric: str = Field(description="What was judged.", max_length=64)
    passed: bool = Field(description="Whether the gate is met.")
    value: Figure | None = Field(None, description="What was measured; absent where it could not be.")
    wanted: str = Field(description="What was asked for, in a few signs such as >= 0.8.", max_length=128)


class SliceStatus(Model):
    column: str = Field(description="The column.", max_length=256)
    gap: Figure | None = Field(None, description="By how much evaluation.primary is better for the best value.")
    low: Figure | None = Field(None, description="Lower end of its 95 % interval.")
    high: Figure | None = Field(None, description="Upper end of its 95 % interval.")
    best: str | None = Field(None, description="The value with the best rows.", max_length=256)
    worst: str | None = Field(None, description="The value with the worst rows.", max_length=256)
    equalized_odds: Figure | None = Field(
        None, description="Largest difference of true or false positive rates of a label between two values."
    )


class RetentionStatus(Model):
    name: str = Field(description="The set of evaluation.retention.", max_length=40)
    metric: str = Field(description="What was measured on it.", max_length=64)
    rows: int = Field(description="Rows it was measured on.")
    base: Figure | None = Field(None, description="The metric of the untouched base.")
    tuned: Figure | None = Field(None, description="The metric of the published model.")
    difference: Figure | None = Field(None, description="By how much tuned is above base.")
    low: Figure | None = Field(None, description="Lower end of its 95 % interval.")
    high: Figure | None = Field(None, description="Upper end of its 95 % interval.")
    wanted: str | None = Field(
        None, description="The bound, such as a rise of at most 5 %; absent where there is none.", max_length=64
    )
    passed: bool | None = Field(None, description="Whether the bound is kept.")


class EvaluationStatus(Model):
    rows: int | None = Field(None, description="Rows the metrics were measured on.")
    on: Literal["test", "validation"] | None = Field(None, description="Which rows they were.")
    trivial: Metrics | None = Field(
        None, description="An answer that needs no model: the most frequent label; docs/tasks.md names each task's."
    )
    base: Metrics | None = Field(None, description="The untouched base model, where it can do the task.")
    probe: Metrics | None = Field(None, description="A linear model on the frozen features of the base.")
    tuned: Metrics | None = Field(None, description="The published model.")
    intervals: dict[Annotated[str, StringConstraints(max_length=64)], Interval] | None = Field(
        None,
        description="95 % bootstrap intervals of the published model: of evaluation.primary, and of the metrics asked for.",
        max_length=32,
    )
    gain: Gain | None = Field(None, description="The published model beside the best baseline.")
    train: Metrics | None = Field(
        None,
        description="The published model on training rows: far better values than those of tuned mean overfitting.",
    )
    slices: list[SliceStatus] | None = Field(None, description="What depends on the values of columns.", max_length=8)
    gates: list[GateStatus] | None = Field(None, description="Each gate, and whether it is met.", max_length=16)
    retention: list[RetentionStatus] | None = Field(
        None, description="What the model has kept of what the base knew, set by set.", max_length=8
    )
    warnings: list[Text] | None = Field(
        None, description="What should be known before the figures are trusted; the first ten.", max_length=10
    )


class ModelStatus(Model):
    uri: str = Field(description="Directory of the model, readable by from_pretrained.", max_length=2048)
    digest: str = Field(description="SHA-256 over its files.", max_length=80)
    size_bytes: int = Field(description="Size of its files in bytes.")
    report_uri: str | None = Field(
        None, description="report.html: what was measured, and where it errs; opens with no network.", max_length=2048
    )
    trainable_parameters: int | None = Field(None, description="Parameters that were trained.")
    parameters: int | None = Field(None, description="Parameters of the model, with what the method added.")


class Usage(Model):
    gpu_seconds: int | None = Field(None, description="Seconds times GPUs, over all attempts.")
    attempts: int | None = Field(None, description="Attempts so far.")
    lost_steps: int | None = Field(None, description="Steps done again, over all attempts.")


class Condition(Model):
    type: str = Field(
        description="Accepted, PreflightPassed, Evaluated, Succeeded, Suspended, Reconciling or Stalled.", max_length=64
    )
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: str = Field(description="Why, in one word.", max_length=128)
    message: str = Field(description="Why, in a sentence.", max_length=2048)
    last_transition_time: Time = Field(description="When status last changed.")
    observed_generation: int = Field(description="The generation it speaks of.")


class FineTuneJobStatus(Model):
    observed_generation: int = Field(-1, description="The generation this status speaks of.")
    phase: Phase | None = Field(None, description="Where the job is.")
    message: str | None = Field(None, description="The same in a sentence.", max_length=2048)
    run: RunStatus | None = Field(None, description="The run: what the document resolved to.")
    progress: ProgressStatus | None = Field(None, description="How far training is.")
    checkpoint: CheckpointStatus | None = Field(None, description="What is committed to storage.")
    restarts: list[Restart] | None = Field(None, description="The last ten.", max_length=10)
    preflight: PreflightStatus | None = Field(None, description="What was found out before training.")
    evaluation: EvaluationStatus | None = Field(None, description="Metrics of the last evaluation.")
    model: ModelStatus | None = Field(None, description="The last published one, until another is committed.")
    usage: Usage | None = Field(None, description="What it has cost so far.")
    last_handled_retry: str | None = Field(
        None, description="The annotation finetune.dev/retry that was last acted upon.", max_length=256
    )
    conditions: list[Condition] | None = Field(None, description="The same for programs (kstatus).", max_length=16)


class FineTuneJob(Model):
    """Asks for a model: this base, tuned on these rows in this way, evaluated, and published at this address."""

    api_version: Literal["finetune.dev/v1alpha1"]
    kind: Literal["FineTuneJob"]
    metadata: dict[str, Any]
    spec: FineTuneJobSpec = Field(description="What is asked for.")
    status: FineTuneJobStatus | None = Field(None, description="What the operator says of it.")
