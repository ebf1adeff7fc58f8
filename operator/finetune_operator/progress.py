"""Pulls /progress from trainer pods: from the pod itself inside the cluster, through the API server from outside.

What a pod answers is not trusted: time, size and form are bounded, redirects are not followed. A failure is no news.
"""

import asyncio
import logging
from collections.abc import Sequence

import aiohttp
from pydantic import ValidationError

from finetune_api.contract import PROGRESS_PORT, Progress
from finetune_operator import tracing
from finetune_operator.kube import TROUBLE, Kube
from finetune_operator.metrics import PROGRESS
from finetune_operator.views import Pod

logger = logging.getLogger(__name__)

TIMEOUT = aiohttp.ClientTimeout(total=2.0)
LIMIT = 64 * 1024
FRESH = 1.5
"""Seconds for which an answer is not asked for again."""
REMEMBERED = 10_000


class ProgressReader:
    """Asks the first pod of a train Job, at most every FRESH seconds."""

    def __init__(self, kube: Kube) -> None:
        self._kube = kube
        self._session: aiohttp.ClientSession | None = None
        self._last: dict[str, tuple[float, Progress | None]] = {}

    async def read(self, namespace: str, pods: Sequence[Pod], *, ask: bool = True) -> Progress | None:
        """None when the pod does not answer, or not with the progress of its run. The last answer unless `ask`."""
        pod = next((pod for pod in pods if pod.index == 0 and pod.running and pod.ip), None)
        if pod is None:
            return None
        now = asyncio.get_running_loop().time()
        when, progress = self._last.get(pod.uid, (-FRESH, None))
        if now - when >= FRESH and (ask or progress is None):
            answer = await self._ask(namespace, pod)
            PROGRESS.labels("answered" if answer is not None else "silent").inc()
            progress = answer or progress
            if len(self._last) >= REMEMBERED:
                self._last.clear()
            self._last[pod.uid] = (now, progress)
        return progress

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _ask(self, namespace: str, pod: Pod) -> Progress | None:
        try:
            content = await (self._through_server(namespace, pod) if self._kube.outside else self._directly(pod))
            return Progress.model_validate_json(content)
        except TROUBLE as error:
            logger.debug("pod %s/%s does not tell its progress: %s", namespace, pod.name, error)
        except ValidationError:
            logger.debug("pod %s/%s tells something that is no progress", namespace, pod.name)
        return None

    async def _through_server(self, namespace: str, pod: Pod) -> bytes:
        return (await self._kube.pod_progress(namespace, pod.name, PROGRESS_PORT))[:LIMIT]

    async def _directly(self, pod: Pod) -> bytes:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=TIMEOUT, trust_env=False)
        host = f"[{pod.ip}]" if pod.ip and ":" in pod.ip else pod.ip
        url = f"http://{host}:{PROGRESS_PORT}/progress"
        with tracing.request("GET", "/progress", url) as answered:
            async with self._session.get(url, allow_redirects=False) as answer:
                answered(answer.status)
                if answer.status != 200:
                    raise aiohttp.ClientError(f"HTTP status {answer.status}")
                return await answer.content.read(LIMIT)
