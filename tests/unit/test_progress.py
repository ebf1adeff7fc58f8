"""Progress from a pod that may answer anything: a real HTTP server on an address of its own stands for the pod."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any, cast

import pytest
from aiohttp import ClientTimeout, web

from finetune_api.contract import PROGRESS_PORT, Progress
from finetune_operator.kube import Kube
from finetune_operator.progress import LIMIT, ProgressReader
from finetune_operator.views import Pod

HOST = f"127.{os.getpid() >> 8 & 255}.{os.getpid() & 255}.77"
"""Of this process: the port is the same for all, and tests of this file may run in several at once."""
TIME = "2026-03-01T12:00:00+00:00"
GOOD = Progress(run_id="r", stage="Training", step=1, total_steps=9, started_at=TIME, updated_at=TIME)
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
async def reader(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ProgressReader]:
    """Patient, as a busy machine may take a while."""
    monkeypatch.setattr("finetune_operator.progress.PATIENCE", 10.0)
    made = ProgressReader(cast("Kube", Inside()))
    yield made
    await made.close()


@pytest.fixture
async def impatient() -> AsyncIterator[ProgressReader]:
    """As it is in the operator."""
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
    assert await reader.read("ns", [pod()]) is None
    started = asyncio.get_running_loop().time()
    await told(reader)
    assert asyncio.get_running_loop().time() - started < 2.9
    assert await reader.read("ns", [pod()]) is None
    await runner.cleanup()


async def told(reader: ProgressReader) -> None:
    """Until no question is open."""
    await asyncio.gather(*reader._open.values())


class Gate:
    """A trainer that answers once it may."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.asked = 0

    async def __call__(self, request: web.Request) -> web.Response:
        self.asked += 1
        await self.open.wait()
        return await good(request)


async def test_an_answer_that_takes_long_is_not_waited_for_and_wakes_whose_it_is() -> None:
    woken: list[str] = []
    reader, gate = ProgressReader(cast("Kube", Inside()), wake=woken.append), Gate()
    runner = await answering(gate)
    clock = asyncio.get_running_loop().time
    started = clock()
    assert await reader.read("ns", [pod()]) is None
    assert await reader.read("ns", [pod()]) is None
    assert clock() - started < 1.5, "a quarter of a second each, where two seconds would be allowed"
    assert gate.asked == 1, "one question at a time"
    assert woken == []
    gate.open.set()
    await told(reader)
    assert woken == ["s"]
    assert await reader.read("ns", [pod()]) == GOOD
    await reader.close()
    await runner.cleanup()


async def test_a_late_answer_is_as_fresh_as_any_other(
    impatient: ProgressReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look that it begins must not ask again: it would never end."""
    monkeypatch.setattr("finetune_operator.progress.FRESH", 0.6)
    gate = Gate()
    runner = await answering(gate)
    assert await impatient.read("ns", [pod()]) is None
    await asyncio.sleep(0.6)
    gate.open.set()
    await told(impatient)
    assert await impatient.read("ns", [pod()]) == GOOD
    assert gate.asked == 1
    await runner.cleanup()


async def test_a_question_that_fails_in_an_unexpected_way_is_no_news_and_not_asked_again_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("finetune_operator.progress.PATIENCE", 10.0)
    reader = ProgressReader(cast("Kube", Inside()), log_names=lambda uid: {"job": "ns/one", "job_uid": uid})
    asked: list[Pod] = []

    async def fails(asked_pod: Pod) -> bytes:
        asked.append(asked_pod)
        raise RuntimeError("the program that gives a token is not there")

    monkeypatch.setattr(reader, "_directly", fails)
    assert await reader.read("ns", [pod()]) is None
    assert await reader.read("ns", [pod()]) is None
    assert len(asked) == 1
    (line,) = [record for record in caplog.records if "could not be asked for its progress" in record.message]
    assert {"job": "ns/one", "job_uid": "s"}.items() <= vars(line).items()
    await reader.close()


async def test_an_answer_that_a_look_has_waited_for_wakes_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_operator.progress.PATIENCE", 10.0)
    woken: list[str] = []
    reader = ProgressReader(cast("Kube", Inside()), wake=woken.append)
    runner = await answering(good)
    assert await reader.read("ns", [pod()]) == GOOD
    assert woken == []
    await reader.close()
    await runner.cleanup()


async def test_a_trainer_that_lets_questions_run_out_of_time_is_waited_for_once_and_asked_seldom(
    impatient: ProgressReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that swallows every question must not keep the looks at other jobs waiting."""
    monkeypatch.setattr("finetune_operator.progress.TIMEOUT", ClientTimeout(total=0.3))
    gate = Gate()
    runner = await answering(gate)
    assert await impatient.read("ns", [pod()]) is None
    await told(impatient)
    clock = asyncio.get_running_loop().time
    started = clock()
    for _ in range(100):
        assert await impatient.read("ns", [pod()]) is None
    assert clock() - started < 1.0
    assert gate.asked == 1
    monkeypatch.setattr("finetune_operator.progress.REST", 0.0)
    gate.open.set()
    (heard,) = impatient._heard.values()
    impatient._heard["p"] = replace(heard, due=0.0)
    assert await impatient.read("ns", [pod()]) is None, "it is asked beside the look"
    await told(impatient)
    assert await impatient.read("ns", [pod()]) == GOOD
    await runner.cleanup()


async def test_a_trainer_that_falls_silent_keeps_its_last_word(reader: ProgressReader) -> None:
    runner = await answering(good)
    assert await reader.read("ns", [pod()]) == GOOD
    await runner.cleanup()
    reader._heard["p"] = replace(reader._heard["p"], due=0.0)
    assert await reader.read("ns", [pod()]) == GOOD
    await told(reader)
    assert await reader.read("ns", [pod()]) == GOOD


async def test_questions_that_are_open_end_with_the_reader() -> None:
    woken: list[str] = []
    reader, gate = ProgressReader(cast("Kube", Inside()), wake=woken.append), Gate()
    runner = await answering(gate)
    assert await reader.read("ns", [pod()]) is None
    await reader.close()
    assert not reader._open
    gate.open.set()
    await asyncio.sleep(0.05)
    assert woken == []
    await runner.cleanup()


async def test_a_pod_that_listens_to_nobody_is_no_news(reader: ProgressReader) -> None:
    assert await reader.read("ns", [pod()]) is None


async def test_only_the_first_pod_is_asked_and_only_while_it_runs(reader: ProgressReader) -> None:
    runner = await answering(good)
    assert await reader.read("ns", [pod(index=1)]) is None
    assert await reader.read("ns", [pod(running=False)]) is None
    assert await reader.read("ns", [pod(ip=None)]) is None
    await runner.cleanup()
