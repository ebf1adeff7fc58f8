"""The resolved run as pods find it: config.json, and how its stores are reached."""

from pathlib import Path

from pydantic import ValidationError

from finetune_api.contract import CREDENTIALS_PATH, RunConfig
from finetune_trainer.data.read import DataError
from finetune_trainer.storage import StorageSettings


def read_config(path: Path) -> RunConfig:
    """Read config.json. Raises DataError InvalidConfig."""
    try:
        return RunConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError("InvalidConfig", f"The run's config {path} cannot be read: {error.strerror}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise DataError(
            "InvalidConfig",
            f"The run's config {path} is not of this version: {where}: {first['msg']}; "
            "operator and trainer must match.",
        ) from error


def storage_settings(config: RunConfig, credentials: Path | None) -> StorageSettings:
    """How all stores of a run are reached; `credentials` is the directory of a mounted Secret."""
    storage = config.storage
    mounted = credentials == Path(CREDENTIALS_PATH)
    return StorageSettings(
        endpoint=storage.endpoint,
        region=storage.region,
        credentials_dir=credentials,
        credentials_name=f"the Secret {storage.credentials_secret}" if mounted else None,
    )
