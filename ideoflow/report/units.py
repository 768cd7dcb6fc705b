"""Figures as people read them: GiB, seconds, milliseconds, three significant digits."""

from __future__ import annotations

import math
from pathlib import Path

_MINUS = "\N{MINUS SIGN}"
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")


def number(value: float) -> str:
    """Three significant digits; powers of ten for the very small and the very large: ``1.5e−4``."""
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}e{int(exponent)}".replace("-", _MINUS)
    text = f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"
    return text.replace("-", _MINUS)


def size(bytes_: float) -> str:
    """Bytes in the binary unit that keeps the figure between 1 and 1024."""
    power = 0
    while abs(bytes_) >= 1024 and power < len(_BINARY) - 1:
        bytes_ /= 1024
        power += 1
    digits = 0 if power == 0 or abs(bytes_) >= 100 else 1 if abs(bytes_) >= 10 else 2
    return f"{bytes_:.{digits}f} {_BINARY[power]}".replace("-", _MINUS)


def duration(seconds: float) -> str:
    """``850 µs``, ``12.5 ms``, ``3.40 s``, ``12 min 5 s``, ``3 h 7 min``."""
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f} µs" if seconds else "0 s"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def signed(text: str) -> str:
    """A difference with its sign."""
    return text if text.startswith(_MINUS) else f"+{text}"


def share(value: float) -> str:
    """A signed difference in per cent: ``+3.2 %``."""
    return signed(f"{number(round(value * 100, 1))} %")


def with_error(value: float, error: float) -> str:
    """``0.693 ± 0.062``: as many decimals as the error's second digit has."""
    digits = 1 - math.floor(math.log10(error)) if error > 0 else 3
    digits = min(max(digits, 0), 9)
    return f"{value:.{digits}f} ± {error:.{digits}f}".replace("-", _MINUS)


def plural(count: int, one: str, many: str | None = None) -> str:
    """``1 step``, ``1,200 steps``."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def without_home(path: str | Path) -> str:
    """A path with the user's home folder as ``~``: reports are shown to others."""
    text, home = str(path), str(Path.home())
    if len(home) > 1 and (text == home or text.startswith((home + "/", home + "\\"))):
        return "~" + text[len(home) :]
    return text
