"""What tasks of causal language models share."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from math import exp
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.data.batch import Encoded
from finetune_trainer.data.order import Rows
from finetune_trainer.data.packing import positions_of
from finetune_trainer.data.read import DataError
from finetune_trainer.data.text import Text
from finetune_trainer.tasks.base import IGNORED, Learner, Metrics, Outcomes, Tools, mask_of, mean_loss, padded
from finetune_trainer.tasks.continued import Spans, reproduced

if TYPE_CHECKING:
    from finetune_trainer.nexttoken import NextToken


class LanguageLearner(Learner):
    """Learns the next token at labelled positions, by themselves or several rows to a sequence."""

    auto_class = "AutoModelForCausalLM"
    targets: ClassVar[frozenset[str]] = frozenset({"labels"})
    packs = True
    logits = "chunked"

    @cached_property
    def _next(self) -> "NextToken":
        from finetune_trainer.nexttoken import NextToken

        return NextToken()

    @abstractmethod
    def labels(self, store: Encoded, rows: Rows) -> list[NDArray[Any]]:
        """For each token of each row itself, or IGNORED where it is not to be predicted; the first one never is."""

    def collate(self, store: Encoded, rows: Rows) -> dict[str, NDArray[Any]]:
        texts = store.each("input_ids", rows)
        return {
            "input_ids": padded(texts, self.facts.pad_token_id),
            "attention_mask": mask_of(texts),
            "labels": padded(self.labels(store, rows), IGNORED),
        }

    def collate_packs(self, store: Encoded, packs: Sequence[Rows]) -> dict[str, NDArray[Any]]:
        """Positions count from 0 in each row, and there is no mask: that is how models tell the rows apart."""
        texts = [store.each("input_ids", rows) for rows in packs]
        ids = padded([np.concatenate(rows) for rows in texts], self.facts.pad_token_id)
        places = [positions_of([len(row) for row in rows], width=ids.shape[1]) for rows in texts]
        labels = padded([np.concatenate(self.labels(store, rows)) for rows in packs], IGNORED)
        return {"input_ids": ids, "position_ids": np.stack(places), "labels": labels}

    def packing_differs(self, model: Any, packed: Mapping[str, Any], alone: Sequence[Mapping[str, Any]]) -> str | None:
        from finetune_trainer.nexttoken import packing_differs

        return packing_differs(model, self.model_inputs(packed), [self.model_inputs(row) for row in alone])

    def loss(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        return self._next.loss(model, self.model_inputs(inputs), inputs["labels"])

    def scores(self, model: Any, inputs: Mapping[str, Any]) -> Outcomes:
        """loss, count and correct of each row: sums over its labelled positions."""
        losses, hits = self._next.scores(model, self.model_inputs(inputs), inputs["labels"])
        return {
            "loss": losses.sum(-1).cpu().numpy(),
            "count": (inputs["labels"] != IGNORED).sum(-1).cpu().numpy(),
            "correct": hits.sum(-1).cpu().numpy(),
        }

    def reproduced(self, model: Any, inputs: Mapping[str, Any], asked: Spans) -> NDArray[np.bool_]:
        width = int(asked[:, 1].max())
        few = {name: value[:, :width] for name, value in self.model_inputs(inputs).items()}
        _, hits = self._next.scores(model, few, inputs["labels"][:, :width])
        return reproduced(hits.cpu().numpy(), asked - 1)  # a token is foretold by the position before it


def token_metrics(outcomes: Outcomes) -> Metrics:
    """Over all labelled positions."""
    found = mean_loss(outcomes)
    if "loss" in found:
        found["perplexity"] = exp(min(found["loss"], 700.0))  # beyond that there is no such number
    if "correct" in outcomes:
        found["token-accuracy"] = float(outcomes["correct"].sum() / max(1, outcomes["count"].sum()))
    return found


def check_causal(tools: Tools) -> Text:
    """The tokenizer of a model that could be a causal language model. Raises DataError ModelUnsuitable."""
    assert tools.text is not None
    kinds = [str(name) for name in tools.model.get("architectures") or []]
    if tools.model.get("is_encoder_decoder") or (kinds and all(name.endswith("MaskedLM") for name in kinds)):
        raise DataError(
            "ModelUnsuitable",
            f"The base model ({', '.join(kinds) or tools.model.get('model_type')}) is no causal language model; give "
            "one such as GPT-2 or Llama.",
        )
    return tools.text


def end_of(text: Text) -> int:
    """The id of the token that ends a text. Raises DataError ModelIncomplete."""
    end = text.special("eos")
    if end is None:
        raise DataError(
            "ModelIncomplete",
            "Neither tokenizer_config.json nor config.json names a token that ends a text, without which the model "
            "would never learn to stop; add eos_token_id to config.json.",
        )
    return end
