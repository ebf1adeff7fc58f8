"""Small charts as inline SVG. Colours come from the page's style sheet, so that they follow light and dark."""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 640, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 28
_TICKS = 4

Points = Sequence[tuple[float, float]]


def lines(series: Sequence[tuple[str, Points]], *, x: str) -> str:
    """One curve for each (name, points); `x` names the horizontal axis. Points that are no numbers are left out."""
    known = [(name, [p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]) for name, points in series]
    known = [(name, points) for name, points in known if points]
    if not known:
        return ""
    xs = [p[0] for _, points in known for p in points]
    ys = [p[1] for _, points in known for p in points]
    ticks = round_ticks(min(ys), max(ys))
    low, high = ticks[0], ticks[-1]
    left, right = (min(xs), max(xs)) if min(xs) < max(xs) else (min(xs) - 1, max(xs) + 1)

    def at(point: tuple[float, float]) -> tuple[float, float]:
        across = (point[0] - left) / (right - left)
        up = (point[1] - low) / (high - low)
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    parts = []
    for value in ticks:
        _, y = at((left, value))
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="end" x="{_LEFT - 6}" y="{y + 4:.1f}">{short(value)}</text>')
    for number, (_, points) in enumerate(known):
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in map(at, points))
        parts.append(f'<polyline class="c{number % 4}" points="{path}"/>')
        if len(points) < 30:
            parts += [f'<circle class="c{number % 4}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in map(at, points)]
    parts.append(f'<text x="{_LEFT}" y="{HEIGHT - 6}">{short(left)}</text>')
    parts.append(f'<text class="end" x="{WIDTH - _RIGHT}" y="{HEIGHT - 6}">{escape(x)} {short(right)}</text>')
    legend = "".join(f'<span class="key c{n % 4}">{escape(name)}</span>' for n, (name, _) in enumerate(known))
    names = ", ".join(name for name, _ in known)
    return f"<figure>{_svg(parts, f'{names} by {x}')}<figcaption>{legend}</figcaption></figure>"


def bars(rows: Sequence[tuple[str, float, tuple[float, float] | None]]) -> str:
    """One bar for each (name, value, interval)."""
    ends = [0.0, *(v for _, value, interval in rows for v in (value, *(interval or ())) if math.isfinite(v))]
    low, high = min(ends), max(ends)
    if not rows or low == high:
        return ""
    label, height = 150, 26

    def at(value: float) -> float:
        return float(label + (value - low) / (high - low) * (WIDTH - label - 70))

    parts = []
    for number, (name, value, interval) in enumerate(rows):
        if not math.isfinite(value):
            continue
        y = number * height + 6
        start, end = sorted((at(0.0), at(value)))
        last = interval is not None
        parts.append(f'<text class="end" x="{label - 8}" y="{y + 13}">{escape(name[:22])}</text>')
        kind = "tuned" if last else "rival"
        parts.append(f'<rect class="{kind}" x="{start:.1f}" y="{y}" width="{max(1.0, end - start):.1f}" height="16"/>')
        edge = end
        if interval is not None:
            a, b = at(interval[0]), at(interval[1])
            parts.append(f'<path class="whisker" d="M{a:.1f} {y + 8}H{b:.1f}M{a:.1f} {y + 3}v10M{b:.1f} {y + 3}v10"/>')
            edge = max(edge, b)
        parts.append(f'<text x="{edge + 6:.1f}" y="{y + 13}">{short(value)}</text>')
    return f"<figure>{_svg(parts, 'values side by side', height=len(rows) * height + 8)}</figure>"


def histogram(counts: Sequence[int], edges: Sequence[float], *, x: str) -> str:
    """Counts of values between edges."""
    if not counts or not max(counts):
        return ""
    step = (WIDTH - _LEFT - _RIGHT) / len(counts)
    room = HEIGHT - _TOP - _BOTTOM
    parts = []
    for number, count in enumerate(counts):
        tall = count / max(counts) * room
        parts.append(
            f'<rect class="tuned" x="{_LEFT + number * step + 1:.1f}" y="{HEIGHT - _BOTTOM - tall:.1f}" '
            f'width="{max(1.0, step - 2):.1f}" height="{tall:.1f}"/>'
        )
    parts.append(f'<text class="end" x="{_LEFT - 6}" y="{_TOP + 8}">{max(counts)}</text>')
    parts.append(f'<text x="{_LEFT}" y="{HEIGHT - 6}">{short(edges[0])}</text>')
    parts.append(f'<text class="end" x="{WIDTH - _RIGHT}" y="{HEIGHT - 6}">{escape(x)} {short(edges[-1])}</text>')
    return f"<figure>{_svg(parts, f'how many rows have how many {x}')}</figure>"


def short(value: float) -> str:
    """A number in a few signs."""
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def round_ticks(low: float, high: float) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, the first at most `low` and the last at least `high`."""
    if low == high:
        low, high = low - (abs(low) * 0.05 or 1.0), high + (abs(high) * 0.05 or 1.0)
    least = (high - low) / _TICKS
    ten = 10.0 ** math.floor(math.log10(least))
    step = next(factor * ten for factor in (1, 2, 5, 10) if factor * ten >= least * (1 - 1e-9))
    return [number * step for number in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _svg(parts: Sequence[str], title: str, *, height: int = HEIGHT) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
