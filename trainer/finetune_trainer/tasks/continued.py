"""How a training row is asked for, to find out whether a model knows it by heart.

The model is given the beginning of a row and has to go on with it, the likeliest token each time, as the row does: then
the row is extractable with so many tokens of context (Carlini et al. 2022, "Quantifying Memorization Across Neural
Language Models"). Greedy decoding reproduces a text exactly when each of its tokens is the likeliest one after those
before it, so one forward pass over the row tells, and nothing has to be generated.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CONTEXT = 50
"""Tokens that are given at most, of a text that has no question to it."""
CONTINUATION = 50
"""Tokens that are asked for at most."""
LEAST = 10
"""Tokens below which a continuation says nothing: yes and no are known by heart to every model."""
Spans = NDArray[np.int64]
"""Of each row the first position that is asked for and the one behind the last, [rows, 2]."""


def spans(starts: Sequence[int], ends: Sequence[int]) -> Spans:
    """`ends` are where rows end; what is beyond CONTINUATION is not asked for."""
    first = np.array(starts, dtype=np.int64)
    last = np.maximum(first, np.minimum(np.array(ends, dtype=np.int64), first + CONTINUATION))
    return np.stack([first, last], axis=1)


def reproduced(hits: NDArray[np.bool_], asked: Spans) -> NDArray[np.bool_]:
    """Which rows are reproduced, [rows]. `hits`: of each position whether the likeliest token is the row's."""
    places = np.arange(hits.shape[1])
    inside = (places >= asked[:, :1]) & (places < asked[:, 1:])
    return np.asarray((hits | ~inside).all(1))
