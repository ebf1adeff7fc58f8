"""Requests to an API server over connections that are kept: kubectl is a process each time, and tests look often."""

import io
import json
import urllib.error
from pathlib import Path
from typing import Any

import urllib3
from kubernetes import client, config


class Api:
    """The API server that a kubeconfig names, as its user. Safe to use from several threads."""

    def __init__(self, kubeconfig: Path) -> None:
        settings = client.Configuration()
        config.load_kube_config(str(kubeconfig), client_configuration=settings)
        settings.proxy = None
        self._host = settings.host
        self._headers = {str(auth["key"]): str(auth["value"]) for auth in settings.auth_settings().values()}
        self._connections = client.ApiClient(settings).rest_client.pool_manager

    def text(self, path: str, *, method: str = "GET", body: Any = None, kind: str = "application/json") -> str:
        """What it answers; a body that is no bytes is sent as JSON. Raises urllib.error.HTTPError where it says no, and
        another OSError where it says nothing."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {**self._headers, "Content-Type": kind, "Accept": "application/json"}
        try:
            answer = self._connections.request(
                method, f"{self._host}{path}", body=content, headers=headers, timeout=30, retries=False
            )
        except urllib3.exceptions.HTTPError as error:
            raise OSError(f"{method} {path}: {error}") from error
        if answer.status >= 300:
            raise urllib.error.HTTPError(path, answer.status, answer.reason, answer.headers, io.BytesIO(answer.data))
        return str(answer.data.decode())

    def get(self, path: str) -> dict[str, Any]:
        """An object or a list. Raises like `text`."""
        return dict(json.loads(self.text(path)))
