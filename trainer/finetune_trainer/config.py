"""The resolved run as pods find it: config.json, and how its stores are reached."""

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from finetune_api.contract import CA_PATH, CREDENTIALS_PATH, RunConfig
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


_STYLES: dict[str, Literal["path", "virtual"]] = {"Path": "path", "VirtualHost": "virtual"}


def storage_settings(config: RunConfig, credentials: Path | None) -> StorageSettings:
    """How all stores of a run are reached; `credentials` is the directory of a mounted Secret."""
    storage = config.storage
    mounted = credentials == Path(CREDENTIALS_PATH)
    return StorageSettings(
        endpoint=storage.endpoint,
        region=storage.region,
        credentials_dir=credentials,
        credentials_name=f"the Secret {storage.credentials_secret}" if mounted else None,
        addressing=_STYLES[storage.addressing] if storage.addressing else "auto",
        ca_file=Path(CA_PATH) if storage.ca_config_map else None,
        ca_name=f"the ConfigMap {storage.ca_config_map}" if storage.ca_config_map else None,
    )
