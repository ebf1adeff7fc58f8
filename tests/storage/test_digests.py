"""Digests of content, and of which kind they are."""

import hashlib

from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.storage.digests import EVERYONE, Hasher, digest_of, hex_of, is_digest, told_sha256

# The first 32 bytes of the reference test vectors of BLAKE3, whose inputs are the bytes 0, 1, ... 250, 0, 1, ...
UNFIT = (None, 7, "", "0" * 64, "blake3:", f"md5:{'0' * 64}", f"blake3:{'0' * 63}", f"sha256:../{'0' * 61}")
KNOWN = {
    0: "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
    1: "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213",
}


def test_a_digest_names_its_algorithm_and_is_that_of_the_published_vectors() -> None:
    for size, wanted in KNOWN.items():
        assert digest_of(bytes(range(size))) == f"blake3:{wanted}"


@given(st.lists(st.binary(max_size=300_000), max_size=5))
def test_pieces_and_processors_change_nothing(pieces: list[bytes]) -> None:
    whole = b"".join(pieces)
    for threads in (1, EVERYONE):
        hasher = Hasher(threads=threads)
        for piece in pieces:
            hasher.update(piece)
        assert hasher.digest() == digest_of(whole) == f"blake3:{blake3(whole).hexdigest()}"


@given(st.binary(max_size=1000))
def test_what_a_hub_has_told_as_sha256_is_compared_as_sha256(data: bytes) -> None:
    told = told_sha256(hashlib.sha256(data).hexdigest())
    hasher = Hasher(told)
    hasher.update(data)
    assert hasher.digest() == told != digest_of(data)


def test_a_digest_is_told_from_what_else_may_stand_in_a_file() -> None:
    assert is_digest(digest_of(b""))
    assert is_digest(told_sha256("0" * 64))
    assert not any(map(is_digest, UNFIT))
    assert hex_of(told_sha256("ab")) == "ab"
