"""Puts the base models and data sets into the S3 server of hack/cluster, where the examples expect them.

Models are MiniLM and the small ones of tests/assets; the files of a directory go to s3://data/<its name>/.

python hack/upload.py DIRECTORY...
"""

import os
import sys
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from example import bases

STATE = Path(os.environ.get("STATE", Path.home() / ".local/state/finetune-operator/cluster"))


def client() -> Any:
    """An S3 client for the cluster's server. Raises RuntimeError when there is none."""
    path = STATE / "s3.env"
    if not path.exists():
        raise RuntimeError("the S3 server is not up; run: make cluster-up")
    keys = dict(line.split("=", 1) for line in path.read_text(encoding="utf-8").splitlines() if "=" in line)
    return boto3.client(
        "s3",
        endpoint_url=keys["AWS_ENDPOINT_URL"],
        region_name=keys["AWS_REGION"],
        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        config=Config(s3={"addressing_style": "path"}),
    )


def main() -> int:
    s3 = client()
    existing = {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}
    for bucket in {"models", "data"} - existing:
        s3.create_bucket(Bucket=bucket)
    for name, base in bases().items():
        for path in sorted(base.iterdir()):
            if path.suffix in (".json", ".safetensors", ".txt"):
                s3.upload_file(str(path), "models", f"{name}/{path.name}")
    directories = [Path(argument).resolve() for argument in sys.argv[1:]]
    for directory in directories:
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            s3.upload_file(str(path), "data", f"{directory.name}/{path.relative_to(directory).as_posix()}")
    found = [*(f"s3://models/{name}" for name in bases()), *(f"s3://data/{place.name}" for place in directories)]
    print(f"uploaded: {', '.join(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
