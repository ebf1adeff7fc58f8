"""Download and upload of one large object on a real S3 server, beside what else does that, each in its own process."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hack.seaweed import S3Server, serve

from bench.operator.usage import Meter

SIZE = 512 << 20
ROUNDS = 4
KEY, REGION = "object", "us-east-1"
CONTESTANTS = ("ours", "boto3", "aws-crt", "s5cmd")
S5CMD = Path(__file__).resolve().parents[1] / "hack/s5cmd"


def run(scratch: Path) -> str:
    """The section of the report."""
    (scratch / "server").mkdir(parents=True)
    source = scratch / "source"
    with open(source, "wb") as file:
        for _ in range(SIZE >> 20):
            file.write(os.urandom(1 << 20))
    results: dict[tuple[str, str], list[dict[str, float]]] = {}
    load = os.getloadavg()[0]
    with serve(scratch / "server") as server:
        client = server.client()
        for number in range(ROUNDS):
            bucket = f"bench-{number}"
            client.create_bucket(Bucket=bucket)
            for what in ("upload", "download"):
                for who in CONTESTANTS[number % 4 :] + CONTESTANTS[: number % 4]:  # nobody is always last
                    print(f"transfer: round {number + 1} of {ROUNDS}, {what}, {who}", file=sys.stderr, flush=True)
                    results.setdefault((what, who), []).append(_measure(server, bucket, who, what, source))
            client.delete_object(Bucket=bucket, Key=KEY)
            client.delete_bucket(Bucket=bucket)  # with all that was overwritten
    source.unlink()
    return _table(results, load)


def _measure(server: S3Server, bucket: str, who: str, what: str, source: Path) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "bench.transfer",
        bucket,
        who,
        what,
        server.endpoint,
        str(server.admin),
        str(source),
    ]
    meter = Meter({"server": server.pid}, now=time.monotonic())
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    used = meter.stop(now=time.monotonic())
    if done.returncode != 0:
        raise RuntimeError(f"{what} by {who} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return {**json.loads(done.stdout), "server": used.cpu["server"], "others": used.others / used.seconds}


def _table(results: dict[tuple[str, str], list[dict[str, float]]], load: float) -> str:
    gib = SIZE / (1 << 30)
    others = statistics.median(run["others"] for runs in results.values() for run in runs)
    lines = [
        f"## Transfer of one object of {SIZE >> 20} MiB, SeaweedFS on the loopback",
        "",
        f"{datetime.now(UTC).date()}, median of {ROUNDS} and the best in brackets. Ours also computes and checks",
        "BLAKE3 of every byte and waits until a download is on the disk, which the others do not. s5cmd is timed with",
        "its start, the others without imports. The processors are shared: with the server, whose seconds are in the",
        f"table, and with other processes: {others:.1f} cores in the median, and a load of {load:.1f} before.",
        "",
        "| | MiB/s | CPU seconds per GiB | the server's | peak memory, MiB |",
        "|-|-:|-:|-:|-:|",
    ]
    for what in ("upload", "download"):
        for who in CONTESTANTS:
            runs = {name: [run[name] for run in results[what, who]] for name in ("wall", "cpu", "server", "peak")}
            wall, cpu, of_server, peak = (statistics.median(values) for values in runs.values())
            speed = f"{(SIZE >> 20) / wall:.0f} ({(SIZE >> 20) / min(runs['wall']):.0f})"
            spent = f"{cpu / gib:.1f} ({min(runs['cpu']) / gib:.1f})"
            lines.append(f"| {what}, {who} | {speed} | {spent} | {of_server / gib:.1f} | {peak:.0f} |")
    return "\n".join(lines)


# --- in the child: one transfer ---


def _one(bucket: str, who: str, what: str, endpoint: str, credentials: Path, source: Path) -> None:
    import resource

    keys = [(credentials / name).read_text() for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    target = source.with_suffix(".down")
    begin: dict[str, Callable[[], Callable[[], Any]]] = {
        "ours": lambda: _ours(what, bucket, endpoint, credentials, source, target),
        "boto3": lambda: _boto3(what, bucket, endpoint, keys, source, target),
        "aws-crt": lambda: _crt(what, bucket, endpoint, keys, source, target),
        "s5cmd": lambda: _s5cmd(what, bucket, endpoint, keys, source, target),
    }
    work = begin[who]()
    of = resource.RUSAGE_CHILDREN if who == "s5cmd" else resource.RUSAGE_SELF
    before, started = resource.getrusage(of), time.monotonic()
    work()
    wall, after = time.monotonic() - started, resource.getrusage(of)
    if what == "download" and target.stat().st_size != SIZE:
        raise RuntimeError(f"{who} downloaded {target.stat().st_size} bytes instead of {SIZE}")
    target.unlink(missing_ok=True)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"wall": wall, "cpu": cpu, "peak": after.ru_maxrss / 1024}))


def _ours(what: str, bucket: str, endpoint: str, credentials: Path, source: Path, target: Path) -> Callable[[], Any]:
    from finetune_trainer.storage import StorageSettings, open_store

    store = open_store(f"s3://{bucket}", StorageSettings(endpoint, REGION, credentials))
    store.head(KEY)
    store.head(KEY)  # with the client that is made anew after the first answer
    return lambda: store.upload(source, KEY) if what == "upload" else store.download(KEY, target)


def _boto3(what: str, bucket: str, endpoint: str, keys: list[str], source: Path, target: Path) -> Callable[[], Any]:
    import boto3
    from boto3.s3.transfer import TransferConfig

    client = boto3.client(
        "s3", endpoint_url=endpoint, region_name=REGION, aws_access_key_id=keys[0], aws_secret_access_key=keys[1]
    )
    client.list_buckets()
    config = TransferConfig(preferred_transfer_client="classic")
    if what == "upload":
        return lambda: client.upload_file(str(source), bucket, KEY, Config=config)
    return lambda: client.download_file(bucket, KEY, str(target), Config=config)


def _crt(what: str, bucket: str, endpoint: str, keys: list[str], source: Path, target: Path) -> Callable[[], Any]:
    """boto3's other transfer client, put together by hand, since boto3 gives it no endpoint without TLS."""
    import awscrt.auth
    import botocore.session
    from s3transfer.crt import BotocoreCRTRequestSerializer, CRTTransferManager, create_s3_crt_client

    session = botocore.session.get_session()
    session.set_credentials(*keys)
    provider = awscrt.auth.AwsCredentialsProvider.new_static(*keys)
    client = create_s3_crt_client(REGION, provider, use_ssl=False)
    serializer = BotocoreCRTRequestSerializer(session, {"endpoint_url": endpoint, "region_name": REGION})
    manager = CRTTransferManager(client, serializer)

    def work() -> None:
        with manager:  # its end waits for the file to get its name, which result() alone does not
            if what == "upload":
                manager.upload(str(source), bucket, KEY).result()
            else:
                manager.download(bucket, KEY, str(target)).result()

    return work


def _s5cmd(what: str, bucket: str, endpoint: str, keys: list[str], source: Path, target: Path) -> Callable[[], Any]:
    program = subprocess.run([S5CMD], check=True, capture_output=True, text=True).stdout.strip()
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": keys[0], "AWS_SECRET_ACCESS_KEY": keys[1], "AWS_REGION": REGION}
    there = f"s3://{bucket}/{KEY}"
    places = [str(source), there] if what == "upload" else [there, str(target)]
    command = [program, "--endpoint-url", endpoint, "--log", "error", "cp", *places]
    return lambda: subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    _one(*sys.argv[1:5], Path(sys.argv[5]), Path(sys.argv[6]))
