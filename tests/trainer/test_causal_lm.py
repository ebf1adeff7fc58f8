"""Texts as rows of the store, and what the metrics make of them. Nothing here needs torch but the tests of tensors."""

from itertools import dropwhile, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.trainer.memory import Memory, config_of, learner_of
from tests.trainer.rank.lm import BOS, EOS, save_tokenizer

from finetune_trainer import tasks
from finetune_trainer.data.read import DataError
from finetune_trainer.data.text import read_text
from finetune_trainer.tasks.base import IGNORED, RowError, Tools
from finetune_trainer.tasks.causal_lm import bounded, split

TASK = tasks.get(config_of("causal-lm"))
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """tokenizer.json of tokenizers that begin each text with <s>, and that do not."""
    found = {}
    for bos in (True, False):
        directory = tmp_path_factory.mktemp("tokenizer")
        save_tokenizer(directory, bos=bos)
        found[bos] = (directory / "tokenizer.json").read_text()
    return found


def tools_of(tokenizer: str, *, limit: int = 64, overlong: Any = "Split", **config: Any) -> Tools:
    config = {**LLAMA, "vocab_size": 400, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 0, **config}
    text = read_text(config, tokenizer, {"bos_token": "<s>"}, asked=limit, uri="s3://base")
    return Tools(text, overlong, config)


def encode(text: str, tools: Tools) -> Any:
    (found,) = TASK.encode([TASK.read_row({"text": text})], tools)
    return found


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("text", ["abc", "<s>abc", "<s><s>abc", "abc</s>", "<s>abc</s>"])
def test_a_text_begins_as_the_tokenizer_has_it_and_ends_once(files: dict[bool, str], bos: bool, text: str) -> None:
    (piece,) = encode(text, tools_of(files[bos]))
    ids = list(piece.columns["input_ids"])
    assert ids.count(BOS) == (1 if bos or "<s>" in text else 0)
    assert ids.count(EOS) == 1
    assert ids[-1] == EOS
    assert piece.length == len(ids)


@given(st.lists(st.integers(6, 300), min_size=2, max_size=200), st.integers(2, 50))
def test_pieces_hold_every_token_in_order_and_each_but_the_first_is_predicted_once(ids: list[int], limit: int) -> None:
    pieces = split(ids, limit)
    assert all(2 <= len(piece) <= limit for piece in pieces)
    assert [pieces[0][0], *(token for piece in pieces for token in piece[1:])] == ids
    assert all(piece[0] == before[-1] for before, piece in pairwise(pieces))


@given(st.lists(st.sampled_from([1, 2, 7, 8]), max_size=12))
def test_a_begin_is_never_doubled_and_an_end_never_missing(ids: list[int]) -> None:
    def stripped(tokens: list[int]) -> list[int]:
        return list(dropwhile(lambda token: token == 1, tokens))

    found = bounded(ids, begin=1, end=2)
    assert found[:2] != [1, 1]
    assert stripped(found) == stripped(ids if ids[-1:] == [2] else [*ids, 2])


def test_a_long_text_is_split_cut_or_marked_as_cut(files: dict[bool, str]) -> None:
    text = "red cat " * 40
    pieces = encode(text, tools_of(files[True], limit=16))
    assert len(pieces) > 5
    assert not any(piece.cut for piece in pieces)
    assert sum(piece.tokens for piece in pieces) == len(tools_of(files[True]).text.ids([text])[0]) + 1  # type: ignore[union-attr]
    (piece,) = encode(text, tools_of(files[True], limit=16, overlong="Truncate"))
    assert piece.cut
    assert piece.length == 16
    assert EOS not in piece.columns["input_ids"]  # the text goes on


def test_a_text_of_an_end_alone_is_refused(files: dict[bool, str]) -> None:
    assert isinstance(encode("</s>", tools_of(files[False])), RowError)


@pytest.mark.parametrize(
    "config",
    [
        {"is_encoder_decoder": True},
        {"architectures": ["BertForMaskedLM"]},
        {"architectures": ["T5Model"], "is_encoder_decoder": True},
    ],
)
def test_a_model_of_another_kind_is_refused(files: dict[bool, str], config: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="no causal language model; give one such as GPT-2 or Llama"):
        TASK.facts(tools_of(files[True], **config))


def test_a_model_that_names_no_end_is_refused(files: dict[bool, str]) -> None:
    with pytest.raises(DataError, match="add eos_token_id to config"):
        TASK.facts(tools_of(files[True], eos_token_id=None))


def test_an_end_that_is_the_padding_is_trained_all_the_same(files: dict[bool, str]) -> None:
    tools = tools_of(files[True], pad_token_id=EOS)
    store = Memory(input_ids=[encode(text, tools)[0].columns["input_ids"] for text in ("a", "a longer one")])
    learner = learner_of("causal-lm", pad_token_id=EOS, more=TASK.facts(tools))
    batch = learner.collate(store, np.array([0, 1]))
    assert batch["labels"][0].tolist() == [IGNORED, batch["input_ids"][0, 1], EOS] + [IGNORED] * 10
    assert batch["labels"][1, -1] == EOS
    assert batch["attention_mask"].sum(1).tolist() == [3, 13]
    assert learner.count(store, np.array([0, 1])) == (batch["labels"] != IGNORED).sum()


rows_of_tokens = st.lists(st.lists(st.integers(4, 60), min_size=2, max_size=12), min_size=1, max_size=8)


@given(rows_of_tokens, st.randoms())
def test_packs_hold_the_rows_with_their_labels_and_positions(rows: list[list[int]], random: Any) -> None:
    store = Memory(input_ids=rows)
    numbers = list(range(len(rows)))
    random.shuffle(numbers)
    cut = random.randint(0, len(numbers) - 1)
    packs = [np.array(part) for part in (numbers[:cut], numbers[cut:]) if part]
    batch = learner_of("causal-lm", pad_token_id=3).collate_packs(store, packs)
    assert set(batch) == {"input_ids", "position_ids", "labels"}
    for number, pack in enumerate(packs):
        at = 0
        for row in (rows[place] for place in pack):
            piece = slice(at, at + len(row))
            assert batch["input_ids"][number, piece].tolist() == row
            assert batch["labels"][number, piece].tolist() == [IGNORED, *row[1:]]
            assert batch["position_ids"][number, piece].tolist() == list(range(len(row)))
            at += len(row)
        assert (batch["labels"][number, at:] == IGNORED).all()
        assert (batch["input_ids"][number, at:] == 3).all()
    assert (batch["labels"] != IGNORED).sum() == learner_of("causal-lm").count(store, np.arange(len(rows)))


def test_pieces_of_a_text_are_settled_into_one_row_of_data() -> None:
    store = Memory(input_ids=[[5, 6, 7], [7, 8], [5, 9, 4]], source=[1, 1, 1], row=[1, 1, 2])
    learner = learner_of("causal-lm")
    rows = np.array([2, 0, 1])
    found = learner.settle(
        {
            **learner.gold(store, rows),
            "loss": np.array([3.0, 1.0, 0.5]),
            "count": np.array([2, 2, 1]),
            "correct": np.array([0, 2, 1]),
            "place": rows,
        }
    )
    assert found["row"].tolist() == [1, 2]
    assert found["place"].tolist() == [0, 2]
    assert found["loss"].tolist() == [1.5, 3.0]
    metrics = learner.metrics(found)
    assert metrics == {
        "loss": pytest.approx(0.9),
        "perplexity": pytest.approx(np.exp(0.9)),
        "token-accuracy": pytest.approx(0.6),
    }


def test_the_trivial_answer_knows_how_frequent_each_token_is() -> None:
    store = Memory(input_ids=[[1, 5, 5, 6], [1, 5, 7]])
    learner = learner_of("causal-lm", more={"vocabulary": 8})
    found = learner.trivial(store, np.array([0]), np.array([1]))
    assert found is not None
    shares = np.ones(8) + np.bincount([5, 5, 6], minlength=8)
    shares /= shares.sum()
    assert found["loss"].tolist() == [pytest.approx(-np.log(shares[5] * shares[7]))]
    assert found["correct"].tolist() == [1]


def test_preflight_needs_no_torch_for_texts() -> None:
    import subprocess
    import sys

    code = (
        "import sys\nfrom finetune_trainer import tasks\nfrom tests.trainer.memory import config_of\n"
        "tasks.get(config_of('causal-lm'))\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
