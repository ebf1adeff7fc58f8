import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu, corpus_chrf

from finetune_trainer.evaluate import packed, unpacked
from finetune_trainer.tasks.base import Metrics, objects
from finetune_trainer.tasks.generated import GENERATED, encoded_text, generation_metrics, scored, texts_of

REFERENCES = ["the cat sat on the mat", "a development library for C++", "files of libfoo (documentation)", "nothing"]
HYPOTHESES = ["the cat is on the mat", "a library for development in C++", "files for libfoo, documentation", ""]


def measured(references: list[str], hypotheses: list[str], *wanted: str, language: str | None = None) -> Metrics:
    outcomes = {"reference": objects(references), "hypothesis": objects(hypotheses)}
    return generation_metrics(scored(outcomes, wanted=wanted or GENERATED, language=language))


def test_metrics_equal_the_libraries_called_directly() -> None:
    found = measured(REFERENCES, HYPOTHESES)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = [scorer.score(a, b) for a, b in zip(REFERENCES, HYPOTHESES, strict=True)]
    for ours, theirs in (("rouge-1", "rouge1"), ("rouge-2", "rouge2"), ("rouge-l", "rougeL")):
        assert found[ours] == pytest.approx(np.mean([score[theirs].fmeasure for score in scores]), rel=1e-12)
    assert found["bleu"] == corpus_bleu(HYPOTHESES, [REFERENCES]).score
    assert found["chrf"] == corpus_chrf(HYPOTHESES, [REFERENCES]).score
    assert found["exact-match"] == 0.0
    assert set(found) == GENERATED


@given(st.lists(st.tuples(st.text("ab cde.", max_size=20), st.text("ab cde.", max_size=20)), min_size=1, max_size=5))
def test_rouge_of_ascii_text_is_the_library_s(rows: list[tuple[str, str]]) -> None:
    scorer = RougeScorer(["rougeL"])
    wanted = np.mean([scorer.score(a, b)["rougeL"].fmeasure for a, b in rows])
    found = measured([a for a, _ in rows], [b for _, b in rows], "rouge-l")
    assert found == {"rouge-l": pytest.approx(wanted)}


@pytest.mark.parametrize("text", ["größe über", "Ελλάδα σήμερα", "привет мир", "日本語"])
def test_rouge_finds_words_in_any_script(text: str) -> None:
    assert measured([text], [text], "rouge-1") == {"rouge-1": 1.0}


def test_chinese_is_measured_by_its_characters() -> None:
    texts = ["我喜欢吃苹果和梨"], ["我喜欢吃苹果和桃"]
    assert measured(*texts, "bleu", language="zh_CN")["bleu"] > 70
    assert measured(*texts, "bleu", language="en")["bleu"] == 0


def test_without_a_hypothesis_there_is_nothing_to_measure() -> None:
    assert generation_metrics(scored({"reference": objects(["a"])}, wanted=GENERATED)) == {}


def test_a_selection_of_rows_is_measured_as_these_rows_alone() -> None:
    outcomes = scored({"reference": objects(REFERENCES), "hypothesis": objects(HYPOTHESES)}, wanted=GENERATED)
    for rows in ([0, 2, 2], [3], [1, 0, 3, 1]):
        chosen = generation_metrics({name: values[rows] for name, values in outcomes.items()})
        assert chosen == pytest.approx(measured([REFERENCES[i] for i in rows], [HYPOTHESES[i] for i in rows]))


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])), max_size=5))
def test_texts_survive_the_store_and_the_way_between_ranks(texts: list[str]) -> None:
    rows = [np.frombuffer(encoded_text(text), np.uint8) for text in texts]
    found = unpacked(packed({0: {"reference": texts_of(rows)}}))["0"]["reference"]
    assert found.tolist() == texts
