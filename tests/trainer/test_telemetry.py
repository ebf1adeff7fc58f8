"""The metrics of a run, and that the documentation names each of them."""

import re
from pathlib import Path

from finetune_api.contract import Checkpointed, Progress
from finetune_api.status import BestCheckpoint
from finetune_trainer.telemetry import STAGES, ProgressCollector

PAGE = Path(__file__).resolve().parents[2] / "docs/observability.md"
SAID = Progress(
    run_id="0123456789abcdef",
    attempt=2,
    stage="Training",
    step=5,
    total_steps=20,
    resumed_from_step=4,
    epoch=0.5,
    loss=0.25,
    learning_rate=2e-5,
    samples_per_second=31.5,
    estimated_completion_time="2026-01-01T00:10:00+00:00",
    checkpoint=Checkpointed(
        step=4,
        uri="s3://models/out/runs/0123456789abcdef/checkpoints/4",
        committed_at="2026-01-01T00:00:30+00:00",
        best=BestCheckpoint(step=2, metric="f1", value=0.9),
    ),
    started_at="2026-01-01T00:00:00+00:00",
    updated_at="2026-01-01T00:01:00+00:00",
)


def test_the_documentation_names_every_metric_of_a_run_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_text(SAID.model_dump_json(by_alias=True))
    families = list(ProgressCollector(tmp_path / "progress.json").collect())
    text = PAGE.read_text(encoding="utf-8").partition("## Metrics of a run\n")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\|`(finetune_\w+)`\|(\w+)\|", text, re.M))
    assert rows == {family.name: family.type for family in families}
    assert {name for name in STAGES if f"`{name}`" not in text} == set()


def test_the_only_label_of_a_run_is_its_stage(tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_text(SAID.model_dump_json(by_alias=True))
    families = ProgressCollector(tmp_path / "progress.json").collect()
    assert {name for family in families for sample in family.samples for name in sample.labels} == {"stage"}
