"""The operator's process: its arguments, what it answers to probes, and how it ends."""

import asyncio

import pytest
from aiohttp.test_utils import TestClient, TestServer

from finetune_operator.__main__ import _application, _candidate, _outcome, _parser
from finetune_operator.kube import Kube
from finetune_operator.leader import Alone, Elector, LeadershipLost

IMAGES = ["--trainer-image", "t", "--preflight-image", "p"]


def test_a_lease_is_a_namespace_and_a_name() -> None:
    assert _parser().parse_args([*IMAGES, "--lease", "system/operator"]).lease == ("system", "operator")


@pytest.mark.parametrize("text", ["operator", "/operator", "system/", "a/b/c"])
def test_anything_else_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args([*IMAGES, "--lease", text])
    assert f"{text} is not NAMESPACE/NAME" in capsys.readouterr().err


def test_without_a_lease_there_is_no_election_and_with_one_each_process_has_another_name() -> None:
    kube = Kube(None, outside=True)
    assert isinstance(_candidate(kube, None), Alone)
    one, two = (_candidate(kube, ("system", "operator")) for _ in range(2))
    assert isinstance(one, Elector)
    assert isinstance(two, Elector)
    assert one._identity != two._identity


async def test_it_is_alive_at_once_and_ready_when_it_knows_the_cluster() -> None:
    full = asyncio.Event()
    async with TestClient(TestServer(_application(ready=full.is_set))) as client:
        assert (await client.get("/healthz")).status == 200
        assert (await client.get("/readyz")).status == 503
        full.set()
        assert (await client.get("/readyz")).status == 200
        assert "finetune_operator_leader" in await (await client.get("/metrics")).text()


async def test_a_lost_lead_is_told_and_ends_the_process_with_an_error(caplog: pytest.LogCaptureFixture) -> None:
    async def lose() -> None:
        raise LeadershipLost("the Lease system/operator is held by two, no longer by this process")

    task = asyncio.create_task(lose(), name="leadership")
    await asyncio.wait([task])
    assert _outcome([task]) == 1
    assert "leadership ended: LeadershipLost: the Lease system/operator is held by two" in caplog.text


async def test_an_orderly_end_is_no_error() -> None:
    task = asyncio.create_task(asyncio.sleep(0), name="stop")
    await asyncio.wait([task])
    assert _outcome([task]) == 0
