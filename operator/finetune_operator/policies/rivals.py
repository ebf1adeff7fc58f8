"""One run, one owner: among FineTuneJobs with the same output and run, only one trains."""

from datetime import datetime

from finetune_operator.verdict import IDENTICAL, Observed, Rival, Verdict


def ahead(o: Observed, run: str, *, holding: bool) -> Rival | None:
    """Who has the run: whoever trains already, else the oldest. None when it is us."""
    mine = (not holding, o.subject.created, o.subject.uid)
    same = [r for r in o.rivals if r.unfinished and r.run == run]
    best = min(same, key=_rank, default=None)
    return best if best is not None and _rank(best) < mine else None


def _rank(rival: Rival) -> tuple[bool, datetime, str]:
    return (not rival.holding, rival.created, rival.uid)


def wait_for(rival: Rival) -> Verdict:
    if not rival.attended:
        message = f"{rival.name} of a FineTuneJob that is over still trains the very same model; it is waited for"
        return Verdict("Pending", IDENTICAL, message, again_after=5.0)
    message = f"{rival.name} asks for the very same model and is older or further; its result will be used"
    return Verdict("Pending", IDENTICAL, message, again_after=60.0)
