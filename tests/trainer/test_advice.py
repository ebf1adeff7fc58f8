"""Which base is recommended, and what is said of it."""

import json
from dataclasses import replace

import pytest

from finetune_trainer.advice import Found, Score, as_json, recommend, table


def base(
    name: str, value: float | None, *, seconds: float = 10.0, terms: str | None = "mit", parameters: int = 5
) -> Found:
    score = None if value is None else Score("f1 of the probe", value, value - 0.05, value + 0.05, True, 150)
    return Found(f"file:///{name}", name, license=terms, parameters=parameters, score=score, seconds_per_epoch=seconds)


def test_a_clearly_better_base_is_recommended_though_it_is_slower() -> None:
    advice = recommend([base("fast", 0.60, seconds=1.0), base("good", 0.80, seconds=9.0)])
    assert advice.model == "file:///good"
    assert advice.reason.startswith("good has the best f1 of the probe, 0.8 (95 % interval 0.75 to 0.85);")


def test_of_bases_within_the_interval_of_the_best_the_fastest_is_recommended() -> None:
    advice = recommend(
        [base("best", 0.80, seconds=9.0), base("near", 0.76, seconds=3.0), base("far", 0.7, seconds=1.0)]
    )
    assert advice.model == "file:///near"
    assert "near trains 3.0 times as fast as best, whose f1 of the probe, 0.8" in advice.reason
    assert "its own 0.76 is within that interval" in advice.reason


def test_of_equally_fast_bases_the_smallest_is_recommended() -> None:
    advice = recommend([base("large", 0.80, parameters=9), base("small", 0.79, parameters=1)])
    assert advice.model == "file:///small"
    assert "is no slower and no larger than large" in advice.reason


@pytest.mark.parametrize(("value", "chosen"), [(1.0, "file:///other"), (0.7, "file:///best")])
def test_of_a_score_that_is_better_when_lower_the_lowest_is_best(value: float, chosen: str) -> None:
    bits = Score("bits per byte", 0.8, 0.75, 0.85, higher_is_better=False, rows=9)
    other = replace(bits, value=2.0 - value if value == 0.7 else 0.82)
    found = [replace(base("best", None), score=bits), replace(base("other", None, seconds=1.0), score=other)]
    assert recommend(found).model == chosen


def test_without_scores_the_fastest_is_recommended_and_that_is_said() -> None:
    advice = recommend([base("slow", None, seconds=3.0), base("fast", None, seconds=2.0)])
    assert advice.model == "file:///fast"
    assert advice.reason == "No score tells the bases apart; fast is the fastest of them."


def test_a_base_without_a_score_does_not_win_over_one_that_has_one() -> None:
    assert recommend([base("scored", 0.5, seconds=9.0), base("other", None, seconds=1.0)]).model == "file:///scored"


def test_an_unknown_license_is_named() -> None:
    assert "Its license is not known" in recommend([base("one", 0.8, terms=None)]).reason
    assert "license" not in recommend([base("one", 0.8)]).reason


def test_a_base_that_will_not_fit_into_memory_is_left_aside_while_another_will() -> None:
    large = replace(base("large", 0.9), warning="Training is predicted to take 9Gi.")
    advice = recommend([large, base("small", 0.7)])
    assert advice.model == "file:///small"
    assert "left aside" in advice.reason
    alone = recommend([large])
    assert alone.reason == "large is the only base that can be used. Training is predicted to take 9Gi."


def test_a_refused_base_is_never_recommended_but_listed_with_the_reason() -> None:
    refused = Found("file:///broken", "broken", refused="model.safetensors is missing.")
    assert recommend([refused]).model is None
    found = [refused, base("whole", 0.8)]
    assert recommend(found).reason == "whole is the only base that can be used."
    shown = table(found, device="cpu AVX2").splitlines()
    assert [line.split()[0] for line in shown[:2]] == ["base", "whole"]
    assert shown[2] == "broken: model.safetensors is missing."
    assert shown[-1] == "Scores are of 150 rows held out; seconds were measured on cpu AVX2."
    assert table([refused], device="") == "broken: model.safetensors is missing."


def test_what_is_not_known_is_told_as_unknown() -> None:
    row = table([base("one", None, terms=None)], device="cpu").splitlines()[1]
    assert row.split()[:2] == ["one", "unknown"]
    assert "none" in row


def test_json_holds_what_the_table_shows() -> None:
    found = [base("one", 0.8)]
    document = json.loads(as_json(found, recommend(found), device="cpu", job=None))
    assert document["recommended"] == "file:///one"
    assert document["bases"][0]["score"]["low"] == pytest.approx(0.75)
