"""The small pretrained models that tests and examples start from."""

from pathlib import Path

import pytest
import torch

ASSETS = Path(__file__).resolve().parents[2] / "assets"
SENTENCES = (
    "libtext-table-perl: Perl module to format text tables",
    "python3-shapes: Python library for drawing shapes (Python 3)",
    "Returns the sum of the values in the array along the given axis.",
)


@pytest.mark.parametrize("directory", sorted(path for path in ASSETS.iterdir() if path.is_dir()), ids=lambda p: p.name)
def test_a_model_is_small_in_half_precision_and_says_where_it_comes_from(directory: Path) -> None:
    from safetensors import safe_open

    path = directory / "model.safetensors"
    assert path.stat().st_size <= 10_000_000
    with safe_open(path, "pt") as tensors:
        kinds = {tensors.get_tensor(name).dtype for name in tensors.keys()}  # noqa: SIM118 - no mapping
    assert kinds == {torch.float16}
    assert "loss" in (directory / "README.md").read_text()


def test_the_decoder_has_learned_what_its_texts_are_about() -> None:
    """A model that knows nothing has a loss of 8.0 a token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = ASSETS / "tiny-decoder"
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with torch.no_grad():
        for sentence in SENTENCES:
            ids = tokenizer(sentence, return_tensors="pt").input_ids
            assert float(model(ids, labels=ids).loss) < 6.0, sentence
            shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
            assert float(model(shuffled, labels=shuffled).loss) > float(model(ids, labels=ids).loss) + 1.0
