import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu, corpus_chrf

from finetune_trainer.evaluate import packed, unpacked
from finetune_trainer.tasks.generated import GENERATED, encoded_text, generation_metrics, objects, texts_of

REFERENCES = ["the cat sat on the mat", "a development library for C++", "files of libfoo (documentation)", "nothing"]
HYPOTHESES = ["the cat is on the mat", "a library for development in C++", "files for libfoo, documentation", ""]
OUTCOMES = {"reference": objects(REFERENCES), "hypothesis": objects(HYPOTHESES)}


def test_metrics_equal_the_libraries_called_directly() -> None:
    found = generation_metrics(OUTCOMES, wanted=GENERATED)
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
    outcomes = {"reference": objects([a for a, _ in rows]), "hypothesis": objects([b for _, b in rows])}
    scorer = RougeScorer(["rougeL"])
    wanted = np.mean([scorer.score(a, b)["rougeL"].fmeasure for a, b in rows])
    assert generation_metrics(outcomes, wanted=["rouge-l"])["rouge-l"] == pytest.approx(wanted)


@pytest.mark.parametrize("text", ["größe über", "Ελλάδα σήμερα", "привет мир", "日本語"])
def test_rouge_finds_words_in_any_script(text: str) -> None:
    outcomes = {"reference": objects([text]), "hypothesis": objects([text])}
    assert generation_metrics(outcomes, wanted=["rouge-1"]) == {"rouge-1": 1.0}


def test_chinese_is_measured_by_its_characters() -> None:
    outcomes = {"reference": objects(["我喜欢吃苹果和梨"]), "hypothesis": objects(["我喜欢吃苹果和桃"])}
    assert generation_metrics(outcomes, wanted=["bleu"], language="zh_CN")["bleu"] > 70
    assert generation_metrics(outcomes, wanted=["bleu"], language="en")["bleu"] == 0


def test_without_a_hypothesis_there_is_nothing_to_measure() -> None:
    assert generation_metrics({"reference": objects(["a"])}, wanted=GENERATED) == {}


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])), max_size=5))
def test_texts_survive_the_store_and_the_way_between_ranks(texts: list[str]) -> None:
    rows = [np.frombuffer(encoded_text(text), np.uint8) for text in texts]
    found = unpacked(packed({0: {"reference": texts_of(rows)}}))[0]["reference"]
    assert found.tolist() == texts
