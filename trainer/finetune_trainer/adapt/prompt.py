"""Learned tokens before each row (Lester et al. 2021) or learned keys and values before each layer's (Li and Liang
2021), by PEFT. The base stays as it is, and so there is nothing to merge.

Tokens before a row lengthen the model's answer by as many positions. Tasks know nothing of that: while we train and
evaluate, those positions are cut off. Whoever loads the adapter with PEFT sees them; the model card says so.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finetune_api.contract import MethodConfig
from finetune_trainer.adapt.base import Inputs, InputsOf, Shortcut
from finetune_trainer.adapt.with_peft import TOLERANCE, PeftMethod, saved_whole, task_type
from finetune_trainer.data.order import Rows
from finetune_trainer.layers import plain_of
from finetune_trainer.model import Loaded, ModelError
from finetune_trainer.world import World

_BY_POSITION = ("logits", "start_logits", "end_logits")
_LONGER = ("CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS")
"""Kinds of models that answer for each position of the input."""


class Prompt(PeftMethod):
    """Both kinds: type prompt and type prefix."""

    def __init__(self, config: MethodConfig) -> None:
        super().__init__(config)
        assert config.virtual_tokens is not None
        self._tokens: int = config.virtual_tokens

    def adapter(self, loaded: Loaded) -> Any:
        from peft import PrefixTuningConfig, PromptTuningConfig

        model = loaded.model
        common = {
            "task_type": task_type(model),
            "num_virtual_tokens": self._tokens,
            "modules_to_save": saved_whole(model, loaded.fresh),
            "num_attention_heads": model.config.num_attention_heads,
        }
        if self._config.type == "prefix":
            return PrefixTuningConfig(token_dim=model.config.hidden_size, **common)
        width = model.get_input_embeddings().embedding_dim
        return PromptTuningConfig(token_dim=width, prompt_tuning_init="SAMPLE_VOCAB", **common)

    def prepare(self, loaded: Loaded, *, seed: int) -> Any:
        if task_type(loaded.model) is None:
            raise ModelError(
                f"method.type {self._config.type} puts learned tokens before text, and {type(loaded.model).__name__} "
                "does not read text that way; use lora, adapter or head."
            )
        sample = _sample(loaded.model)
        before = _logits(loaded.model.eval(), sample)
        try:
            model = super().prepare(loaded, seed=seed).eval()
            after = _logits(model, sample)
        except (ValueError, TypeError, IndexError, RuntimeError, AttributeError) as error:
            raise self._refused(loaded.model, str(error).strip().partition("\n")[0].rstrip(".")) from error
        longer = self._config.type == "prompt" and model.active_peft_config.task_type in _LONGER
        if longer:
            model.register_forward_hook(_cut(self._tokens))
        self._prove(model, before=before, after=after, sample=sample)
        return model

    def _prove(self, model: Any, *, before: list[torch.Tensor], after: list[torch.Tensor], sample: Inputs) -> None:
        """Architectures differ in what they do with tokens that no input id stands for. Raises ModelError."""
        if all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(before, after, strict=False)):
            raise self._refused(model, "they change nothing in its answer")
        padded = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in sample.items()}
        for one, other in zip(_logits(model, sample), _logits(model, padded), strict=True):
            same = other[:, : one.shape[1]] if other.ndim > 1 else other
            if float((same - one).abs().max()) > TOLERANCE:
                raise self._refused(model, "padding would change its answer")

    def _refused(self, model: Any, why: str) -> ModelError:
        return ModelError(
            f"method.type {self._config.type}: {type(plain_of(model)).__name__} cannot be tuned by learned tokens "
            f"({why}); use lora."
        )

    def shortcut(
        self, model: Any, *, rows: Rows, inputs_of: InputsOf, work: Path, world: World, beat: Callable[[], None]
    ) -> Shortcut | None:
        """There is none; but the longest row, which comes first, must leave room for the tokens. Raises ModelError."""
        limit = _positions(plain_of(model))
        if len(rows) and limit is not None:
            longest = max(value.shape[1] for value in inputs_of(rows[:1]).values() if value.ndim == 2)
            if longest + self._tokens > limit:
                raise ModelError(
                    f"method.virtualTokens: {self._tokens} learned tokens before rows of up to {longest} are more than "
                    f"the {limit} positions of {type(plain_of(model)).__name__}; set data.maxLength to "
                    f"{limit - self._tokens} or less."
                )
        return None

    def save(self, model: Any, directory: Path, *, merge: bool, example: Inputs) -> None:
        if merge:
            raise ModelError(f"output.merge: method {self._config.type} has no weights to merge; publish the adapter.")
        super().save(model, directory, merge=False, example=example)

    def load_hint(self, model: Any, *, merge: bool) -> str:
        hint = super().load_hint(model, merge=False)
        if self._config.type == "prompt" and model.active_peft_config.task_type in _LONGER:
            hint += f"\n# The first {self._tokens} positions of its logits belong to the learned tokens."
        return hint


def _cut(count: int) -> Callable[[Any, Any, Any], Any]:
    """A hook that takes the answers for `count` learned tokens away."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        for name in _BY_POSITION:
            if name in output:
                output[name] = output[name][:, count:]
        return output

    return hook


def _sample(model: Any) -> Inputs:
    """One row of six tokens, ended as rows of its vocabulary end."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ends = model.config.eos_token_id
    last = next(iter(ends), None) if isinstance(ends, list) else ends
    special = {last, getattr(model.config, "pad_token_id", None)}
    usable = [number for number in range(min(16, vocabulary)) if number not in special]
    ids = [*usable[-5:], last if last is not None and last < vocabulary else usable[0]]
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


@torch.no_grad()
def _logits(model: Any, sample: Inputs) -> list[torch.Tensor]:
    given: dict[str, Any] = dict(sample)
    if task_type(plain_of(model)) == "SEQ_2_SEQ_LM":
        given["decoder_input_ids"] = sample["input_ids"][:, :4]
    found = model(**given)
    return [found[name] for name in _BY_POSITION if name in found]


def _positions(model: Any) -> int | None:
    """How long a row may be where positions are learned, in a table of that size; None where they are computed."""
    count = getattr(model.config, "max_position_embeddings", None)
    if count is None:
        return None
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and 0 <= m.num_embeddings - count <= 2]
    if not tables:
        return None
    offset = max(0 if table.padding_idx is None else table.padding_idx + 1 for table in tables)
    return int(count) - (offset if all(table.num_embeddings == count for table in tables) else 0)
