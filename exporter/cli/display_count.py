"""Display counts of instructions, which are never to be taken for times."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape

from exporter.cli import display

#: The number of functions to list, and the characters of a name, which C++ makes long.
_TOP, _LONGEST = 15, 100


def print_count(counts: Mapping[str, Any], as_json: bool) -> int:
    """Print the functions of each figure that execute most instructions."""
    if as_json:
        return display.print_json(dict(counts))
    for count in counts["counts"]:
        for figure in count["prefill"]:
            what = f"prefill of {figure['to']} tokens less one of {figure['from']}"
            _print_figure(f"{count['cpu']}, {what}", figure)
        for figure in count["decode"]:
            _print_figure(f"{count['cpu']}, decode at depth {figure['depth']}", figure)
    display.out.print(
        f"Instructions per token, counted under emulation ({escape(counts['emulator'])}); not a "
        "time.\nnear: code that the library names no function for; the nearest name before it."
    )
    return 0


def _print_figure(what: str, figure: Mapping[str, Any]) -> None:
    total = figure["per_token"]
    table = display.table(
        "instructions per token", "share", "library", "function",
        title=f"{escape(what)}: {total:,.0f} instructions per token ({_classes(figure)})",
    )  # fmt: skip
    for column in table.columns[:2]:
        column.justify = "right"

    def row(number: float, library: str, function: str) -> None:
        table.add_row(f"{number:,.0f}", f"{number / total:.1%}", escape(library), escape(function))

    functions: Sequence[Mapping[str, Any]] = figure["functions"]
    for one in functions[:_TOP]:
        name = f"{'near ' if one['near'] else ''}{one['function']}"
        row(one["per_token"], one["library"], textwrap.shorten(name, _LONGEST, placeholder=" …"))
    if rest := functions[_TOP:]:
        row(sum(one["per_token"] for one in rest), "", f"{len(rest)} others")
    display.wide.print(table)
    display.out.print("")


def _classes(figure: Mapping[str, Any]) -> str:
    names = {"simd": "SIMD", "dot_product": "dot products", "i8mm": "int8 matrix products"}
    return ", ".join(
        f"{number / figure['per_token']:.0%} {names[name]}"
        for name, number in figure["classes"].items()
    )
