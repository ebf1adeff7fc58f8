"""The YAML reader agrees with Kubernetes' own libraries, whose answers are recorded in goyaml/golden.json."""

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.document import Position, find, plain, read

GOYAML = Path(__file__).parent / "goyaml"
GOLDEN = json.loads((GOYAML / "golden.json").read_text())

def ours(text: str) -> Any:
    documents = read(text)
    faults = [fault for document in documents for fault in document.faults]
    if faults:
        return {"error": faults[0].message}
    return {"documents": [plain(document.root) for document in documents if document.root is not None]}

def kubernetes_own(entry: dict[str, Any]) -> Any:
    return entry.get("documents")

bad = 0
for e in GOLDEN:
    mine = ours(e["text"])
    if "error" in e:
        if "error" not in mine:
            print("GO ERR", repr(e["text"])[:100], e["error"][:120], mine); bad += 1
    else:
        d=[x for x in e["documents"] if x is not None]
        m=mine.get("documents")
        m = None if m is None else [x for x in m if x is not None]
        if json.dumps(d, sort_keys=True) != json.dumps(m, sort_keys=True):
            print("DIFF", repr(e["text"])[:100], json.dumps(d)[:120], str(mine)[:200]); bad += 1
print(bad, len(GOLDEN))
