"""What `finetune validate` prints and returns, and what the loaders of `finetune run` give."""

import io
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from finetune_api.evaluation import Evaluation
from finetune_api.job import FineTuneJob, FineTuneJobSpec, _primary
from finetune_api.profile import FineTuneProfile
from finetune_api.task import Task
from finetune_api.tasks import TaskKind
from finetune_api.validate import check, load_job, load_profile, main, written

GOOD = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: support-intents}
spec:
  task: {type: text-classification}
  model: {uri: s3://models/minilm}
  data:
    train: [{uri: s3://data/support/train.jsonl}]
  output: {uri: s3://models/support-intents}
"""
PROFILE = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneProfile
metadata: {name: default}
spec: {storage: {region: eu-west-1}}
"""


def said(text: str) -> list[str]:
    return [str(problem) for document in check(text, name="job.yaml") for problem in document.problems]


def with_training(lines: str) -> str:
    return GOOD + "  training:\n" + "".join(f"    {line}\n" for line in dedent(lines).strip().split("\n"))


def test_every_problem_is_listed_with_file_line_column_path_and_remedy() -> None:
    text = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: support-intents}
spec:
  task: {type: text-clasification, labels: [yes, bug]}
  model: {uri: /models/minilm}
  learningRate: 2e-5
  data:
    train: [{uri: s3://data/train.jsonl}]
    validation: {fraction: 1.5, uri: s3://data/v.jsonl}
  training:
    epochs: 1
    maxSteps: 3.5
    learningRate: "2e-5"
    batchSize: 0
  output: {weights: best}
"""
    assert said(text) == [
        "job.yaml:5:16: spec.task.type: text-clasification is not known: did you mean text-classification?",
        'job.yaml:5:45: spec.task.labels[0]: yes is a boolean in YAML: quote it: "yes"',
        "job.yaml:6:16: spec.model.uri: must be an address such as s3://bucket/folder, hf://org/name@revision or "
        "file:///folder, without spaces, not /models/minilm",
        "job.yaml:7:3: spec.learningRate: is no field: did you mean spec.training.learningRate?",
        "job.yaml:10:5: spec.data.validation: give exactly one of fraction, uri and sources",
        "job.yaml:10:28: spec.data.validation.fraction: must be less than 1, not 1.5",
        "job.yaml:11:3: spec.training: give epochs and maxSteps not together: at most one of them",
        "job.yaml:13:15: spec.training.maxSteps: must be a whole number, not 3.5",
        'job.yaml:14:19: spec.training.learningRate: "2e-5" is text because of its quotes: take them away',
        "job.yaml:15:16: spec.training.batchSize: must be at least 1, not 0",
        "job.yaml:16:3: spec.output.uri: is missing: add it (Where checkpoints, reports and the model go: an s3:// or "
        "file:// address (file:// only outside a cluster))",
        "job.yaml:16:21: spec.output.weights: best is not known: did you mean Best?",
    ]


def test_a_missing_choice_lists_the_choices() -> None:
    (problem,) = said(GOOD + "  method: {rank: 8}\n")
    assert problem.startswith("job.yaml:10:3: spec.method.type: is missing: add it (full trains all weights")
    assert problem.endswith(": full, head, lora, qlora, dora, adapter, ia3, prompt or prefix)")


def test_a_field_without_value_is_a_note_and_counts_as_left_out() -> None:
    text = with_training("seed:\nepochs: 2")
    assert said(text) == [
        "job.yaml:11:5: note: spec.training.seed: has no value and counts as left out: give one or leave the line out"
    ]
    job, problems = load_job(text, name="job.yaml")
    assert problems == []
    assert job is not None
    assert job.spec.training is not None
    assert job.spec.training.seed is None


def test_a_rule_is_checked_even_beside_a_wrong_type() -> None:
    paths = [line.split(": ")[1] for line in said(with_training("epochs: many\nmaxSteps: 3"))]
    assert paths == ["spec.training", "spec.training.epochs"]


def test_duplicates_and_wrong_values_are_told_together() -> None:
    lines = said(with_training("seed: -1\nseed: 2\nbatchSize: 0"))
    assert [line.split(": ", 2)[1] for line in lines] == [
        "spec.training.seed",
        "spec.training.seed",
        "spec.training.batchSize",
    ]


def test_file_uris_are_noted_not_refused() -> None:
    text = GOOD.replace("s3://models/minilm", "file:///models/minilm")
    assert said(text) == [
        "job.yaml:6:16: note: spec.model.uri: file:// works with finetune run only: a cluster needs s3://"
    ]
    job, problems = load_job(text, name="job.yaml")
    assert job is not None
    assert problems == []


def test_numbers_arrive_as_the_api_server_would_store_them() -> None:
    job, _ = load_job(with_training("learningRate: 2e-5\nbatchSize: 32.0\nmaxSteps: 1e3\nseed: 0x11"), name="job.yaml")
    assert job is not None
    training = job.spec.training
    assert training is not None
    assert (training.learning_rate, training.batch_size, training.max_steps, training.seed) == (2e-5, 32, 1000, 17)


def test_a_stored_object_with_status_and_managed_fields_is_valid() -> None:
    text = GOOD.replace(
        "{name: support-intents}", "{name: a, uid: x, generation: 1, managedFields: [], creationTimestamp: null}"
    )
    documents = check(text + "status: {phase: Succeeded, observedGeneration: 1}\n", name="job.yaml")
    assert [document.valid for document in documents] == [True]


def test_a_file_of_a_foreign_kind_is_skipped_with_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "other.yaml"
    file.write_text("apiVersion: v1\nkind: Secret\nmetadata: {name: a}\nstringData: {key: hunter2}\n")
    assert main([str(file)]) == 0
    out = capsys.readouterr().out
    assert "note: Secret of v1 is not ours: skipped" in out
    assert "hunter2" not in out


def test_a_good_file_is_zero_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(GOOD + "---\n" + PROFILE)
    assert main([str(file)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{file}: FineTuneJob support-intents is valid",
        f"{file}: FineTuneProfile default is valid",
    ]


def test_one_bad_file_of_several_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(GOOD)
    bad.write_text(with_training("seed: -1"))
    assert main([str(good), str(bad)]) == 1
    assert f"{bad}:11:11: spec.training.seed: must be at least 0, not -1" in capsys.readouterr().out


def test_a_missing_and_an_empty_file_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text("# nothing\n")
    assert main([str(tmp_path / "no.yaml"), str(empty)]) == 1
    out = capsys.readouterr().out
    assert "no.yaml: cannot be read: No such file or directory" in out
    assert "empty.yaml: holds no document" in out


FENCED = PROFILE.replace("{storage:", "{limits: {gpus: 0}, allowed: {namespaces: [team-a]}, storage:")


def test_what_a_profile_does_not_allow_is_a_problem_in_the_operators_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, profile = tmp_path / "job.yaml", tmp_path / "profile.yaml"
    file.write_text(GOOD)
    profile.write_text(FENCED)
    assert main([str(file)]) == 0
    capsys.readouterr()
    assert main([str(file)], profile=str(profile)) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{file}: FineTuneJob support-intents: "
        "spec.resources: 1 x 1 GPUs is more than the profile allows; limits.gpus: 0"
    ]
    file.write_text(GOOD.replace("{name: support-intents}", "{name: support-intents, namespace: team-b}"))
    assert main([str(file)], profile=str(profile)) == 1
    assert "metadata.namespace: team-b is not allowed by the profile; allowed: team-a" in capsys.readouterr().out


def test_without_a_profile_that_is_whole_nothing_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, profile = tmp_path / "job.yaml", tmp_path / "profile.yaml"
    file.write_text(GOOD)
    assert main([str(file)], profile=str(profile)) == 1
    assert "profile.yaml: cannot be read" in capsys.readouterr().out
    profile.write_text(FENCED.replace("gpus: 0", "gpus: -1"))
    assert main([str(file)], profile=str(profile)) == 1
    out = capsys.readouterr().out
    assert "spec.limits.gpus: must be at least 0" in out
    assert "is valid" not in out


def test_a_dash_reads_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(GOOD.encode())))
    assert main(["-"]) == 0
    assert capsys.readouterr().out == "<stdin>: FineTuneJob support-intents is valid\n"


def test_the_loaders_give_typed_documents() -> None:
    job, problems = load_job(GOOD, name="job.yaml")
    assert isinstance(job, FineTuneJob)
    assert problems == []
    assert job.metadata == {"name": "support-intents"}
    profile, problems = load_profile(PROFILE, name="profile.yaml")
    assert isinstance(profile, FineTuneProfile)
    assert problems == []


def test_the_loaders_want_exactly_one_document_of_their_kind() -> None:
    job, problems = load_job(PROFILE, name="profile.yaml")
    assert job is None
    assert [str(problem) for problem in problems] == ["profile.yaml:1:1: holds no FineTuneJob: give a file with one"]
    job, problems = load_job(GOOD + "---\n" + GOOD, name="job.yaml")
    assert job is None
    assert [str(problem) for problem in problems] == ["job.yaml:1:1: holds 2 FineTuneJobs: give a file with one"]


def test_the_job_beside_its_profile_can_be_loaded() -> None:
    job, problems = load_job(PROFILE + "---\n" + GOOD, name="both.yaml")
    assert job is not None
    assert problems == []


def test_a_bad_document_is_not_loaded_and_every_problem_comes_back() -> None:
    job, problems = load_job(with_training("seed: -1\nbatchSize: 0"), name="job.yaml")
    assert job is None
    assert [problem.path for problem in problems] == ["spec.training.seed", "spec.training.batchSize"]
    assert [problem.line for problem in problems] == [11, 12]


def test_paths_are_written_as_people_write_them() -> None:
    assert written(("spec", "data", "train", 0, "uri")) == "spec.data.train[0].uri"
    assert written(("metadata", "labels", "a.b/c")) == 'metadata.labels["a.b/c"]'


@pytest.mark.parametrize(
    "text",
    ["x", "- a\n", "1\n", "kind: FineTuneJob\n", "apiVersion: 1\nkind: 2\n", "apiVersion: []\nkind: {}\n", "{}"],
)
def test_what_is_no_resource_is_told_not_a_crash(text: str) -> None:
    documents = check(text, name="job.yaml")
    assert [document.valid for document in documents] == [False]


def test_a_primary_metric_of_another_task_is_refused_with_the_list_of_its_own() -> None:
    """Of a task with fewer metrics than there are; the validator asks about maps, the models about models."""
    kind = TaskKind(columns={"text": "text"}, metrics=("accuracy", "loss"), primary="accuracy", pipeline_tag="")
    rule = _primary("text-classification", kind)
    for metric, holds in (("accuracy", True), ("loss", True), ("f1", False), (None, True)):
        task, evaluation = {"type": "text-classification"}, {"primary": metric} if metric else None
        assert rule.holds(FineTuneJobSpec.model_construct(task=task, evaluation=evaluation)) is holds
        typed = FineTuneJobSpec.model_construct(
            task=Task(type="text-classification"), evaluation=Evaluation(primary=metric)
        )
        assert rule.holds(typed) is holds
    assert rule.message == "evaluation.primary for text-classification is one of accuracy, loss"
