"""spec.task and spec.model: what is learned, from which columns, and what it starts from."""

from typing import ClassVar, Literal

from pydantic.alias_generators import to_snake

from finetune_api.base import Model, Rule, at, items, only_with, spec_field
from finetune_api.scalars import Column, Label, Language, License, PartName, Prefix, S3OrFile, SourceUri, Template
from finetune_api.tasks import LABELLED_PARTS, ROLES, TASKS, WRITING_PARTS, PartType, TaskType, tasks_with


def _role(role: str) -> Rule:
    """A column may be named only for a task that reads it."""
    allowed = tasks_with(role)
    options = ", ".join(f"'{name}'" for name in allowed)
    return Rule(
        f"self.type in [{options}]",
        f"columns.{role} goes only with type: {' or '.join(allowed)}",
        lambda task: task.type in allowed or at(task, f"columns.{role}") is None,
        on=f"columns.{role}",
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
            "self.tasks.all(one, self.tasks.exists_one(other, other.name == one.name))",
            "give each of tasks a name of its own",
            lambda task: len({str(at(part, "name")) for part in items(task.tasks)}) == len(items(task.tasks)),
            on="tasks",
        ),
        Rule(
            f"self.tasks.all(one, one.type in {list(WRITING_PARTS)}) || "
            f"!self.tasks.exists(one, one.type in {list(WRITING_PARTS)})",
            "all of tasks have heads on one encoder (text-classification, token-classification), or all write texts "
            "with one encoder-decoder (summarization, translation): no model is both",
            lambda task: len({at(part, "type") in WRITING_PARTS for part in items(task.tasks)}) < 2,
            on="tasks",
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
