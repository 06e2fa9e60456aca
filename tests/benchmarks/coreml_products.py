"""Multiply-accumulates of a Core ML package at several depths, counted while it is interpreted.

    python tests/benchmarks/coreml_products.py build/nano/coreml 0 512 1023

For each depth it prints what one decode step multiplies: in products with weights, and in
attention. A call of `prefill` tokens, which ends at that depth, is counted too where it fits.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exporter.backends.coreml import running
from exporter.backends.coreml.operators import OPERATORS
from exporter.backends.coreml.program import DECODE, PREFILL
from exporter.bundle.artifact import open_artifact

#: Operator → the multiply-accumulates of one call, from its arguments.
_COUNTED: dict[str, Callable[..., int]] = {
    "linear": lambda x, weight, **_: x.data.numel() * weight.data.shape[0],
    "scaled_dot_product_attention": lambda query, key, **_: (
        2 * query.data.numel() * key.data.shape[-2]
    ),
}


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Count the calls of the interpreter's operators while the context is open."""
    counts, before = Counter[str](), dict(OPERATORS)

    def counted(name: str) -> Callable[..., Any]:
        def compute(**arguments: Any) -> Any:
            counts[name] += _COUNTED[name](**arguments)
            return before[name](**arguments)

        return compute

    OPERATORS.update({name: counted(name) for name in _COUNTED})
    try:
        yield counts
    finally:
        OPERATORS.update(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("depths", type=int, nargs="+")
    given = parser.parse_args()
    runner: Any = running.interpreted(open_artifact(given.artifact).artifact)
    for depth in given.depths:
        for tokens in (1, runner._steps):
            start = depth if tokens == 1 else depth - tokens
            if start < 0 or start + tokens > runner.context:
                continue
            with counting() as counts:
                read(runner, tokens, start)
            weights, attention = (counts[name] / 1e6 for name in _COUNTED)
            print(
                f"depth {depth:6}, {tokens:4} tokens: {weights:9.1f} M with weights, "
                f"{attention:9.1f} M in attention"
            )


def read(runner: Any, tokens: int, start: int) -> None:
    """Read so many tokens from a position on, whatever the cache holds before."""
    if isinstance(runner, running.LanguageModelRunner):
        runner._position = start
        runner._read([0] * tokens)
    elif tokens == 1:
        runner._run(DECODE, input_ids=[[0]], position=[start])
    else:
        runner._run(PREFILL, input_ids=[[0] * tokens], position=[start], length=[tokens])


if __name__ == "__main__":
    main()
