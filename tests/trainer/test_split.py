from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.data.split import content_hash, normalise, side
from finetune_trainer.run import TRAIN, VALIDATION

FRACTIONS = st.floats(0.001, 0.999)
TEXTS = st.text(min_size=1).filter(lambda text: not any("\ud800" <= char <= "\udfff" for char in text))


@given(TEXTS)
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@given(TEXTS)
def test_the_amount_of_white_space_never_moves_a_row(text: str) -> None:
    assert content_hash(f" {text}\n") == content_hash(text)
    assert content_hash(text.replace(" ", " \t\n")) == content_hash(text)


@given(st.text("abcdefghijkl ÄÖÜäöüß", min_size=1))
def test_case_never_moves_a_row(text: str) -> None:
    assert content_hash(text.upper()) == content_hash(text)


@given(TEXTS, FRACTIONS, FRACTIONS)
def test_a_larger_fraction_only_adds_rows_to_validation(text: str, one: float, other: float) -> None:
    low, high = sorted((one, other))
    key = content_hash(text)
    assert not (side(key, low) == VALIDATION and side(key, high) == TRAIN)


def test_the_share_of_validation_is_the_fraction() -> None:
    held = sum(side(content_hash(f"row number {i}"), 0.1) == VALIDATION for i in range(20_000))
    assert abs(held / 20_000 - 0.1) < 0.01


def test_the_hash_never_changes_between_versions() -> None:
    """A changed hash would move rows between the sides of every existing data set."""
    assert content_hash("Hello  World") == content_hash("hello world") == 0x878633AA32A3B150
