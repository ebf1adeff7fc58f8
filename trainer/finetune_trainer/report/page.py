"""The page. Pure: everything that is shown is in `Report`. Whatever comes from data or documents is escaped."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from finetune_api.status import EvaluationStatus
from finetune_trainer.report.style import STYLE
from finetune_trainer.report.svg import bars, histogram, lines, short

Metrics = Mapping[str, float]
SIZE_LIMIT = 300_000
"""Bytes of a page. Where it would be more, the longest lists are shortened."""
_TEXT = 400


@dataclass(frozen=True)
class Mistake:
    """A row that is shown: a wrong answer, or a label that may be wrong."""

    where: str
    text: str
    truth: str
    answer: str
    score: float
    picture: bytes = b""
    """A small PNG, where the row is an image."""


@dataclass(frozen=True)
class Errors:
    """Where a model errs."""

    task: str = ""
    """Of several tasks the name of the one that this is about."""
    labels: Sequence[str] = ()
    confusion: Sequence[Sequence[int]] | None = None
    mistakes: Sequence[Mistake] = ()
    suspects: Sequence[Mistake] = ()

    def titled(self, title: str) -> str:
        return f"{title}: {self.task}" if self.task else title


@dataclass(frozen=True)
class Report:
    """Everything the page says."""

    title: str
    subtitle: str
    evaluation: EvaluationStatus
    primary: str
    rivals: Mapping[str, Metrics | None]
    """All metrics of the baselines, by name."""
    tuned: Metrics = field(default_factory=dict)
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    fit: Mapping[str, Any] = field(default_factory=dict)
    losses: Sequence[Sequence[float]] = ()
    evaluations: Sequence[Mapping[str, Any]] = ()
    errors: Sequence[Errors] = ()
    slices: Sequence[Mapping[str, Any]] = ()
    lengths: tuple[Sequence[int], Sequence[float]] = ((), ())
    """Counts, and edges between them."""
    warnings: Sequence[str] = ()
    configuration: str = ""
    load_hint: str = ""
    facts: Sequence[tuple[str, str]] = ()


def page(report: Report) -> str:
    """The whole file, of at most SIZE_LIMIT bytes."""
    html = _page(report, rows=sum(len(one.mistakes) + len(one.suspects) for one in report.errors))
    for rows in (20, 8, 0):
        if len(html.encode()) <= SIZE_LIMIT:
            break
        html = _page(report, rows=rows)
    return html


def _page(report: Report, *, rows: int) -> str:
    sections = [
        ("Warnings", _warnings(report)),
        ("Result", _result(report)),
        ("Gates", _gates(report)),
        ("What the model has kept", _retention(report)),
        ("Course of training", _course(report)),
        ("Training rows beside validation rows", _fit(report)),
        *((one.titled("Which labels are mixed up"), _confusion(one)) for one in report.errors),
        ("Slices", _slices(report)),
        *(
            (one.titled("Mistakes, the surest first"), _mistakes(one.mistakes[:rows], ("truth", "answer", "loss")))
            for one in report.errors
        ),
        *(
            (
                one.titled("Training rows that may be mislabelled"),
                _mistakes(one.suspects[:rows], ("label", "likelier", "score")),
            )
            for one in report.errors
        ),
        ("Lengths", histogram(*report.lengths, x="tokens") if report.lengths[0] else ""),
        ("How to load the model", f"<pre>{escape(report.load_hint)}</pre>" if report.load_hint else ""),
        ("Configuration", f"<pre>{escape(report.configuration)}</pre>" if report.configuration else ""),
    ]
    body = "".join(f"<section><h2>{escape(name)}</h2>{html}</section>" for name, html in sections if html)
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in report.facts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(report.title)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>{escape(report.title)}</h1><p>{escape(report.subtitle)}</p><dl>{facts}</dl></header>"
        f"{body}</main></body></html>\n"
    )


def _warnings(report: Report) -> str:
    return "".join(f'<p class="warning">{escape(said)}</p>' for said in report.warnings)


def _result(report: Report) -> str:
    rows = [
        (name, found[report.primary], None)
        for name, found in report.rivals.items()
        if found and report.primary in found
    ]
    chart = ""
    if report.primary in report.tuned:
        value = report.tuned[report.primary]
        ends = report.intervals.get(report.primary) or (value, value)
        chart = f"<p>{escape(report.primary)}, with its 95 % interval:</p>"
        chart += bars([*rows, ("tuned", value, (ends[0], ends[1]))])
    gain = report.evaluation.gain
    said = ""
    if gain is not None:
        span = (
            f" (95 % interval {gain.low:.3g} to {gain.high:.3g})"
            if gain.low is not None and gain.high is not None
            else ""
        )
        said = f"<p>Better than {escape(gain.over)} by <b>{gain.value:.3g}</b>{span}, on the same rows.</p>"
    return chart + said + _metrics(report)


def _metrics(report: Report) -> str:
    names = [name for name, found in report.rivals.items() if found]
    head = ["metric", *names, "tuned", "95 % interval"]
    rows = []
    for metric, value in report.tuned.items():
        others = [_number((report.rivals[name] or {}).get(metric)) for name in names]
        ends = report.intervals.get(metric)
        rows.append([metric, *others, _number(value), f"{ends[0]:.3g} to {ends[1]:.3g}" if ends else ""])
    return _table(head, rows)


def _gates(report: Report) -> str:
    rows = [
        [gate.metric, gate.wanted, _number(gate.value), "met" if gate.passed else "not met"]
        for gate in report.evaluation.gates or []
    ]
    return _table(["gate", "wanted", "measured", ""], rows) if rows else ""


def _retention(report: Report) -> str:
    found = report.evaluation.retention or []
    if not found:
        return ""
    verdicts = {True: "kept", False: "broken", None: ""}
    rows = [
        [
            one.name,
            one.metric,
            str(one.rows),
            _number(one.base),
            _number(one.tuned),
            _number(one.difference),
            f"{one.low:.3g} to {one.high:.3g}" if one.low is not None and one.high is not None else "",
            one.wanted or "",
            verdicts[one.passed],
        ]
        for one in found
    ]
    head = ["set", "metric", "rows", "base", "tuned", "difference", "95 % interval", "wanted", ""]
    said = "<p>Rows of what the base knew, measured on the untouched base and on the published weights.</p>"
    return said + _table(head, rows)


def _course(report: Report) -> str:
    losses = [(float(step), float(value)) for step, value in report.losses]
    held = [(float(e["step"]), e["metrics"]["loss"]) for e in report.evaluations if "loss" in e["metrics"]]
    html = lines([("loss of training", losses), ("loss on validation rows", held)], x="step")
    names = dict.fromkeys(name for e in report.evaluations for name in e["metrics"] if name != "loss")
    shown = [report.primary, *(name for name in names if name != report.primary)][:4]
    curves = [
        (name, [(float(e["step"]), e["metrics"][name]) for e in report.evaluations if name in e["metrics"]])
        for name in shown
    ]
    return html + lines(curves, x="step")


def _fit(report: Report) -> str:
    if not report.fit:
        return ""
    train, held, gap = report.fit["train"], report.fit["validation"], report.fit["gap"]
    rows = [[name, _number(train[name]), _number(held[name])] for name in train if name in held]
    said = ""
    if gap is not None:
        ends = f" (95 % interval {gap['interval'][0]:.3g} to {gap['interval'][1]:.3g})" if gap["interval"] else ""
        said = f"<p>{escape(gap['metric'])} is better by {gap['value']:.3g}{ends} on training rows; far better means "
        said += "overfitting.</p>"
    return said + _table(["metric", "training", "validation"], rows)


def _confusion(errors: Errors) -> str:
    if not errors.confusion:
        return ""
    head = "".join(f'<th class="up"><span>{escape(label[:24])}</span></th>' for label in errors.labels)
    body = []
    for label, counts in zip(errors.labels, errors.confusion, strict=True):
        total = max(1, sum(counts))
        cells = "".join(
            f'<td class="{"hit" if name == label else "miss"}" style="--share:{count / total:.2f}">{count or ""}</td>'
            for name, count in zip(errors.labels, counts, strict=True)
        )
        body.append(f"<tr><th>{escape(label[:24])}</th>{cells}</tr>")
    return (
        "<p>A row is the truth, a column the answer; the shade is the share of the row.</p>"
        f'<div class="wide"><table class="confusion"><tr><th></th>{head}</tr>{"".join(body)}</table></div>'
    )


def _slices(report: Report) -> str:
    html = ""
    for found in report.slices:
        metric, gap = found["metric"], found["gap"]
        html += f"<h3>{escape(found['column'])}</h3>"
        if gap:
            ends = f" (95 % interval {gap['interval'][0]:.3g} to {gap['interval'][1]:.3g})" if gap["interval"] else ""
            html += (
                f"<p>{escape(metric)} is better by <b>{gap['value']:.3g}</b>{ends} for {escape(gap['best'])} than for "
            )
            html += f"{escape(gap['worst'])}.</p>"
        if found["equalizedOdds"] is not None:
            html += f"<p>Equalised odds differ by {found['equalizedOdds']:.3g}.</p>"
        ranked = sorted(found["values"], key=lambda value: value["metrics"].get(metric, 0.0))
        rows = [[v["value"], str(v["rows"]), _number(v["metrics"].get(metric))] for v in ranked]
        html += _table(["value", "rows", metric], rows)
        if found["tooFew"] or found["unknown"]:
            html += f"<p>{found['tooFew']} rows have values with too few rows, {found['unknown']} none.</p>"
    return html


def _mistakes(rows: Sequence[Mistake], names: tuple[str, str, str]) -> str:
    shown = []
    for row in rows:
        text = row.text if len(row.text) <= _TEXT else row.text[: _TEXT - 1] + "…"
        shown.append(
            f"<article>{_picture(row.picture)}<p>{escape(text)}</p><small>"
            f"{escape(names[0])}: <b>{escape(row.truth)}</b> · {escape(names[1])}: <b>{escape(row.answer)}</b> · "
            f"{escape(names[2])} {short(row.score)} · {escape(row.where)}</small></article>"
        )
    return "".join(shown)


def _picture(png: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{b64encode(png).decode()}">' if png else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
