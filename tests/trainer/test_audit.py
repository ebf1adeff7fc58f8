"""What the audit finds, and that it never tells what it found."""

import json
import random
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.data.audit import Audit, Reservoir, wilson
from finetune_trainer.data.near import NearDuplicates, shingles
from finetune_trainer.data.personal import iban, luhn, suspected

SOURCES = ["model/config.json", "file:///data/a.jsonl", "file:///data/b.jsonl"]
WORDS = [f"word{number}" for number in range(4000)]


def prose(number: int, words: int = 60) -> str:
    return " ".join(random.Random(number).choices(WORDS, k=words))


def audit(tmp_path: Path, texts: list[str], *, full: bool = False, sample: int = 20_000, **columns: Any) -> Any:
    looking = Audit(full=full, seed=1, scratch=tmp_path, sample=sample)
    for number, text in enumerate(texts, start=1):
        looking.add((1, number), text=text, values={"text": text, **columns})
    return looking.report(SOURCES)


# --- personal data ---

PERSONAL = {
    "card": ["Card 4111 1111 1111 1111 please", "5500-0055-5555-5559", "378282246310005", "x: 6011000990139424."],
    "iban": [
        "DE89 3704 0044 0532 0130 00",
        "to GB29NWBK60161331926819 now",
        "FR14 2004 1010 0505 0001 3M02 606 thanks",
    ],
    "ip": ["from 8.8.8.8 at noon", "(2001:4860:4860::8888)", "93.184.216.34:443"],
    "email": ["write to jane.doe+x@example.co.uk.", "<a_b@sub.example.org>", "mail:x@y.io"],
    "phone": ["call +49 30 901820", "+1 (650) 253-0000", "+44 20 7031 3000 or so"],
}
INNOCENT = [
    "4111 1111 1111 1112",
    "0000 0000 0000 0000",
    "order 1234567890123456",
    "3.14159265358979 and 4111111111111111.5",
    "DE88 3704 0044 0532 0130 00",
    "version 1.2.3.4.5 on 127.0.0.1 and 192.168.0.1, 999.1.1.1",
    "at 12:30:45, fe80::1, ::1, std::vector",
    "@handle, a@b, price@5.00",
    "2 + 2 = 4, +1, C++11, +5%",
    "",
]


@pytest.mark.parametrize("kind", PERSONAL)
def test_personal_data_is_suspected_where_its_form_and_checksum_are_right(kind: str) -> None:
    assert [suspected(text) for text in PERSONAL[kind]] == [{kind: 1}] * len(PERSONAL[kind])


@pytest.mark.parametrize("text", INNOCENT)
def test_what_lacks_a_checksum_or_names_no_person_is_not_suspected(text: str) -> None:
    assert suspected(text) == {}


@given(st.lists(st.integers(0, 9), min_size=12, max_size=18))
def test_exactly_one_last_digit_satisfies_luhn(digits: list[int]) -> None:
    assert sum(luhn([*digits, last]) for last in range(10)) == 1


@given(st.from_regex(r"[A-Z0-9]{11,26}", fullmatch=True))
def test_one_pair_of_check_digits_makes_an_iban(account: str) -> None:
    right = [check for check in range(2, 99) if iban(f"DE{check:02}{account}")]
    assert len(right) == 1


@given(st.text(max_size=300))
def test_any_text_can_be_looked_into(text: str) -> None:
    suspected(text)
    shingles(text)


def test_looking_for_personal_data_takes_linear_time() -> None:
    for text in ("1" * 60_000, "a@" * 30_000, "1.1.1." * 10_000, "+1 " * 20_000, "AA11 " * 12_000, "a:" * 30_000):
        suspected(text)


# --- near-duplicates ---


def test_texts_with_few_changes_are_near_duplicates_and_others_are_not(tmp_path: Path) -> None:
    near = NearDuplicates(tmp_path)
    for number in range(300):
        near.add(prose(number, 200))
    for number in range(0, 300, 10):
        words = prose(number, 200).split()
        words[100] = "changed"
        near.add(" ".join(words).upper())
    assert near.find().tolist() == list(range(300, 330))
    near.close()
    assert list(tmp_path.iterdir()) == []


def test_a_text_without_spaces_is_compared_by_characters(tmp_path: Path) -> None:
    near = NearDuplicates(tmp_path)
    signs = [chr(0x4E00 + random.Random(0).randrange(3000) + number) for number in range(400)]
    near.add("".join(signs))
    near.add("".join([*signs[:200], "。", *signs[200:]]))
    near.add("".join(reversed(signs)))
    assert near.find().tolist() == [1]


def test_no_texts_have_no_near_duplicates(tmp_path: Path) -> None:
    assert NearDuplicates(tmp_path).find().tolist() == []


# --- the sample ---


def taken(rows: int, size: int, seed: int) -> list[int]:
    reservoir, sample = Reservoir(size, seed=seed), {}
    for row in range(rows):
        place = reservoir.offer()
        if place is not None:
            sample[place] = row
    return sorted(sample.values())


@given(st.integers(0, 300), st.integers(1, 50), st.integers(0, 99))
def test_a_sample_has_its_size_or_all_rows(rows: int, size: int, seed: int) -> None:
    found = taken(rows, size, seed)
    assert len(set(found)) == len(found) == min(rows, size)
    assert found == taken(rows, size, seed)


def test_each_row_has_the_same_chance_to_be_in_the_sample() -> None:
    counts = Counter(row for seed in range(4000) for row in taken(60, 12, seed))
    assert all(abs(counts[row] - 800) < 5 * 25 for row in range(60)), counts  # five standard deviations


@given(st.integers(0, 50), st.integers(1, 50))
def test_the_interval_holds_the_share_and_stays_in_bounds(found: int, more: int) -> None:
    low, high = wilson(found, found + more - 1 if found else more)
    share = found / (found + more - 1 if found else more)
    assert 0 <= low <= share <= high <= 1


def test_the_interval_is_wilsons() -> None:
    low, high = wilson(10, 100)
    assert (round(low, 4), round(high, 4)) == (0.0552, 0.1744)  # as in Newcombe 1998 and R's prop.test, uncorrected


@settings(max_examples=20, deadline=None)
@given(st.floats(0.02, 0.5), st.integers(0, 10**6))
def test_most_samples_have_the_true_share_in_their_interval(share: float, seed: int) -> None:
    rng = random.Random(seed)
    hits = 0
    for _ in range(200):
        low, high = wilson(sum(rng.random() < share for _ in range(100)), 100)
        hits += low <= share <= high
    assert hits > 170


# --- the report ---


def test_all_rows_of_small_data_are_looked_into_and_counts_are_exact(tmp_path: Path) -> None:
    texts = [prose(number) for number in range(50)]
    texts[7] += " jane@example.org and john@example.org"
    texts[30] += " ann@example.org"
    texts.append(texts[3] + " again")
    report = audit(tmp_path, texts)
    assert report["personalData"]["email"] == {
        "rows": 2,
        "of": 51,
        "share": round(2 / 51, 6),
        "exact": True,
        "interval": None,
        "count": 3,
        "where": ["file:///data/a.jsonl:8", "file:///data/a.jsonl:31"],
    }
    assert report["nearDuplicates"]["where"] == ["file:///data/a.jsonl:51"]
    assert report["warnings"] == [
        "Suspected e-mail addresses in 2 of 51 rows, the first at file:///data/a.jsonl:8, file:///data/a.jsonl:31.",
        "1 of 51 rows nearly repeats the text of another row.",
    ]


def test_what_was_found_is_never_told(tmp_path: Path) -> None:
    texts = [text for kind in PERSONAL for text in PERSONAL[kind]]
    told = json.dumps(audit(tmp_path, texts, key="s3cret"))
    assert "s3cret" not in told
    assert not [text for text in texts if text[:12] in told]


def test_exact_repetitions_are_no_near_duplicates(tmp_path: Path) -> None:
    assert audit(tmp_path, [prose(1)] * 20)["nearDuplicates"]["rows"] == 0


def test_a_sample_says_so_and_has_an_interval_around_the_truth(tmp_path: Path) -> None:
    texts = [f"{number} mails x{number}@example.org" if number % 4 == 0 else prose(number, 8) for number in range(4000)]
    sampled = audit(tmp_path, texts, sample=500)
    figure = sampled["personalData"]["email"]
    assert sampled["lookedInto"] == figure["of"] == 500
    assert not figure["exact"]
    assert figure["interval"][0] < 0.25 < figure["interval"][1]
    assert len(figure["where"]) == 10
    assert "sampled rows" in sampled["warnings"][0]
    whole = audit(tmp_path, texts, sample=500, full=True)
    assert whole["personalData"]["email"]["rows"] == 1000
    assert whole["personalData"]["email"]["exact"]


def test_empty_and_constant_columns_are_named(tmp_path: Path) -> None:
    looking = Audit(full=False, seed=1, scratch=tmp_path)
    for number in range(5):
        values = {
            "text": f"t{number}",
            "note": " ",
            "lang": "en",
            "big": "x" * 5000,
            "mixed": [1, True, 1.0, 1, 1][number],
        }
        looking.add((1, number), text=f"t{number}", values=values | ({"some": 1} if number else {}))
    report = looking.report(SOURCES)
    assert [name for name, column in report["columns"].items() if column["constant"]] == ["note", "lang", "big"]
    assert report["columns"]["some"]["missing"] == 1
    assert report["warnings"][-2:] == [
        "Empty in every row: the column 'note'.",
        "The same value in every row: the columns 'lang', 'big'.",
    ]


def test_lengths_are_in_bytes(tmp_path: Path) -> None:
    report = audit(tmp_path, ["ä" * 5, "a" * 100, "b" * 1_000_000])
    assert report["bytes"] == {
        "exact": True, "mean": 333370.0, "p50": 100, "p95": 1_000_000, "p99": 1_000_000, "max": 1_000_000,
    }  # fmt: skip


def test_rows_without_text_are_audited_by_their_columns_alone(tmp_path: Path) -> None:
    looking = Audit(full=True, seed=1, scratch=tmp_path)
    looking.add((1, 1), text="", values={"label": "a"})
    report = looking.report(SOURCES)
    assert (report["rows"], report["lookedInto"]) == (1, 0)
    assert report["warnings"] == []


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    def peak(rows: int) -> int:
        looking = Audit(full=False, seed=1, scratch=tmp_path, sample=100)
        tracemalloc.start()
        for number in range(rows):
            text = f"{number} " * 500
            looking.add((1, number), text=text, values={"text": text, "label": number})
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(5000) < 1.5 * peak(500)
