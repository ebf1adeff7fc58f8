"""spec.training and spec.generation: how weights are changed, and how text is written."""

from typing import ClassVar, Literal

from finetune_api.base import Model, Rule, at_most_one_of, exactly_one_of, only_with, spec_field
from finetune_api.scalars import LossType, OptimizerType, ScheduleType, Share, Strategy


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
