"""Plain-text tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

DIGITS = "-0123456789"
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_bytes(n_bytes: float) -> str:
    """`1536` as `1.5 KiB`; a unit is 1024 of the one before."""
    value, unit = float(n_bytes), 0
    while abs(value) >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} {UNITS[unit]}" if unit == 0 else f"{value:.1f} {UNITS[unit]}"


def format_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; columns of figures are aligned right, columns of words left."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    figures = [all(row[i][:1] in DIGITS for row in rows) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if is_figure else cell.ljust(width)
            for cell, width, is_figure in zip(cells, widths, figures, strict=True)
        ]
        return "  " + "  ".join(padded).rstrip()

    return "\n".join([title, line(header), line(["-" * width for width in widths]), *map(line, rows)])
