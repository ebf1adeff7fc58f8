"""Records what Kubernetes' own YAML libraries make of the cases below, into golden.json. Needs Go; the tests do not.

python tests/crd/goyaml/record.py
"""

import json
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent

SCALARS = """
2e-5 2E-5 2e5 1e3 1.5e3 -1e3 +1e3 1e-7 1e20 1e21 1e22 1e400 -1e400 1.e3 1. .5 -.5 +.5 .5e2 .5e-2 . .. .e5 ._5
.1_0 5_ 1_000 1__0 _1 1_000.5 0 -0 +0 -0.0 0.0 3.0 -3.0 3.10 00 007 0777 -0777 08 09.5 0o17 0O17 -0o17 0o18
017.0 0x1F 0X1f -0x1F 0xfg 0x 0b101 0B101 -0b11 0b102 +12 +0x10 0x_1f 12345678901234567890 9223372036854775807
9223372036854775808 -9223372036854775808 -9223372036854775809 18446744073709551615 18446744073709551616
+18446744073709551615 0xffffffffffffffff 0x1ffffffffffffffff 0.1 0.30000000000000004
123456789012345678901234567890 1234567890123456789012 y Y n N yes Yes YES yEs no No NO on On ON off Off OFF true
True TRUE tRue false False FALSE null Null NULL nUll ~ nil none None 1:30 190:20:30 12:30:45.5 2001-01-01
2001-1-1 2001-01-01T10:00:00Z 2001-13-45 20011 1-2-3 1.2.3 v1.2 1e 1e+ e5 0e0 0e 1e1e1 1,000 $5 50% 4Gi 10m
1h30m = << - -- --- --a ? ?a :a a:b a::b s3://bucket/key?x=1&y=2 a#b #a !x @a `a %a *a &a |x >x ! nan NaN inf
Infinity .nan .NaN .Nan .inf -.inf +.inf .INF "yes" 'yes' "2e-5" '1' "" '' "a\\tb" "\\u00e9" "\\x41"
"\\U0001F600" "\\ud83d\\ude00" "\\/" "\\e" "\\N" "\\q" 'it''s' é 日本語 😀 a\u00a0b \u00a0 \ufeffa !!str|1 !!str|yes
!!int|"3" !!int|0x10 !!int|abc !!int|3.0 !!int|"" !!float|3 !!float|1.5 !!float|x !!bool|yes !!bool|1 !!null|~
!!null|x !!binary|aGk= !!binary|@ !!timestamp|2001-01-01 !foo|1 !|yes !|"yes" !!str|~ !!str|"" !!binary|/w==
!!float|.5 !!float|0x10 !!float|1e400 !!map|x !!seq|1
"""

SHAPES = [
    "",
    "\n\n",
    "# only a comment\n",
    "---\n",
    "---\n---\n",
    "a: 1\n---\nb: 2\n",
    "a: 1\n--- # comment\nb: 2\n",
    "--- # comment\na: 1\n",
    "a: 1\n--- b\n",
    "--- {a: 1}\n",
    "a: 1\n---b\n",
    "---\na: 1\n---\n---\nb: 2\n---\n",
    "a: 1\n...\n",
    "%YAML 1.1\n---\na: 1\n",
    "a: |\n  one\n  ---\n  two\n",
    "a: |-\n  one\n\n  two\n\n",
    "a: >\n  one\n  two\n\n  three\n",
    "a: >+\n  one\n\n",
    "a: |2\n    x\n",
    'a: "one\n  two"\n',
    "a: one\n  two\n",
    "a: 1\na: 2\n",
    "a: {b: 1, b: 2}\n",
    "a:\n- b: 1\n  b: 2\n",
    '"a": 1\na: 2\n',
    "1: a\n",
    "1.5: a\n",
    "1e3: a\n",
    "1e7: a\n",
    "0.1: a\n",
    "0.00001: a\n",
    "3.14159265358979: a\n",
    "16777217.0: a\n",
    "0x10: a\n",
    "yes: a\n",
    "on: a\noff: b\n",
    "yes: a\ntrue: b\n",
    "~: a\n",
    "null: a\n",
    ": a\n",
    "? a\n: b\n",
    "? [a]\n: b\n",
    "? {a: 1}\n: b\n",
    "? a\n",
    "2001-01-01: a\n",
    "[a, b]: c\n",
    "a: &x {b: 1}\nc: *x\n",
    "a: &x 1\nb: *x\n",
    "a: *x\n",
    "a: &x [*x]\n",
    "a: &x 1\nb: &x 2\nc: *x\n",
    "a: &x {b: 1}\nc:\n  <<: *x\n  d: 2\n",
    "a: &x {b: 1}\nc:\n  d: 2\n  <<: *x\n",
    "a: &x {b: 1}\nc:\n  <<: *x\n  b: 2\n",
    "a: &x {b: 1}\nc:\n  b: 2\n  <<: *x\n",
    "a: &x {b: 1}\nd: &y {e: 2}\nc:\n  <<: [*x, *y]\n",
    "a: &x {b: 1}\nd: &y {b: 2}\nc:\n  <<: [*x, *y]\n",
    "c:\n  <<: {b: 1}\n",
    "c:\n  <<: 1\n",
    "c:\n  <<: [1]\n",
    'c:\n  "<<": 1\n',
    "c:\n  !!merge <<: {b: 1}\n",
    "a: &x {<<: {b: 1}, c: 2}\nd: {<<: *x, e: 3}\n",
    "*x : 1\n",
    "a: &k key\nb: {*k : 1}\n",
    "a:\tb\n",
    "a: b\t# comment\n",
    "a:\n\tb: 1\n",
    "a:\n  - b\n\t- c\n",
    "a: [\n\t1,\n\t2\n]\n",
    '{\n\t"a": 1,\n\t"b": [true, null, 1.0, 1e3]\n}\n',
    "a: {b:\t1}\n",
    "-\ta\n",
    "\ta: 1\n",
    "a: 1\n\t\nb: 2\n",
    "a: 1\n\t# comment\nb: 2\n",
    "\ufeffa: 1\n",
    "a: 1\n\ufeffb: 2\n",
    "a: \x00\n",
    "a: \x07\n",
    "a: \x7f\n",
    "a: \x85b\n",
    "a: b\u2028c\n",
    "a: \ufffe\n",
    "a: 1\r\nb: 2\r\n",
    "a: 1\r\n---\r\nb: 2\r\n",
    "a: 1\rb: 2\r",
    "a: [1, 2\n",
    "a: {b: 1\n",
    "a: b: c\n",
    "a:\n  b: 1\n c: 2\n",
    "a: 'x\n",
    "- a\n- b\n",
    "- a\nb: 1\n",
    "a:\n- 1\n- 2\n",
    "a:\n  - - 1\n    - 2\n",
    "a: [1, [2, {b: 3}]]\n",
    "a: [1, 2,]\n",
    "a: [1,, 2]\n",
    "a: {b, c}\n",
    "a: {b: , c: 1}\n",
    "a: {b:1}\n",
    "a: {b:c}\n",
    'a: {"b":1}\n',
    "a: [b:c]\n",
    "a: [b: c]\n",
    "a: {uri: s3://bucket/key}\n",
    "a: [s3://bucket/key, x]\n",
    "a: {uri: http://host:8333}\n",
    "a: [a?b, ?x]\n",
    "a: [x#y]\n",
    "a: {x: y#z}\n",
    "a:\n",
    "a: \nb: 1\n",
    "a: !!map {b: 1}\n",
    "a: !foo {b: 1}\n",
    "a: !!set {b, c}\n",
    "a: !!omap [b: 1]\n",
    "!!str a: 1\n",
    "a: !!str\n",
    "a: !!int 1\nb: !<tag:yaml.org,2002:str> 2\n",
    "a: !u!x 1\n",
    "x\n",
    "1\n",
    "null\n",
    "a: 'one'\nb: \"two\" # c\n",
    "a: 'one' two\n",
    "a: [1]: 2\n",
    "a: - b\n",
    "a:b\n",
    "a :b\n",
    "a : b\n",
    "a: b #c\n",
    "a: b#c\n",
    "a: @x\n",
    "a: `x`\n",
    "a: %x\n",
    "%x: 1\n",
    "a: " + "x" * 3000 + "\n",
    "x" * 1025 + ": 1\n",
    "x" * 1000 + ": 1\n",
    "a: " + "[" * 50 + "]" * 50 + "\n",
    "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdef", "bcdefg", strict=False)),
    "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdef", "bcdefg", strict=False)),
]


def cases() -> list[str]:
    """Every text that is tried: each scalar as a value, as an item and as a key, then the shapes."""
    words = [word.encode().decode("unicode_escape") if "\\u" in word and word[0] != '"' else word.replace("\\\\", "\\")
             for word in SCALARS.split(" ") for word in word.split("\n") if word]  # fmt: skip
    texts = []
    for word in words:
        value = word.replace("|", " ", 1) if word.startswith("!") else word
        texts += [f"a: {value}\n", f"- {value}\n", f"{{a: {value}}}\n"]
    return texts + SHAPES


def answers(texts: list[str]) -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["go", "build", "-o", f"{folder}/goyaml", "."], cwd=HERE, check=True)
        out = subprocess.run([f"{folder}/goyaml"], input=json.dumps(texts), capture_output=True, text=True, check=True)
    found: list[dict[str, object]] = json.loads(out.stdout)
    return found


if __name__ == "__main__":
    texts = cases()
    recorded = []
    for text, answer in zip(texts, answers(texts), strict=True):
        recorded.append({"text": text, **({"error": answer["error"]} if "error" in answer else answer)})
    lines = ",\n".join(json.dumps(entry, ensure_ascii=True) for entry in recorded)
    (HERE / "golden.json").write_text(f"[\n{lines}\n]\n")
    print(f"{len(recorded)} answers")
