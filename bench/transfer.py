"""Download and upload of one large object on a real S3 server, beside boto3 as it comes, each in its own process."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from hack.seaweed import S3Server, serve

SIZE = 512 << 20
ROUNDS = 3
BUCKET, KEY = "bench", "object"


def run(scratch: Path) -> str:
    """The section of the report."""
    (scratch / "server").mkdir(parents=True)
    source = scratch / "source"
    with open(source, "wb") as file:
        for _ in range(SIZE >> 20):
            file.write(os.urandom(1 << 20))
    results: dict[tuple[str, str], list[dict[str, float]]] = {}
    with serve(scratch / "server") as server:
        server.client().create_bucket(Bucket=BUCKET)
        for number in range(ROUNDS):
            for what in ("upload", "download"):
                for who in ("ours", "boto3"):
                    print(f"transfer: round {number + 1} of {ROUNDS}, {what}, {who}", file=sys.stderr, flush=True)
                    results.setdefault((what, who), []).append(_measure(server, who, what, source))
    source.unlink()
    return _table(results)


def _measure(server: S3Server, who: str, what: str, source: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.transfer", who, what, server.endpoint, str(server.admin), str(source)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def _table(results: dict[tuple[str, str], list[dict[str, float]]]) -> str:
    gib = SIZE / (1 << 30)
    lines = [
        f"## Transfer of one object of {SIZE >> 20} MiB, SeaweedFS on the loopback",
        "",
        f"Median of {ROUNDS}. Ours also computes and checks SHA-256, which boto3 does not.",
        "",
        "| | MiB/s | CPU seconds per GiB | peak memory, MiB |",
        "|-|-:|-:|-:|",
    ]
    for (what, who), runs in results.items():
        wall, cpu, peak = (statistics.median(run[name] for run in runs) for name in ("wall", "cpu", "peak"))
        lines.append(f"| {what}, {who} | {(SIZE >> 20) / wall:.0f} | {cpu / gib:.1f} | {peak:.0f} |")
    return "\n".join(lines)


def _one(who: str, what: str, endpoint: str, credentials: Path, source: Path) -> None:
    """In the child: one transfer, measured without imports and connection."""
    import resource

    from finetune_trainer.storage import StorageSettings, open_store

    target = source.with_suffix(".down")
    if who == "ours":
        store = open_store(f"s3://{BUCKET}", StorageSettings(endpoint, "us-east-1", credentials))
        store.head(KEY)
        work = {"upload": lambda: store.upload(source, KEY), "download": lambda: store.download(KEY, target)}[what]
    else:
        import boto3
        from boto3.s3.transfer import TransferConfig

        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id=(credentials / "AWS_ACCESS_KEY_ID").read_text(),
            aws_secret_access_key=(credentials / "AWS_SECRET_ACCESS_KEY").read_text(),
        )
        client.list_buckets()
        config = TransferConfig(preferred_transfer_client="classic")  # the other one ignores the endpoint
        work = {
            "upload": lambda: client.upload_file(str(source), BUCKET, KEY, Config=config),
            "download": lambda: client.download_file(BUCKET, KEY, str(target), Config=config),
        }[what]
    started, cpu = time.monotonic(), time.process_time()
    work()
    figures = {"wall": time.monotonic() - started, "cpu": time.process_time() - cpu}
    target.unlink(missing_ok=True)
    figures["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(figures))


if __name__ == "__main__":
    _one(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]), Path(sys.argv[5]))
