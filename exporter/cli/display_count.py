"""Display counts of instructions, which are never to be taken for times."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape

from exporter.cli import display

#: The number of functions to list, and the characters of a name, which C++ makes long.
_TOP, _LONGEST = 15, 100


def print_counts(counts: Mapping[str, Any]) -> None:
    """Print the functions of each figure of one artifact that execute most instructions."""
    for count in counts["counts"]:
        where = f"{counts['target']}, {count['cpu']}"
        for figure in count["prefill"]:
            what = f"prefill of {figure['to']} tokens less one of {figure['from']}"
            _print_figure(f"{where}, {what}", figure)
        for figure in count["decode"]:
            _print_figure(f"{where}, decode at depth {figure['depth']}", figure)
    for what, why in counts.get("not_counted", {}).items():
        display.out.print(f"not counted: {escape(what)}: {escape(why)}")
    display.out.print(
        "Instructions and bytes per token, counted under emulation "
        f"({escape(counts['emulator'])}); not a time.\n"
        "near: code that the library names no function for; the nearest name before it.\n"
    )


def _print_figure(what: str, figure: Mapping[str, Any]) -> None:
    total = figure["per_token"]
    ways = figure["bytes"]
    least = "at least " if ways["unsized"] else ""

    def size(of: float) -> str:
        return display.megabytes(round(of))

    table = display.table(
        "instructions per token", "share", "loaded", "stored", "library", "function",
        title=f"{escape(what)}: {total:,.0f} instructions per token ({_classes(figure)}); "
        f"{least}{size(ways['loaded'])} loaded, {least}{size(ways['stored'])} stored",
    )  # fmt: skip
    for column in table.columns[:4]:
        column.justify = "right"

    def row(of: Mapping[str, float], library: str, function: str) -> None:
        number = of["per_token"]
        table.add_row(
            f"{number:,.0f}", f"{number / total:.1%}", size(of["loaded"]), size(of["stored"]),
            escape(library), escape(function),
        )  # fmt: skip

    functions: Sequence[Mapping[str, Any]] = figure["functions"]
    for one in functions[:_TOP]:
        name = f"{'near ' if one['near'] else ''}{one['function']}"
        row(one, one["library"], textwrap.shorten(name, _LONGEST, placeholder=" …"))
    if rest := functions[_TOP:]:
        keys = ("per_token", "loaded", "stored")
        row({key: sum(one[key] for one in rest) for key in keys}, "", f"{len(rest)} others")
    display.wide.print(table)
    if ways["unsized"]:
        display.out.print(
            f"{ways['unsized']:,.0f} accesses of SVE and SME per token have bytes that are unknown."
        )
    display.out.print("")


def _classes(figure: Mapping[str, Any]) -> str:
    names = {"simd": "SIMD", "dot_product": "dot products", "i8mm": "int8 matrix products"}
    return ", ".join(
        f"{number / figure['per_token']:.0%} {names[name]}"
        for name, number in figure["classes"].items()
    )
