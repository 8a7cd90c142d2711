"""The colours of reports, light and dark, and the style rules that choose between them.

Pictures are drawn with stand-ins and get `var(--name)` in their place, so that one picture is right in both.
"""

from __future__ import annotations

import re
from functools import cache

LEVELS = 24
"""Colours of a ramp."""
FONT = "system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif"
_STAND_IN = re.compile("#fe([0-9a-f]{4})")

Colours = dict[str, str]

_PLAIN: dict[str, tuple[str, str]] = {
    # name: light, dark
    "page": ("#ffffff", "#0d1219"),
    "card": ("#f6f8fa", "#151c25"),
    "ink": ("#1b2430", "#e6edf3"),
    "muted": ("#57606a", "#9eabb8"),
    "line": ("#d5dbe2", "#2d3743"),
    "accent": ("#0a5ca8", "#6cb6ff"),
    "warn": ("#7a4b00", "#f2c069"),
    "none": ("#eef0f2", "#1c242e"),  # a place of a grid without a number
    "s0": ("#0a5ca8", "#6cb6ff"),
    "s1": ("#b85c00", "#f0a05a"),
    "s2": ("#1a7f4b", "#5fd39a"),
    "s3": ("#8250df", "#c4a1ff"),
    "s4": ("#c2334d", "#ff8a9b"),
    "s5": ("#57606a", "#9eabb8"),
}
SERIES = 6
"""Colours of lines: `s0` to `s5`."""
# Both ramps begin near the page and go away from it.
_SEQUENTIAL = (
    ("#edf6ea", "#b4dfc4", "#62b6c6", "#2b7fb3", "#123f7a"),
    ("#1b2733", "#17496a", "#1f7f96", "#63bfa0", "#e3f6b9"),
)
_DIVERGING = (
    ("#a23c05", "#e59a5f", "#f4f2ee", "#7db4dd", "#0b4f8f"),
    ("#ffb27a", "#a25a24", "#1f262f", "#2d6ba3", "#8fcaff"),
)


def ramp(anchors: tuple[str, ...], steps: int = LEVELS) -> list[str]:
    """Return so many colours as `#rrggbb`, evenly spaced from the first anchor to the last."""
    found = []
    for step in range(steps):
        place = step / (steps - 1) * (len(anchors) - 1)
        low = min(int(place), len(anchors) - 2)
        pair = zip(_rgb(anchors[low]), _rgb(anchors[low + 1]), strict=True)
        found.append("#" + "".join(f"{round(a + (place - low) * (b - a)):02x}" for a, b in pair))
    return found


def colours(dark: bool) -> Colours:
    """Return every colour of a theme by its name; `h3t` is what is written on `h3`."""
    found = {name: pair[dark] for name, pair in _PLAIN.items()}
    for letter, anchors in (("h", _SEQUENTIAL[dark]), ("d", _DIVERGING[dark])):
        for level, colour in enumerate(ramp(anchors)):
            found[f"{letter}{level}"] = colour
            found[f"{letter}{level}t"] = max(("#000000", "#ffffff"), key=lambda ink: contrast(ink, colour))
    return found


def style() -> str:
    """Return the CSS that defines the colours: light, dark where the reader's system is, light on paper."""
    light, dark = ("".join(f"--{name}:{colour};" for name, colour in colours(theme).items()) for theme in (False, True))
    return f":root{{color-scheme:light dark;{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"


@cache
def _names() -> list[str]:
    return list(colours(False))


def stand_in(name: str) -> str:
    """Return the colour to draw with where `var(--name)` is meant."""
    return f"#fe{_names().index(name):04x}"


def with_variables(picture: str) -> str:
    """Return a picture with CSS variables in place of the stand-ins that it was drawn with."""
    return _STAND_IN.sub(lambda match: f"var(--{_names()[int(match[1], 16)]})", picture)


def contrast(a: str, b: str) -> float:
    """Return the contrast ratio of two colours by WCAG 2.2: 1 to 21."""
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    shares = [part / 255 for part in _rgb(colour)]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
