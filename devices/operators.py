"""Where the time goes: one table of operators for every runtime, and an audit of its delegates.

ExecuTorch's ETDump, ONNX Runtime's profile and Core ML's compute plan nest or mix what is measured
with what is planned; here only leaves count, so that the shares add up to one.
"""

import contextlib
import io
import json
import logging
import re
import subprocess
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from devices.errors import DeviceError


@dataclass(frozen=True)
class Operator:
    """All calls of one operator: `share` of the time of all; `delegate` is who ran it, or ''."""

    name: str
    calls: int
    milliseconds: float
    share: float
    delegate: str
    product: bool


@dataclass(frozen=True)
class _Leaf:
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
#: Kernels of ExecuTorch that fuse a whole attention; no delegate is meant to take them.
_EXECUTORCH_KERNELS = ("custom_sdpa",)
#: Products of ONNX Runtime that work on the integers themselves, or fuse a whole attention.
_ONNX_KERNELS = (
    "MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger",
    "QLinearMatMul", "QGemm", "GroupQueryAttention", "MultiHeadAttention", "Attention",
)  # fmt: skip


#: What readers raise on a file that is something else; ExecuTorch's runs flatc on it.
_UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, subprocess.SubprocessError,
)  # fmt: skip


def read_trace(format: str, path: Path) -> list[Operator]:  # noqa: A002  # as in `Model`
    """The operators of a trace, the most expensive first. Raises DeviceError."""
    readers = {"executorch": _read_etdump, "onnx": _read_onnx, "coreml": _read_coreml}
    try:
        leaves = list(readers[format](path))
    except _UNREADABLE as error:
        raise DeviceError(path.name, f"is no trace of {format} ({error})") from error
    if not leaves:
        raise DeviceError(path.name, "holds no operator")
    return _table(leaves)


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
    """Rows nest: execute > operator or delegate call > operators of the delegate."""
    with _quietly():
        from executorch.devtools import Inspector

        blocks = Inspector(etdump_path=str(path)).event_blocks
    for block in blocks:
        if block.name != "Execute":
            continue
        events = [event for event in block.events if event.perf_data is not None]
        opened = {event._instruction_id for event in events if event.is_delegated_op}
        for event in events:
            calls = len(event.perf_data.raw)
            milliseconds = float(sum(event.perf_data.raw))
            if event.is_delegated_op:
                # XNNPACK numbers its operators within each graph: "Add (ND) #3".
                name = re.sub(r" #\d+$", "", event.name)
                yield _Leaf(
                    name, calls, milliseconds, event.delegate_backend_name or "XnnpackBackend"
                )
            elif event.name.startswith("native_call_"):
                name = event.name.removeprefix("native_call_")
                yield _Leaf(name, calls, milliseconds, "")
            elif event.name == "DELEGATE_CALL" and event._instruction_id not in opened:
                yield _Leaf(
                    "delegate call", calls, milliseconds, event.delegate_backend_name or "?"
                )


def _read_onnx(path: Path) -> Iterator[_Leaf]:
    """Kernels only. A product on the CPU counts as delegated where its kernel is an integer one."""
    for event in json.loads(path.read_text(encoding="utf-8")):
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        name, provider = event["args"]["op_name"], event["args"].get("provider", "")
        delegate = provider.removesuffix("ExecutionProvider")
        if delegate == "CPU":
            delegate = "CPU kernel" if name in _ONNX_KERNELS else ""
        yield _Leaf(name, 1, event["dur"] / 1000, delegate)


def _read_coreml(path: Path) -> Iterator[_Leaf]:
    """A plan, not a measurement: the estimated share of the cost stands for milliseconds."""
    for row in json.loads(path.read_text(encoding="utf-8")):
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
