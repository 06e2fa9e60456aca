"""Tables of operators from real traces, and an audit that fails where a delegate was missed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import devices
from devices import operators as tables
from devices.errors import DeviceError
from devices.operators import Operator, audit, read_trace
from exporter.bundle.bundle import Bundle

#: One linear layer, with and without XNNPACK; written and run in a process of its own, as the
#: toolkit changes torch for the whole process.
LINEAR = """
import sys, torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.extension.pybindings import portable_lib
model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.ReLU())
exported = torch.export.export(model.eval(), (torch.zeros(2, 32),))
partitioner = [XnnpackPartitioner()] if sys.argv[1] == "xnnpack" else []
program = to_edge_transform_and_lower(exported, partitioner=partitioner).to_executorch()
module = portable_lib._load_for_executorch_from_buffer(program.buffer, enable_etdump=True)
module.run_method("forward", (torch.zeros(2, 32),))
module.write_etdump_result_to_file(sys.argv[2], sys.argv[2] + ".debug")
"""


@pytest.mark.parametrize(("delegate", "problems"), [("xnnpack", 0), ("none", 1)])
def test_a_linear_layer_that_missed_xnnpack_fails_the_audit(
    delegate: str, problems: int, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    command = [sys.executable, "-c", LINEAR, delegate, str(trace)]
    subprocess.run(command, capture_output=True, check=True)
    operators = read_trace("executorch", trace)
    assert sum(row.share for row in operators) == pytest.approx(1)
    found = audit(operators)
    assert len(found) == problems, found
    assert [row.delegate for row in operators if row.product] == [
        "" if problems else "XnnpackBackend"
    ]


#: What the interpreter of ExecuTorch says of the time of all calls of operators and delegates.
CALLS = """
import sys
from executorch.devtools import Inspector
blocks = [block for block in Inspector(etdump_path=sys.argv[1]).event_blocks]
calls = [e for b in blocks for e in b.events if e.name in ("OPERATOR_CALL", "DELEGATE_CALL")]
print(sum(sum(event.perf_data.raw) for event in calls))
"""


@pytest.fixture(scope="module")
def decoded(
    finished_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Operator]]:
    """A trace of the demo's own .pte, whose attention is a custom operator, and its table."""
    folder = tmp_path_factory.mktemp("decoded")
    trace, tokens = folder / "trace", folder / "tokens.txt"
    tokens.write_text(" ".join(str(token % 500) for token in range(600)))
    runner = Path(devices.__file__).parent / "engines" / "python_runner.py"
    command = [
        sys.executable, str(runner), "--engine", "executorch", "--tokens", str(tokens),
        "--model", str(finished_bundle.path / "executorch" / "model.pte"),
        "--depths", "500", "--steps", "8", "--trace", str(trace),
    ]  # fmt: skip
    subprocess.run(command, capture_output=True, check=True)
    return trace, read_trace("executorch", trace)


def test_custom_operators_of_executorch_have_their_share(
    decoded: tuple[Path, list[Operator]],
) -> None:
    trace, operators = decoded
    shares = {row.name: row.share for row in operators}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["llama::custom_sdpa.out"] > 0.05
    assert shares["llama::update_cache.out"] > 0
    told = subprocess.run(
        [sys.executable, "-c", CALLS, str(trace)], capture_output=True, text=True, check=True
    ).stdout
    # The table leaves out the overhead of each call of a kernel alone.
    assert sum(row.milliseconds for row in operators) == pytest.approx(float(told), rel=0.05)


def test_the_audit_sees_a_custom_operator_for_attention(
    decoded: tuple[Path, list[Operator]], monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, operators = decoded
    assert audit(operators) == []
    (attention,) = [row for row in operators if "sdpa" in row.name]
    assert (attention.product, attention.delegate) == (True, "CPU kernel")
    monkeypatch.setattr(tables, "_EXECUTORCH_KERNELS", frozenset[str]())
    (problem,) = audit(read_trace("executorch", trace))
    assert problem.startswith(f"llama::custom_sdpa.out ({attention.calls} calls, ")


def float_product(path: Path) -> Path:
    """A profile of ONNX Runtime with one product of floats."""
    weight = numpy_helper.from_array(np.ones((8, 4), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Exp", ["y"], ["z"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 8])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 4])], [weight],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(path / "profile")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    session.run(None, {"x": np.ones((2, 8), np.float32)})
    return Path(session.end_profiling())


def test_a_product_of_floats_in_onnx_runtime_fails_the_audit(tmp_path: Path) -> None:
    operators = read_trace("onnx", float_product(tmp_path))
    assert {row.name for row in operators} >= {"MatMul"}
    (problem,) = audit(operators)
    assert problem.startswith("MatMul (1 calls, ")


def test_a_plan_of_core_ml_says_what_stays_on_the_cpu(tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    plan.write_text(json.dumps([
        {"operator": "ios18.linear", "device": "MLNeuralEngineComputeDevice", "cost": 0.7},
        {"operator": "ios18.matmul", "device": "MLCPUComputeDevice", "cost": 0.2},
        {"operator": "ios18.add", "device": "MLCPUComputeDevice", "cost": 0.1},
    ]))  # fmt: skip
    operators = read_trace("coreml", plan)
    assert [(row.name, row.delegate) for row in operators] == [
        ("linear", "MLNeuralEngineComputeDevice"), ("matmul", ""), ("add", ""),
    ]  # fmt: skip
    assert audit(operators) == ["matmul (1 calls, 20.0% of the time) reached no delegate"]


@pytest.mark.parametrize("runtime", ["executorch", "onnx", "coreml"])
@pytest.mark.parametrize("content", [b"", b"[]", b"[1]", b"{}", b"\xff\x00 nothing"])
def test_what_is_no_trace_is_refused(runtime: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(content)
    with pytest.raises(DeviceError):
        read_trace(runtime, path)
