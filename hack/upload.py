"""Puts base models and data sets into the S3 server of hack/cluster, where the examples expect them.

Models are MiniLM and the small ones of tests/assets; each directory of rows gets its own name.

python hack/upload.py DIRECTORY...   (of hack/dataset.py or hack/prose.py: train.jsonl, test.jsonl)
"""

import os
import sys
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from demo import base_model

ASSETS = Path(__file__).resolve().parent.parent / "tests/assets"
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
    models = {"minilm": base_model(), **{path.name: path for path in sorted(ASSETS.iterdir()) if path.is_dir()}}
    for name, directory in models.items():
        for path in sorted(directory.iterdir()):
            if path.suffix in (".json", ".safetensors", ".txt"):
                s3.upload_file(str(path), "models", f"{name}/{path.name}")
    rows = [Path(argument) for argument in sys.argv[1:]]
    for directory in rows:
        for name in ("train.jsonl", "test.jsonl"):
            s3.upload_file(str(directory / name), "data", f"{directory.name}/{name}")
    found = [*(f"s3://models/{name}" for name in models), *(f"s3://data/{directory.name}" for directory in rows)]
    print(f"uploaded: {', '.join(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
