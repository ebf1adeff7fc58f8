"""The license of the base model: as the document says, or its card; and whether the profile allows it. Torch-free."""

from finetune_api.contract import RunConfig
from finetune_trainer.data.read import DataError
from finetune_trainer.hub import license_in
from finetune_trainer.storage import NotFound, Store

CARD = "README.md"
_LIMIT = 256 * 1024
"""Bytes of a card that are looked at."""
_UNKNOWN = ("other", "unknown")


def license_of(store: Store, config: RunConfig) -> str | None:
    """The base model's license in lower case, None where nobody says it. `store` holds the model.

    Raises DataError LicenseNotAllowed where the profile allows only some and this is none of them; a card's word and
    the document's must both be allowed.
    """
    on_card = _on_card(store)
    given = config.model_license
    if config.allowed_licenses is not None:
        allowed = {name.lower() for name in config.allowed_licenses}
        said = [name for name in (given, on_card) if name is not None and name not in _UNKNOWN]
        for name in said:
            if name not in allowed:
                raise _refused(store, f"is under {name}", config.allowed_licenses, "choose another base model")
        if not said:
            hint = "name it in spec.model.license, or choose another base model"
            raise _refused(store, f"names no license in {CARD}", config.allowed_licenses, hint)
    return given or on_card


def _on_card(store: Store) -> str | None:
    try:
        return license_in(store.read(CARD, limit=_LIMIT).decode(errors="replace"))
    except NotFound as error:
        if error.reason == "ObjectNotFound":
            return None
        raise


def _refused(store: Store, what: str, allowed: list[str], hint: str) -> DataError:
    return DataError(
        "LicenseNotAllowed", f"The model at {store.uri} {what}; the profile allows {', '.join(allowed)}: {hint}."
    )
