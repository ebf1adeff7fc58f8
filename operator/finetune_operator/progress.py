"""Pulls /progress from trainer pods: from the pod itself inside the cluster, through the API server from outside.

What a pod answers is not trusted: time, size and form are bounded, redirects are not followed. A failure is no news.
Questions go on beside the looks that want their answers.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import aiohttp

from finetune_api.contract import PROGRESS_PORT, Progress
from finetune_operator import tracing
from finetune_operator.kube import TROUBLE, Kube
from finetune_operator.metrics import PROGRESS
from finetune_operator.reading import heard
from finetune_operator.views import Pod

logger = logging.getLogger(__name__)

TIMEOUT = aiohttp.ClientTimeout(total=2.0)
LIMIT = 64 * 1024
FRESH = 1.5
"""Seconds for which an answer is not asked for again."""
PATIENCE = 0.25
"""Seconds for which a look waits for an answer: looks share few workers, and a network may swallow every question."""
REST = 10.0
"""Seconds between two questions to a pod that let the last one run out of time."""
CONNECTIONS = 256
REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class _Heard:
    progress: Progress | None
    """What it said last."""
    due: float
    """When it may be asked again, by the loop's clock."""
    mute: bool = False
    """It let the last question run out of time."""


NOTHING = _Heard(None, due=-inf)


class ProgressReader:
    """Asks the first pod of a train Job, at most every FRESH seconds.

    An answer that nobody waits for any more is told by `wake`, with the UID of the FineTuneJob: the next look has it.
    `log_names` says what a line of the log about the FineTuneJob with a UID carries.
    Kopf waits for open questions when it ends, as it does for every task: for two seconds at most.
    """

    def __init__(
        self,
        kube: Kube,
        *,
        wake: Callable[[str], None] = lambda uid: None,
        log_names: Callable[[str], Mapping[str, str]] = lambda uid: {"job_uid": uid},
    ) -> None:
        self._kube = kube
        self._wake = wake
        self._log_names = log_names
        self._session: aiohttp.ClientSession | None = None
        self._heard: dict[str, _Heard] = {}
        self._open: dict[str, asyncio.Task[None]] = {}

    async def read(self, namespace: str, pods: Sequence[Pod], *, ask: bool = True) -> Progress | None:
        """What the pod said last, of its run or another. None when it has said nothing. Asks it only if `ask`, or if
        it has said nothing.
        """
        pod = next((pod for pod in pods if pod.index == 0 and pod.running and pod.ip), None)
        if pod is None:
            return None
        heard = self._heard.get(pod.uid, NOTHING)
        wanted = ask or heard.progress is None
        if wanted and pod.uid not in self._open and asyncio.get_running_loop().time() >= heard.due:
            question = self._question(namespace, pod, began=asyncio.get_running_loop().time())
            self._open[pod.uid] = asyncio.create_task(question, name=f"question to {pod.name}")
        if wanted and pod.uid in self._open and not heard.mute:
            await asyncio.wait({self._open[pod.uid]}, timeout=PATIENCE)
        return self._heard.get(pod.uid, NOTHING).progress

    async def _question(self, namespace: str, pod: Pod, *, began: float) -> None:
        """Its end is remembered, whatever it is."""
        clock, before = asyncio.get_running_loop().time, self._heard.get(pod.uid, NOTHING)
        answer, mute = None, False
        try:
            answer = await self._ask(namespace, pod)
        except TimeoutError:
            mute = True
        except Exception:  # of a program that a kubeconfig names, say: nobody else would hear of it
            extra = dict(self._log_names(pod.subject))
            logger.exception("pod %s/%s could not be asked for its progress", namespace, pod.name, extra=extra)
        finally:
            del self._open[pod.uid]
        now = clock()
        PROGRESS.labels("answered" if answer is not None else "silent").inc()
        if len(self._heard) >= REMEMBERED:
            self._heard.clear()
        self._heard[pod.uid] = _Heard(answer or before.progress, due=now + (REST if mute else FRESH), mute=mute)
        late = before.mute or now - began >= PATIENCE
        if late and answer is not None and answer != before.progress:
            self._wake(pod.subject)

    async def close(self) -> None:
        """Whoever waits for an answer is no longer there."""
        questions = list(self._open.values())
        for question in questions:
            question.cancel()
        await asyncio.gather(*questions, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def _ask(self, namespace: str, pod: Pod) -> Progress | None:
        """None when it does not answer with progress. Raises TimeoutError when it does not answer in time."""
        extra = dict(self._log_names(pod.subject))
        try:
            content = await (self._through_server(namespace, pod) if self._kube.outside else self._directly(pod))
            answer = heard(Progress, content)
        except TimeoutError:
            logger.debug("pod %s/%s does not answer in time", namespace, pod.name, extra=extra)
            raise
        except TROUBLE as error:
            logger.debug("pod %s/%s does not tell its progress: %s", namespace, pod.name, error, extra=extra)
        else:
            if answer is None:
                logger.debug("pod %s/%s tells something that is no progress", namespace, pod.name, extra=extra)
            return answer
        return None

    async def _through_server(self, namespace: str, pod: Pod) -> bytes:
        return (await self._kube.pod_progress(namespace, pod.name, PROGRESS_PORT))[:LIMIT]

    async def _directly(self, pod: Pod) -> bytes:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=TIMEOUT, trust_env=False, connector=aiohttp.TCPConnector(limit=CONNECTIONS)
            )
        host = f"[{pod.ip}]" if pod.ip and ":" in pod.ip else pod.ip
        url = f"http://{host}:{PROGRESS_PORT}/progress"
        with tracing.request("GET", "/progress", url) as answered:
            async with self._session.get(url, allow_redirects=False) as answer:
                answered(answer.status)
                if answer.status != 200:
                    raise aiohttp.ClientError(f"HTTP status {answer.status}")
                return await answer.content.read(LIMIT)
