"""Drawing for the report: panels with axes as inline SVG, coloured by the page's style sheet so that they follow light and dark.

A panel has its own coordinates in pixels; nothing is scaled down on a small screen, panels wrap instead. Marks carry classes
(`mark` for one that stands for a number), colours are the classes c0 to c6 (plots.COLOURS) and the opacity of a shot's shade.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from data_pipelines.html_text import safe

CHARACTER = 6.1
"""Pixels of an average character at the panels' 11 pixel type."""
COLOUR_COUNT = 7
WIDEST_LABEL = 170
SMALL = 220
"""Pixels up to which two panels stand side by side on a narrow screen."""
FITS = 460
"""Pixels up to which a panel is scaled to a narrower screen; wider ones scroll."""

Held = dict[str, float | str]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [low, high], at most about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * s for s in (1, 2, 2.5, 5, 10) if power * s >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within [low, high]; powers alone over more than two decades."""
    signs = (1,) if high / low > 200 else (1, 2, 5)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [s * 10.0**p for p in powers for s in signs if low * 0.999 <= s * 10.0**p <= high * 1.001]
    return found or [low, high]


def brief(value: float) -> str:
    """A tick's label: 0.0004 -> '4e-4', 12.50 -> '12.5', 3200000 -> '3.2M'."""
    if value and not 0.01 <= abs(value) < 1e12:
        mantissa, _, power = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(power)}"
    for limit, sign in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if sign == 'k' else limit):.3g}{sign}"
    return f"{value:.4g}"


def linear(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def logarithmic(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    inner = linear(math.log(low), math.log(high), start, end)
    return lambda value: inner(math.log(value))


def padded(values: Iterable[float], share: float = 0.06) -> tuple[float, float]:
    """The range of the finite values and a little beyond on both sides; (0, 1) where there are none."""
    held = [v for v in values if math.isfinite(v)]
    if not held:
        return 0.0, 1.0
    low, high = min(held), max(held)
    margin = share * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def padded_log(values: Iterable[float], share: float = 0.08) -> tuple[float, float]:
    held = [math.log(v) for v in values if v > 0 and math.isfinite(v)]
    low, high = padded(held, share)
    if held and max(held) - min(held) < 0.05:
        low, high = min(held) - 0.1, max(held) + 0.1
    return math.exp(low), math.exp(high)


@dataclass
class Panel:
    """One picture. `left`, `top`, `right`, `bottom`: margins in pixels around the plot's area."""

    title: str
    width: int = 360
    height: int = 240
    left: int = 40
    top: int = 26
    right: int = 10
    bottom: int = 30
    note: str = ""
    parts: list[str] = field(default_factory=list)

    @property
    def x0(self) -> float:
        return self.left

    @property
    def x1(self) -> float:
        return self.width - self.right

    @property
    def y0(self) -> float:
        """The bottom of the area."""
        return self.height - self.bottom

    @property
    def y1(self) -> float:
        return self.top

    def line(self, xa: float, ya: float, xb: float, yb: float, classes: str, title: str = "") -> None:
        self.parts.append(_element("line", {"x1": xa, "y1": ya, "x2": xb, "y2": yb}, classes, title))

    def path(self, points: Sequence[tuple[float, float]], classes: str, title: str = "") -> None:
        if points:
            d = "M" + "L".join(f"{_number(x)} {_number(y)}" for x, y in points)
            self.parts.append(_element("path", {"d": d}, classes, title))

    def rect(self, x: float, y: float, width: float, height: float, classes: str, title: str = "", shade: float = 1.0) -> None:
        box: Held = {"x": x, "y": y, "width": max(0.0, width), "height": max(0.0, height)}
        self.parts.append(_element("rect", box | _shade(shade), classes, title))

    def circle(self, x: float, y: float, radius: float, classes: str, title: str = "", shade: float = 1.0) -> None:
        round_: Held = {"cx": x, "cy": y, "r": radius}
        self.parts.append(_element("circle", round_ | _shade(shade), classes, title))

    def text(self, x: float, y: float, text: str, classes: str = "", anchor: str = "middle", turn: float = 0) -> None:
        where: Held = {"x": x, "y": y} | ({} if anchor == "start" else {"text-anchor": anchor})
        if turn:
            where["transform"] = f"rotate({turn} {_number(x)} {_number(y)})"
        self.parts.append(f"<text{_attributes(where)}{_class(classes)}>{safe(text)}</text>")

    def y_axis(self, values: Sequence[float], place: Callable[[float], float]) -> None:
        for value in values:
            self.line(self.x0, place(value), self.x1, place(value), "grid")
            self.text(self.x0 - 6, place(value) + 4, brief(value), anchor="end")

    def x_axis(self, values: Sequence[float], place: Callable[[float], float], label: str = "") -> None:
        for value in values:
            self.line(place(value), self.y0, place(value), self.y1, "grid")
            self.text(place(value), self.y0 + 15, brief(value))
        if label:
            self.text((self.x0 + self.x1) / 2, self.y0 + 31, label, "axis")

    def slots(self, names: Sequence[Sequence[str]], place: Callable[[float], float], width: float) -> None:
        """Names under the slots 0, 1, ..., of one or more lines each; turned where they are wider than a slot."""
        longest = max((len(part) for name in names for part in name), default=0) * CHARACTER
        for i, name in enumerate(names):
            if longest > width - 4:
                self.text(place(i) + 4, self.y0 + 14, ".".join(name), anchor="end", turn=-38)
                continue
            for number, part in enumerate(name):
                self.text(place(i), self.y0 + 15 + 13 * number, part)

    def svg(self) -> str:
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        note = f'<text x="{self.x1:.0f}" y="14" text-anchor="end">{safe(self.note)}</text>' if self.note else ""
        title = f'<text x="2" y="14" class="title">{safe(self.title)}</text>' if self.title else ""
        fits = " fits" if self.width <= FITS else ""
        return (
            f'<svg class="plot{fits}" {size} role="img" aria-label="{safe(self.title)}">{title}{note}{"".join(self.parts)}</svg>'
        )


def slot_margin(names: Sequence[Sequence[str]], width: float) -> int:
    """The bottom margin that `Panel.slots` needs for these names."""
    longest = max((len(part) for name in names for part in name), default=0) * CHARACTER
    if longest > width - 4:
        return min(130, 16 + round(0.62 * CHARACTER * max(len(".".join(name)) for name in names)))
    return 12 + 13 * max((len(name) for name in names), default=1)


def label_margin(labels: Sequence[str]) -> int:
    return round(min(WIDEST_LABEL, max(map(len, labels), default=0) * CHARACTER) + 12)


def shortened(label: str) -> str:
    most = int(WIDEST_LABEL / CHARACTER)
    return label if len(label) <= most else label[: most - 1] + "…"


def colour(number: int) -> str:
    return f"c{number % COLOUR_COUNT}"


def shade(number: int, count: int) -> float:
    """Opacity of the shade of the number-th of `count` ordered things, the last one full."""
    return 1.0 if count < 2 else 0.34 + 0.66 * number / (count - 1)


def figure(
    caption: str, panels: Sequence[Panel], legend: Sequence[tuple[str, str, float]] = (), *, closed: str = "", kind: str = ""
) -> str:
    """Panels that wrap, a legend of (text, colour class, opacity), and what they show. `closed`: under this summary, opened by
    the reader; `kind`: the figure's class."""
    keys = "".join(
        f'<span class="key"><svg width="12" height="12" aria-hidden="true"><rect width="12" height="12" rx="2" '
        f'class="fill {classes}"{_attributes(_shade(opacity))}/></svg>{safe(text)}</span>'
        for text, classes, opacity in legend
    )
    drawn = f'<div class="panels">{"".join(_boxed(panel) for panel in panels)}</div>'
    if closed:
        drawn = f"<details><summary>{safe(closed)}</summary>{drawn}</details>"
    keys = f'<div class="legend">{keys}</div>' if keys else ""
    return f"<figure{_class(kind)}>{keys}{drawn}<figcaption>{caption}</figcaption></figure>"


def _boxed(panel: Panel) -> str:
    return f"<div{' class=small' if panel.width <= SMALL else ''}>{panel.svg()}</div>"


def label_html(label: str) -> str:
    """Escaped, with places to break it: after full stops."""
    return safe(label).replace(".", ".<wbr>")


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")


def _shade(opacity: float) -> Held:
    return {} if opacity >= 1 else {"opacity": f"{opacity:.2f}"}


def _attributes(held: Held) -> str:
    return "".join(f' {name}="{_number(value)}"' for name, value in held.items())


def _class(classes: str) -> str:
    return f' class="{classes}"' if classes else ""


def _element(tag: str, held: Held, classes: str, title: str) -> str:
    start = f"<{tag}{_attributes(held)}{_class(classes)}"
    return f"{start}><title>{safe(title)}</title></{tag}>" if title else f"{start}/>"
