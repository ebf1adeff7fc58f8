"""spec.deadline and spec.budget: how much the attempts of a FineTuneJob may take in all, and what follows then."""

from dataclasses import dataclass
from typing import Literal

from finetune_api.contract import LimitsConfig
from finetune_api.status import Usage
from finetune_operator.policies.accept import Target
from finetune_operator.policies.ledger import Cost, with_cost
from finetune_operator.policies.restarts import expected_step
from finetune_operator.policies.ways import BUDGET_EXHAUSTED, DEADLINE_EXCEEDED, Way
from finetune_operator.verdict import Observed, Verdict

REASONS = (DEADLINE_EXCEEDED.reason, BUDGET_EXHAUSTED.reason)


@dataclass(frozen=True)
class Limit:
    """One that is reached."""

    way: Way
    message: str
    remedy: str
    publish: bool = False
    """The best checkpoint is evaluated and published, instead of a failure."""
    unheard: bool = False
    """It would be, but nobody has heard of a checkpoint: only storage knows whether there is one."""

    def failed(self, o: Observed) -> Verdict:
        """Until the document changes."""
        step = expected_step(o.subject.status)
        where = f"from step {step}" if step else "from the beginning: no checkpoint was committed"
        return Verdict("Failed", self.way.reason, f"{self.message}; {self.remedy} to go on {where}")


def reached(o: Observed, target: Target, cost: Cost | None = None) -> Limit | None:
    """The deadline first: it ends also what is to be published. `cost` is that of an attempt which goes on.

    What is published depends on the checkpoint in the status: let `o` know what was said last (`knowing`).
    """
    status, limits = o.subject.status, target.config.limits
    usage = with_cost(status, cost) if cost is not None else status.usage or Usage()
    running, gpu = usage.running_seconds or 0, usage.gpu_seconds or 0
    if limits.deadline_seconds is not None and running >= limits.deadline_seconds:
        ran, allowed = spoken(running), spoken(limits.deadline_seconds)
        name, remedy = _whose("spec.deadline", "deadline", limits)
        return Limit(DEADLINE_EXCEEDED, f"the attempts ran {ran}, {name} is {allowed}", remedy)
    if limits.gpu_seconds is not None and gpu >= limits.gpu_seconds:
        name, remedy = _whose("spec.budget.gpuHours", "gpuHours", limits)
        message = f"{gpu / 3600:.4g} GPU hours are used, {name} is {limits.gpu_seconds / 3600:.4g}"
        best, committed = limits.stop_at_best, expected_step(status) > 0
        return Limit(BUDGET_EXHAUSTED, message, remedy, publish=best and committed, unheard=best and not committed)
    return None


def _whose(field: str, name: Literal["deadline", "gpuHours"], limits: LimitsConfig) -> tuple[str, str]:
    """What bounds the job, and what to do about it. The profile is read again when the document changes."""
    if name not in (limits.of_profile or []):
        return field, "raise it"
    return f"the profile's limits.{name}", f"have it raised, then set {field},"


def spoken(seconds: float) -> str:
    """For instance 1h30m, 10m or 45s, as a document has it."""
    whole = int(seconds)
    parts = ((whole // 3600, "h"), (whole // 60 % 60, "m"), (whole % 60, "s"))
    return "".join(f"{number}{unit}" for number, unit in parts if number) or "0s"
