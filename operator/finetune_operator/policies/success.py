"""What the status says of a finished run."""

from datetime import datetime

from finetune_api.contract import TrainOutcome
from finetune_api.status import CheckpointStatus, ProgressStatus
from finetune_operator.verdict import Mark, Verdict
from finetune_operator.views import format_time


def succeeded(result: TrainOutcome, *, reason: str, now: datetime, metric: str) -> Verdict:
    """`metric` names the number that goes into the message."""
    message = _sentence(result, metric)
    if result.partial:
        done = f"stopped at step {result.final_step} of {result.total_steps} because spec.budget is used up"
        reason, message = "StoppedAtBest", f"{done}; the best checkpoint is published: {message}"
    verdict = Verdict("Succeeded", reason, message, facts=_facts(result, now=now))
    return verdict.marking(Evaluated=Mark("True", "Evaluated", message))


def not_good_enough(result: TrainOutcome, *, reason: str, message: str, now: datetime) -> Verdict:
    """The model is published, and its gates are not met: final until the document changes."""
    verdict = Verdict("Failed", reason, message, facts=_facts(result, now=now))
    return verdict.marking(Evaluated=Mark("True", reason, message))


def _facts(result: TrainOutcome, *, now: datetime) -> dict[str, object]:
    progress = ProgressStatus(
        step=result.final_step,
        total_steps=result.total_steps,
        percent=min(100, 100 * result.final_step // max(1, result.total_steps)) if result.partial else 100,
        loss=result.final_loss,
        updated_at=format_time(now),
    )
    return {"evaluation": result.evaluation, "model": result.model, "progress": progress}


def last_checkpoint(seen: CheckpointStatus | None, result: TrainOutcome) -> CheckpointStatus:
    """The checkpoint of the last step, whose address is known only if a trainer was asked after it was committed."""
    last = seen if seen is not None and seen.step == result.final_step else CheckpointStatus(step=result.final_step)
    return last.model_copy(update={"best": result.best or (seen.best if seen else None)})


def _sentence(result: TrainOutcome, metric: str) -> str:
    """For instance: f1 0.861 on test (trivial 0.080, probe 0.790)."""
    evaluation = result.evaluation
    value = (evaluation.tuned or {}).get(metric)
    if value is None:
        return f"the model is published at {result.model.uri}"
    rivals = {"trivial": evaluation.trivial, "base": evaluation.base, "probe": evaluation.probe}
    compared = [f"{name} {values[metric]:.3f}" for name, values in rivals.items() if values and metric in values]
    where = f" on {evaluation.on}" if evaluation.on else ""
    return f"{metric} {value:.3f}{where}" + (f" ({', '.join(compared)})" if compared else "")
