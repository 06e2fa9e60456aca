"""The time of each operator, in one table for every runtime, and an audit of the delegates.

ExecuTorch's ETDump, ONNX Runtime's profile and Core ML's compute plan nest their events. A row here
counts only the time that no other row counts, so the shares add up to one.
"""

import contextlib
import io
import logging
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from devices.answers import contained, is_number, is_whole, parse_json
from devices.errors import DeviceError
from devices.text import printable


@dataclass(frozen=True)
class Operator:
    """All calls of one operator.

    `share` is its part of the time of all operators. `delegate` names the delegate or the
    optimized kernel that ran it, and is '' for an ordinary kernel of the CPU. `product` says
    whether it multiplies matrices.
    """

    name: str
    calls: int
    milliseconds: float
    share: float
    delegate: str
    product: bool


@dataclass(frozen=True)
class _Leaf:
    """Calls of one operator, as one event of a trace has them. Their time is in no other leaf."""

    name: str
    calls: int
    milliseconds: float
    delegate: str


#: Matrix products, as the three runtimes spell them.
_PRODUCTS = re.compile(
    r"fully connected|matrix multiply|convolution|gemm|matmul|linear|(^|_)(b?mm|addmm|conv)(_|\.|$)"
    r"|scaled_dot_product|sdpa|attention",
    re.IGNORECASE,
)
#: Stands for a delegate where a kernel of the CPU is the optimized one for a product.
_CPU_KERNEL = "CPU kernel"
#: Kernels of ExecuTorch that fuse a whole attention; no delegate has them.
_EXECUTORCH_KERNELS = frozenset({"llama::custom_sdpa.out", "llama::custom_quantized_sdpa.out"})
#: Kernels of ONNX Runtime that multiply the integers themselves, or fuse a whole attention.
_ONNX_KERNELS = frozenset({
    "MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger",
    "QLinearMatMul", "QGemm", "GroupQueryAttention", "MultiHeadAttention", "Attention",
})  # fmt: skip
#: Events of ExecuTorch's interpreter around the events of kernels and delegates, and its own
#: instructions, which run no operator.
_CALLS = frozenset({"OPERATOR_CALL", "DELEGATE_CALL"})
_INTERPRETER = frozenset({"Method::execute", "JF_CALL", "MOVE_CALL", "FREE_CALL"})


def read_trace(format: str, path: Path) -> list[Operator]:  # noqa: A002  # as in `Model`
    """The operators of a trace, the most expensive first. Raises DeviceError."""
    readers = {"executorch": _read_etdump, "onnx": _read_onnx, "coreml": _read_coreml}
    with contained(path.name, f"as a trace of {format}, it"):
        leaves = list(map(_checked, readers[format](path)))
    if not leaves:
        raise DeviceError(path.name, "holds no operator")
    return _table(leaves)


def _checked(leaf: _Leaf) -> _Leaf:
    """The leaf with printable names. Raises DeviceError where its figures are no figures."""
    if not is_number(leaf.milliseconds) or not is_whole(leaf.calls):
        raise DeviceError("trace", f"gives no time of the operator {leaf.name}")
    return replace(
        leaf, name=printable(str(leaf.name), 120), delegate=printable(str(leaf.delegate), 60)
    )


def audit(operators: Iterable[Operator]) -> list[str]:
    """One line for each matrix product that reached no delegate."""
    return [
        f"{one.name} ({one.calls} calls, {one.share:.1%} of the time) reached no delegate"
        for one in operators
        if one.product and not one.delegate
    ]


def _table(leaves: Iterable[_Leaf]) -> list[Operator]:
    counted: dict[tuple[str, str], tuple[int, float]] = {}
    for leaf in leaves:
        calls, milliseconds = counted.get((leaf.name, leaf.delegate), (0, 0.0))
        key = leaf.name, leaf.delegate
        counted[key] = calls + leaf.calls, milliseconds + leaf.milliseconds
    total = sum(milliseconds for _, milliseconds in counted.values()) or 1.0
    rows = [
        Operator(name, calls, ms, ms / total, delegate, _PRODUCTS.search(name) is not None)
        for (name, delegate), (calls, ms) in counted.items()
    ]
    return sorted(rows, key=lambda row: -row.milliseconds)


def _read_etdump(path: Path) -> Iterator[_Leaf]:
    """Every block ``Execute`` holds the runs of one method."""
    with _quietly():
        from executorch.devtools import Inspector

        blocks = Inspector(etdump_path=str(path)).event_blocks
    for block in blocks:
        if block.name == "Execute":
            yield from _executed([event for event in block.events if event.perf_data is not None])


def _executed(events: Sequence[Any]) -> Iterator[_Leaf]:
    """The operators of one block.

    A call of the interpreter (`_CALLS`) and the events inside it have the same instruction id: one
    event of a kernel, or one for each operator of a delegate. What a delegate's call takes beyond
    its operators is a row of its own. The overhead of a kernel's call is in no row.
    """
    delegates = dict[int, str]()
    inside = defaultdict[int, float](float)
    for event in events:
        if event.name in _CALLS | _INTERPRETER:
            continue
        instruction, milliseconds = event._instruction_id, float(sum(event.perf_data.raw))
        inside[instruction] += milliseconds
        if event.is_delegated_op:
            # XNNPACK numbers its operators within each graph: "Add (ND) #3".
            name = re.sub(r" #\d+$", "", event.name)
            delegate = event.delegate_backend_name or "XnnpackBackend"
            delegates[instruction] = delegate
        else:  # a kernel that ExecuTorch generates has a prefix, a custom operator has none
            name = event.name.removeprefix("native_call_")
            delegate = _CPU_KERNEL if name in _EXECUTORCH_KERNELS else ""
        yield _Leaf(name, len(event.perf_data.raw), milliseconds, delegate)
    for event in events:
        if event.name not in _CALLS:
            continue
        instruction, calls = event._instruction_id, len(event.perf_data.raw)
        rest = float(sum(event.perf_data.raw)) - inside[instruction]
        if event.name == "DELEGATE_CALL" and rest > 0:
            delegate = delegates.get(instruction) or event.delegate_backend_name or "?"
            name = "delegate call" + (" beyond its operators" if instruction in delegates else "")
            yield _Leaf(name, calls, rest, delegate)
        elif event.name == "OPERATOR_CALL" and not inside[instruction]:
            yield _Leaf("operator without a name", calls, rest, "")


def _read_onnx(path: Path) -> Iterator[_Leaf]:
    """Kernels only. A product on the CPU counts as delegated where its kernel is an integer one."""
    for event in parse_json(path.read_text(encoding="utf-8"), path.name):
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        name, provider = event["args"]["op_name"], event["args"].get("provider", "")
        delegate = provider.removesuffix("ExecutionProvider")
        if delegate == "CPU":
            delegate = _CPU_KERNEL if name in _ONNX_KERNELS else ""
        yield _Leaf(name, 1, event["dur"] / 1000, delegate)


def _read_coreml(path: Path) -> Iterator[_Leaf]:
    """A plan, not a measurement: the estimated share of the cost stands for milliseconds."""
    for row in parse_json(path.read_text(encoding="utf-8"), path.name):
        device = str(row["device"])
        delegate = "" if "CPU" in device.upper() else device
        yield _Leaf(str(row["operator"]).split(".")[-1], 1, float(row["cost"]), delegate)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The toolkit warns while it is imported, and prints tables."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
