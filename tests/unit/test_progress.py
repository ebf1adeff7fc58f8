"""Progress from a pod that may answer anything: a real HTTP server on an address of its own stands for the pod."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import pytest
from aiohttp import web

from finetune_api.contract import PROGRESS_PORT, Progress
from finetune_operator.kube import Kube
from finetune_operator.progress import LIMIT, ProgressReader
from finetune_operator.views import Pod

HOST = "127.0.0.77"
GOOD = Progress(run_id="r", stage="Training", step=1, total_steps=9, started_at="s", updated_at="u")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Inside:
    """What the reader asks of a connection that is inside the cluster: nothing."""

    outside = False


def pod(uid: str = "p", **changes: Any) -> Pod:
    fields: dict[str, Any] = {"index": 0, "running": True, "ip": HOST, **changes}
    return Pod(
        name="x",
        uid=uid,
        owner="o",
        subject="s",
        key="k",
        role="train",
        phase="Running",
        node="n",
        placed=None,
        started=None,
        gone_by=None,
        was_asked_to_go=False,
        disrupted="",
        words="",
        never_began=False,
        unreachable=False,
        unschedulable="",
        waiting=None,
        exit=None,
        **fields,
    )


@pytest.fixture
async def reader() -> AsyncIterator[ProgressReader]:
    made = ProgressReader(cast("Kube", Inside()))
    yield made
    await made.close()


async def answering(handler: Handler, host: str = HOST) -> web.AppRunner:
    application = web.Application()
    application.add_routes([web.get("/progress", handler), web.get("/elsewhere", good)])
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, host, PROGRESS_PORT).start()
    return runner


async def good(_: web.Request) -> web.Response:
    return web.Response(text=GOOD.model_dump_json(by_alias=True))


async def test_a_pod_that_answers_is_read(reader: ProgressReader) -> None:
    runner = await answering(good)
    assert await reader.read("ns", [pod()]) == GOOD
    await runner.cleanup()


async def test_it_is_not_asked_again_at_once_and_keeps_its_last_word(reader: ProgressReader) -> None:
    runner = await answering(good)
    await reader.read("ns", [pod()])
    await runner.cleanup()
    assert await reader.read("ns", [pod()]) == GOOD


async def test_who_waits_for_room_asks_only_a_trainer_that_has_said_nothing(
    reader: ProgressReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[web.Request] = []

    async def counting(request: web.Request) -> web.Response:
        asked.append(request)
        return await good(request)

    monkeypatch.setattr("finetune_operator.progress.FRESH", 0.0)
    runner = await answering(counting)
    for ask, times in ((False, 1), (False, 1), (True, 2)):
        assert await reader.read("ns", [pod()], ask=ask) == GOOD
        assert len(asked) == times
    await runner.cleanup()


async def _redirect(_: web.Request) -> web.Response:
    raise web.HTTPFound("/elsewhere")


async def _error(_: web.Request) -> web.Response:
    return web.Response(status=500, text=GOOD.model_dump_json(by_alias=True))


async def _garbage(_: web.Request) -> web.Response:
    return web.Response(text='{"step": "many"}')


async def _endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    try:
        for _ in range(4 * LIMIT // 4096):
            await response.write(b" " * 4096)
    except ConnectionError:
        pass
    return response


async def _slow(_: web.Request) -> web.Response:
    await asyncio.sleep(3)
    return await good(_)


@pytest.mark.parametrize("handler", [_redirect, _error, _garbage, _endless, _slow])
async def test_what_is_no_progress_is_no_news(reader: ProgressReader, handler: Handler) -> None:
    runner = await answering(handler)
    started = asyncio.get_running_loop().time()
    assert await reader.read("ns", [pod()]) is None
    assert asyncio.get_running_loop().time() - started < 2.9
    await runner.cleanup()


async def test_a_pod_that_listens_to_nobody_is_no_news(reader: ProgressReader) -> None:
    assert await reader.read("ns", [pod()]) is None


async def test_only_the_first_pod_is_asked_and_only_while_it_runs(reader: ProgressReader) -> None:
    runner = await answering(good)
    assert await reader.read("ns", [pod(index=1)]) is None
    assert await reader.read("ns", [pod(running=False)]) is None
    assert await reader.read("ns", [pod(ip=None)]) is None
    await runner.cleanup()
