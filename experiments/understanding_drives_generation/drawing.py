"""Line charts as SVG: panels side by side, a legend and a line of explanation below."""

from dataclasses import dataclass, field
from math import ceil, floor, log10

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, LINE = 340, 280, 62, 16, 34, 48, 18  # of a panel, in pixels


@dataclass(frozen=True)
class Style:
    """How a curve is called and drawn. The colours are Okabe and Ito's, which the colour-blind tell apart."""

    label: str
    colour: str
    marker: str
    dash: str = ""


@dataclass
class Curve:
    """A line of a panel. `dots`: (x, y) that it is the mean of; a curve without line has points alone."""

    style: Style
    points: list[tuple[float, float]]
    dots: list[tuple[float, float]] = field(default_factory=list)
    line: bool = True


@dataclass
class Panel:
    """One coordinate system. `baseline`: the height of a labelled horizontal line."""

    title: str
    x_label: str
    y_label: str
    curves: list[Curve]
    baseline: float | None = None
    logarithmic: bool = True


def ticks(low: float, high: float) -> list[float]:
    """Two to eight round numbers from `low` to `high`."""
    if low == high:
        return [low]
    unit = 10 ** floor(log10(high - low))
    step = next(unit * k for k in (0.2, 0.5, 1, 2) if (high - low) / (unit * k) <= 7)
    return [k * step for k in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def marker(style: Style, x: float, y: float, r: float = 5.0) -> str:
    shapes = {
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "diamond": [(0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)],
        "triangle": [(0, -1.3), (1.3, 1), (-1.3, 1)],
    }
    if style.marker == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" fill="{style.colour}"/>'
    corners = " ".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in shapes[style.marker])
    return f'<polygon points="{corners}" fill="{style.colour}"/>'


def stroke(style: Style) -> str:
    return f'stroke="{style.colour}" stroke-width="2" fill="none" stroke-dasharray="{style.dash or "none"}"'


def text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{words}</text>'


def draw(panel: Panel, left: float, top: float) -> list[str]:
    """A panel as SVG elements; `left`, `top`: of its corner."""
    every = [point for curve in panel.curves for point in curve.points + curve.dots]
    xs, heights = (
        sorted({x for x, _ in every}),
        [y for _, y in every] + [panel.baseline] * (panel.baseline is not None),
    )
    pad = 0.08 * (max(heights) - min(heights)) or 0.5
    low, high = min(heights) - pad, max(heights) + pad
    scale = log10 if panel.logarithmic else float
    margin = 0.1 * (scale(xs[-1]) - scale(xs[0])) or 0.5
    first, last = scale(xs[0]) - margin, scale(xs[-1]) + margin
    x0, x1, y0, y1 = left + LEFT, left + WIDTH - RIGHT, top + HEIGHT - BOTTOM, top + TOP

    def place(x: float, y: float) -> tuple[float, float]:
        return x0 + (x1 - x0) * (scale(x) - first) / (last - first), y0 + (y1 - y0) * (y - low) / (high - low)

    parts = [text((x0 + x1) / 2, top + 20, panel.title, more='font-weight="bold"')]
    parts += [text((x0 + x1) / 2, y0 + 38, panel.x_label)]
    turned = f'transform="rotate(-90 {left + 14} {(y0 + y1) / 2})"'
    parts += [text(left + 14, (y0 + y1) / 2, panel.y_label, more=turned)]
    for value in ticks(low, high):
        y = place(xs[0], value)[1]
        parts.append(f'<path d="M{x0} {y:.1f}H{x1}" stroke="#dddddd"/>' + text(x0 - 6, y + 4, f"{value:g}", "end"))
    for value in xs if panel.logarithmic else ticks(xs[0] - margin, xs[-1] + margin):
        x = place(value, low)[0]
        parts.append(f'<path d="M{x:.1f} {y0}v5" stroke="black"/>' + text(x, y0 + 19, f"{value:,g}"))
    parts.append(f'<path d="M{x0} {y1}V{y0}H{x1}" stroke="black" fill="none"/>')
    if panel.baseline is not None:
        y = place(xs[0], panel.baseline)[1]
        parts.append(f'<path d="M{x0} {y:.1f}H{x1}" stroke="black" stroke-dasharray="4 3"/>')
        parts.append(text(x1, y - 5, "real against real images", "end", 'font-size="11"'))
    for curve in panel.curves:
        spots = [place(*point) for point in curve.points]
        if curve.line and len(spots) > 1:
            parts.append(f'<path d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in spots)}" {stroke(curve.style)}/>')
        parts += [marker(curve.style, *spot) for spot in spots]
        for x, y in (place(*dot) for dot in curve.dots):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="white" stroke="{curve.style.colour}"/>')
    return parts


def figure(panels: list[Panel], columns: int, legend: list[Style], note: str) -> str:
    """Panels in rows as an SVG, with a legend and a line of explanation below."""
    parts, columns = [], min(columns, len(panels))
    for place, panel in enumerate(panels):
        parts += draw(panel, place % columns * WIDTH, place // columns * HEIGHT)
    y = ceil(len(panels) / columns) * HEIGHT + LINE
    for style in legend:
        parts.append(f'<path d="M{LEFT} {y}h44" {stroke(style)}/>' + marker(style, LEFT + 22, y))
        parts.append(text(LEFT + 54, y + 4, style.label, "start"))
        y += LINE
    parts.append(text(LEFT, y + 4, note, "start", 'font-size="11" fill="#444444"'))
    size = f'viewBox="0 0 {columns * WIDTH} {y + LINE}" width="{columns * WIDTH}" height="{y + LINE}"'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    return "\n".join([start, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"]) + "\n"
