"""Is the document one that can be run, and as what? Once pinned, a generation is never resolved again."""

from dataclasses import dataclass

from pydantic import ValidationError

from finetune_api.contract import RunConfig
from finetune_api.job import FineTuneJobSpec
from finetune_api.profile import FineTuneProfileSpec
from finetune_api.resolve import ResolveError, resolve, restart_key
from finetune_operator.verdict import Observed
from finetune_operator.views import Pinned


@dataclass(frozen=True)
class Refusal:
    """Why this generation cannot be run."""

    reason: str
    message: str
    final: bool
    """False: it may come right without a change of the document."""


@dataclass(frozen=True)
class Target:
    """What the present generation asks for."""

    config: RunConfig
    key: str
    is_pinned: bool


def accept(o: Observed) -> Target | Refusal:
    subject = o.subject
    pinned = o.pinned.get(subject.generation)
    if pinned is not None:
        return target_of(pinned)
    if subject.generation in o.unreadable:
        message = (
            f"the pinned configuration of generation {subject.generation} was written by another version of the "
            "operator and cannot be read; change the spec to pin a new one, or run that version again"
        )
        return Refusal("PinnedConfigUnreadable", message, final=False)
    return _resolve(o)


def target_of(pinned: Pinned) -> Target:
    return Target(pinned.config, pinned.key, is_pinned=True)


def _resolve(o: Observed) -> Target | Refusal:
    subject, before = o.subject, _before(o)
    try:
        spec = FineTuneJobSpec.model_validate(dict(subject.spec))
    except ValidationError as error:
        return Refusal("InvalidSpec", _explain(error, "spec"), final=True)
    name = spec.profile or "default"
    profile = o.profiles.get(name)
    if profile is None:
        message = f"spec.profile: there is no FineTuneProfile named {name}; create it or name another"
        return Refusal("ProfileNotFound", message, final=False)
    try:
        profile_spec = FineTuneProfileSpec.model_validate(dict(profile.spec))
    except ValidationError as error:
        message = f"FineTuneProfile {name} does not validate: {_explain(error, 'spec')}"
        return Refusal("InvalidProfile", message, final=False)
    try:
        config = resolve(
            spec,
            profile_spec,
            job=f"{subject.namespace}/{subject.name}",
            job_uid=subject.uid,
            generation=subject.generation,
            defaults=o.defaults,
            before=before.config if before is not None else None,
        )
    except ResolveError as error:
        return Refusal(error.reason, error.message, final=True)
    return Target(config, restart_key(config) if before is None else before.key, is_pinned=False)


def _before(o: Observed) -> Pinned | None:
    """The last pinned document, where only live fields have changed since: its pods go on, whatever a profile or a
    newer operator would make of it by now."""
    last = max((one for one in (*o.pinned, *o.unreadable) if one < o.subject.generation), default=0)
    before = o.pinned.get(last)
    return before if before is not None and before.asked == o.subject.asked else None


def _explain(error: ValidationError, root: str) -> str:
    """The first problems with their field paths, in one sentence each."""
    problems = error.errors(include_url=False, include_input=False)
    lines = [f"{_path(root, problem['loc'])}: {problem['msg']}" for problem in problems[:5]]
    more = len(problems) - len(lines)
    return "; ".join(lines) + (f"; and {more} more" if more else "")


def _path(root: str, parts: tuple[int | str, ...]) -> str:
    return root + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
