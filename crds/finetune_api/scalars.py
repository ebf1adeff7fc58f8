"""What a single value of a document may be."""

import re
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

Uri = Annotated[str, StringConstraints(pattern=r"^(s3|file)://[^ \t\r\n]+$", max_length=1024)]
SourceUri = Annotated[str, StringConstraints(pattern=r"^(s3|file|hf)://[^ \t\r\n]+$", max_length=1024)]
S3OrFile = "an s3:// or file:// address (file:// only outside a cluster)"
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
QueueName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=63)]
"""Of an object that Kueue finds by a label's value."""
Column = Annotated[str, StringConstraints(min_length=1, max_length=256)]
NamePattern = Annotated[str, StringConstraints(pattern=r"^[-a-z0-9.*]+$", max_length=253)]
License = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.+-]*$", max_length=64)]
Label = Annotated[str, StringConstraints(min_length=1, max_length=256)]
PartName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=40)]
MetricName = Annotated[
    str, StringConstraints(pattern=r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?\.)?[a-z0-9][-a-z0-9]*$", max_length=64)
]
Language = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][-A-Za-z0-9_]*$", max_length=32)]
Template = Annotated[str, StringConstraints(min_length=1, max_length=65536)]
Prefix = Annotated[str, StringConstraints(max_length=256)]
Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$", max_length=32)]
PositiveQuantity = Annotated[
    str,
    StringConstraints(
        pattern=r"^(0*[1-9][0-9]*(\.[0-9]+)?|[0-9]+\.0*[1-9][0-9]*)(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$", max_length=32
    ),
]
"""What is 0 as a limit means none to Kubernetes."""
Duration = Annotated[str, StringConstraints(pattern=r"^([0-9]+h)?([0-9]+m)?([0-9]+s)?$", min_length=2, max_length=32)]
LabelValue = Annotated[str, StringConstraints(pattern=r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$", max_length=63)]
RunId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$", max_length=63)]
"""What pods say becomes a label's value."""
Key = Annotated[str, StringConstraints(max_length=317)]
TopologyKey = Annotated[
    str,
    StringConstraints(
        pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$", max_length=317
    ),
]
Text = Annotated[str, StringConstraints(max_length=1024)]

Overlong = Literal["Truncate", "Split", "Drop", "Fail"]
Strategy = Literal["greedy", "beam"]
Leakage = Literal["Drop", "Fail"]
AuditMode = Literal["Sample", "Full"]
OptimizerType = Literal["adamw", "adafactor", "sgd", "adamw-8bit"]
ScheduleType = Literal["linear", "cosine", "constant", "polynomial", "inverse-sqrt", "one-cycle"]
LossType = Literal["cross-entropy", "focal"]
Share = Annotated[float, Field(ge=0, lt=1)]


_UNITS = {
    "": Decimal(1),
    "m": Decimal("0.001"),
    "k": Decimal(10**3),
    "M": Decimal(10**6),
    "G": Decimal(10**9),
    "T": Decimal(10**12),
    "P": Decimal(10**15),
    "Ki": Decimal(2**10),
    "Mi": Decimal(2**20),
    "Gi": Decimal(2**30),
    "Ti": Decimal(2**40),
    "Pi": Decimal(2**50),
}


def amount(quantity: str) -> Decimal:
    """A Kubernetes quantity such as 500m or 1.5Gi as a number. Raises ValueError for what is none."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([mkMGTP]|[KMGTP]i)?", quantity)
    if match is None:
        raise ValueError(f"{quantity!r} is no quantity like 500m or 1.5Gi")
    return Decimal(match[1]) * _UNITS[match[2] or ""]


def seconds(duration: str) -> float:
    """A Kubernetes-style duration such as 1h30m in seconds. Raises ValueError for what is none."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", duration)
    if match is None:
        raise ValueError(f"{duration!r} is no duration like 1h30m")
    hours, minutes, secs = (int(part or 0) for part in match.groups())
    return float(hours * 3600 + minutes * 60 + secs)
