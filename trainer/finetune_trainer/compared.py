"""What a loss needs to know of the untouched base, row by row: computed once an attempt, never by a second model."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from finetune_trainer.data.order import Rows
from finetune_trainer.world import World

CHUNK = 64
"""Rows computed together; fixed, because it decides bits."""
_log = logging.getLogger("finetune.train")


class OfBase:
    """Numbers of rows of the encoded store, in a file below the work directory. Computed anew by every process: a file
    that is there already is never trusted."""

    def __init__(self, work: Path, *, rows: int, numbers: int, local_rank: int) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self._found: NDArray[np.float64] = np.lib.format.open_memmap(
            work / f"base-{local_rank}.npy", mode="w+", dtype=np.float64, shape=(rows, numbers)
        )
        self._found[:] = np.nan

    def unknown(self, rows: Rows) -> Rows:
        """Those of the rows that have not been asked about."""
        return rows[np.isnan(self._found[rows]).any(1)]

    def ask(
        self, rows: Rows, answer: Callable[[Rows], torch.Tensor], *, world: World, beat: Callable[[], None]
    ) -> None:
        """Compute the numbers of rows, the longest of which come first, each chunk on one rank of the world."""
        if len(rows):
            _log.info("asking the untouched base about %d rows", len(rows))
        for number, start in enumerate(range(0, len(rows), CHUNK)):
            beat()
            chunk = rows[start : start + CHUNK]
            source = number % world.size
            numbers = torch.empty(len(chunk), self._found.shape[1], dtype=torch.float64, device=world.device)
            if world.rank == source:
                with torch.no_grad():
                    numbers = answer(chunk).double().contiguous()
            self._found[chunk] = world.spread(numbers, source=source).cpu().numpy()

    def of(self, rows: Rows) -> NDArray[np.float64]:
        """[rows, numbers]"""
        found: NDArray[np.float64] = self._found[rows]
        assert not np.isnan(found).any(), "a row that the base was not asked about"
        return found
