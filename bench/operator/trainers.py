"""All trainers in one: answers GET /progress for every pod, whose addresses all lead to this machine.

`python -m bench.operator.trainers SECONDS`: a training takes so long, from the first question to its pod. The number of
answers so far is printed once a second where it has changed.
"""

import asyncio
import socket
import sys
import time
from datetime import UTC, datetime

from aiohttp import web

from bench.operator.stages import RUN_ID, STEPS
from finetune_api.contract import PROGRESS_PORT, Checkpointed, Progress

LOADING = 5.0


class Trainers:
    """When each address was first asked; what a trainer tells follows from that."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._began: dict[str, float] = {}
        self.answers = 0

    async def answer(self, request: web.Request) -> web.Response:
        assert request.transport is not None
        address = request.transport.get_extra_info("sockname")[0]
        began = self._began.setdefault(address, time.time())
        self.answers += 1
        told = self._progress(began, time.time())
        return web.Response(text=told.model_dump_json(by_alias=True), content_type="application/json")

    def _progress(self, began: float, now: float) -> Progress:
        """At first it loads, during the last three tenths of the time it evaluates."""
        loading = min(LOADING, 0.1 * self._seconds)
        trained = min(max((now - began - loading) / (0.7 * self._seconds - loading), 0.0), 1.0)
        step = int(STEPS * trained)
        stage = "Loading" if now - began < loading else "Training" if trained < 1.0 else "Evaluating"
        last = Checkpointed(step=step - step % 100, uri="s3://models/any/checkpoint", committed_at=_told(now))
        return Progress(
            run_id=RUN_ID,
            attempt=1,
            stage=stage,
            step=step,
            total_steps=STEPS,
            epoch=3.0 * trained,
            loss=2.0 / (1.0 + 5.0 * trained),
            learning_rate=2e-5,
            samples_per_second=212.0,
            estimated_completion_time=_told(began + self._seconds),
            checkpoint=last if last.step else None,
            started_at=_told(began),
            updated_at=_told(now),
        )


def _told(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def listen() -> socket.socket:
    """Every address of the loopback, and no other. Raises OSError when the port is in use."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
    listener.bind(("0.0.0.0", PROGRESS_PORT))
    return listener


async def serve(seconds: float) -> None:
    trainers, told = Trainers(seconds), 0
    application = web.Application()
    application.add_routes([web.get("/progress", trainers.answer)])
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.SockSite(runner, listen()).start()
    print(told, flush=True)
    while True:
        await asyncio.sleep(1)
        if trainers.answers != told:
            told = trainers.answers
            print(told, flush=True)


if __name__ == "__main__":
    asyncio.run(serve(float(sys.argv[1])))
