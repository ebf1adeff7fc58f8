"""The report: nothing of the data becomes markup, nothing is loaded from elsewhere, and it stays small."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.status import EvaluationStatus, Gain, GateStatus, RetentionStatus
from finetune_trainer.report import Errors, Mistake, Report, page
from finetune_trainer.report.page import SIZE_LIMIT
from finetune_trainer.report.svg import bars, histogram, lines, round_ticks, short

EVIL = "<script>alert('x')</script>&\"<img src=//evil onerror=x>"
TAGS = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "header",
        "h1",
        "h2",
        "h3",
        "p",
        "b",
        "dl",
        "div",
        "dt",
    ),
    *("dd", "section", "figure", "figcaption", "svg", "line", "text", "polyline", "circle", "rect", "path", "span"),
    *("table", "tr", "th", "td", "article", "small", "pre"),
}


class Outline(HTMLParser):
    """Tags and attributes of a page; the names of the elements that are still open at its end."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def full(word: str = "label", *, rows: int = 3, text: str = "a row") -> Report:
    """Every section has something in it, and `word` is in all that data or documents can name."""
    evaluation = EvaluationStatus(
        rows=100,
        on="test",
        gain=Gain(metric="f1", over="probe", value=0.1, low=0.02, high=0.2),
        gates=[GateStatus(metric="f1", passed=False, value=0.5, wanted=word[:128])],
        retention=[
            RetentionStatus(
                name=word[:40],
                metric="perplexity",
                rows=70,
                base=10.0,
                tuned=11.0,
                difference=1.0,
                low=0.5,
                high=1.5,
                wanted="rise <= 5 %",
                passed=False,
            ),
            RetentionStatus(name="free", metric="perplexity", rows=3),
        ],
    )
    value = {"value": word, "rows": 30, "metrics": {"f1": 0.4}}
    mistake = Mistake(f"s3://{word}:3", text + word, word, word, 0.5)
    return Report(
        title=word,
        subtitle=word,
        evaluation=evaluation,
        primary="f1",
        rivals={"trivial": {"f1": 0.1}, "base": None, "probe": {"f1": 0.4}},
        tuned={"f1": 0.5, "loss": 0.7},
        intervals={"f1": [0.4, 0.6]},
        fit={
            "train": {"f1": 0.9},
            "validation": {"f1": 0.5},
            "gap": {"metric": "f1", "value": 0.4, "interval": [0.3, 0.5]},
        },
        losses=[[step, 1 / step] for step in range(1, 100)],
        evaluations=[
            {"step": 10, "metrics": {"f1": 0.3, "loss": 1.0}},
            {"step": 20, "metrics": {"f1": 0.5, "loss": 0.9}},
        ],
        errors=[
            Errors(labels=["a", word], confusion=[[3, 1], [0, 4]], mistakes=[mistake] * rows),
            Errors(word, suspects=[mistake] * rows),
        ],
        slices=[
            {
                "column": word,
                "metric": "f1",
                "values": [value, {**value, "metrics": {}}],
                "tooFew": 1,
                "unknown": 2,
                "gap": {"value": 0.1, "best": word, "worst": word, "interval": [0.0, 0.2]},
                "equalizedOdds": 0.1,
            }
        ],
        lengths=([3, 5], [1.0, 2.0, 3.0]),
        warnings=[word],
        configuration=word,
        load_hint=word,
        facts=[(word, word)],
    )


@settings(max_examples=25, deadline=None)
@given(st.one_of(st.just(EVIL), st.text(st.characters(blacklist_categories=["Cs"]), max_size=40)))
def test_nothing_of_the_data_becomes_markup(word: str) -> None:
    found = Outline(page(full(word)))
    assert found.tags <= TAGS
    assert not {name for name in found.attributes if name.startswith("on") or name in ("src", "href")}
    assert found.open == []
    assert "script" not in found.tags


def test_a_picture_is_part_of_the_page() -> None:
    report = replace(
        full(), errors=[Errors(mistakes=[Mistake("s3://data/1.png", "1.png", "cat", "dog", 2.0, b"\x89PNG")])]
    )
    assert '<img alt="" src="data:image/png;base64,iVBORw==">' in page(report)
    assert "<img" not in page(full())


def test_what_was_measured_is_there_in_words() -> None:
    text = " ".join(" ".join(Outline(page(full())).texts).split())
    for said in (
        "Better than probe by 0.1 (95 % interval 0.02 to 0.2)",
        "not met",
        "f1 is better by 0.4 (95 % interval 0.3 to 0.5) on training rows",
        "Equalised odds differ by 0.1.",
        "s3://label:3",
        "Training rows that may be mislabelled: label",
        "perplexity 70 10 11 1 0.5 to 1.5 rise <= 5 % broken",
    ):
        assert said in text


def test_it_opens_with_no_network_and_follows_the_readers_colours() -> None:
    html = page(full())
    assert not re.search(r"https?:|@import|url\(", html)
    assert "prefers-color-scheme:dark" in html
    assert 'name="viewport"' in html


def test_it_stays_small_however_long_the_rows_are() -> None:
    assert len(page(full()).encode()) < 15_000
    huge = page(full(text="ü" * 10_000, rows=5000))
    assert len(huge.encode()) <= SIZE_LIMIT
    assert Outline(huge).open == []


def test_an_empty_run_has_a_report_too() -> None:
    html = page(Report("t", "s", EvaluationStatus(rows=0), "f1", {}))
    assert "<section>" not in html


numbers = st.floats(-1e9, 1e9) | st.sampled_from([float("nan"), float("inf")])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), max_size=40), st.lists(st.integers(0, 9), max_size=9))
def test_charts_of_any_numbers_stay_inside_their_frame(points: list[tuple[float, float]], counts: list[int]) -> None:
    drawn: list[Any] = [
        lines([("a", points)], x="step"),
        bars([("x", y, None) for _, y in points]),
        histogram(counts, [0.0, 1.0], x="tokens"),
    ]
    for html in drawn:
        assert "nan" not in html
        assert "inf" not in html
        for value in re.findall(r'(?:x|cx|x1|x2)="(-?[\d.]+)"', html):
            assert -1 <= float(value) <= 720


@pytest.mark.parametrize(("value", "said"), [(0.12345, "0.123"), (1234.5, "1234"), (3.0, "3"), (-0.5, "-0.5")])
def test_numbers_are_short(value: float, said: str) -> None:
    assert short(value) == said


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_round_and_hold_all_values(low: float, width: float) -> None:
    ticks = round_ticks(low, low + width)
    assert ticks[0] <= low + 1e-9 * abs(low)
    assert ticks[-1] >= low + width - 1e-9 * abs(low + width)
    assert 2 <= len(ticks) <= 7
    step = ticks[1] - ticks[0]
    assert any(
        math.isclose(step, factor * 10.0 ** math.floor(math.log10(step * 1.0001)), rel_tol=1e-3) for factor in (1, 2, 5)
    )


def test_ticks_of_one_value_lie_around_it() -> None:
    ticks = round_ticks(0.5, 0.5)
    assert ticks[0] < 0.5 < ticks[-1]
