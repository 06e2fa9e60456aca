"""Damaged and hostile artifacts, with checksums made anew, end with a message: the runtime may
crash, loop or allocate without end, the command does not."""

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from commands import flip, run
from coremltools.proto import Model_pb2
from onnx import TensorProto, helper, numpy_helper

from exporter.bundle.artifact import open_artifact
from exporter.bundle.bundle import Bundle
from exporter.errors import InputError
from exporter.inference import artifact_runner
from exporter.inference.artifact_runner import ArtifactRunner

MODEL = "coreml/model.mlpackage/Data/com.apple.CoreML/model.mlmodel"
GRAPH, DATA = "onnx/onnx/model_q4.onnx", "onnx/onnx/model_q4.onnx_data"
#: The files that a runtime parses, and the share of each that is not only weights.
PARSED = {
    "executorch/model.pte": 0.05,
    GRAPH: 1.0,
    DATA: 1.0,
    MODEL: 1.0,
}


def reseal(bundle: Path) -> None:
    """Make every checksum anew, as an attacker does."""
    for manifest in bundle.glob("*/artifact.json"):
        content = json.loads(manifest.read_text())
        content["files"] = {name: digest(manifest.parent / name) for name in content["files"]}
        manifest.write_text(json.dumps(content))
    sums = bundle / "SHA256SUMS"
    names = [line[66:] for line in sums.read_text().splitlines()]
    sums.write_text("".join(f"{digest(bundle / name)}  {name}\n" for name in names))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flip_some(path: Path, share: float, count: int) -> None:
    """Flip bits at random places of the first part of a file."""
    chance = random.Random(count)
    for _ in range(count):
        flip(path, chance.randrange(int(path.stat().st_size * share)), chance.randrange(8))


@pytest.mark.parametrize(
    ("name", "count"), [(name, 40) for name in PARSED] + [("executorch/model.pte", 1)]
)
def test_a_damaged_artifact_ends_no_command(
    name: str, count: int, bundle_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_some(bundle_copy / name, PARSED[name], count)
    reseal(bundle_copy)
    target = name.partition("/")[0]
    outcome = run(
        capsys, "generate", bundle_copy, "--target", target, "--prompt", "Hi",
        "--max-new-tokens", 2, "--json",
    )  # fmt: skip
    assert outcome.code in (0, 2), outcome.err  # a flip of a weight changes the text only
    if outcome.code:
        assert outcome.json["error"]


def test_a_crash_of_a_runtime_is_named_with_its_signal(
    bundle_copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact_runner, "_SERVICE", "misbehaving_runner:Crashing")
    crash = "the runtime was killed by signal 11 (SIGSEGV)"
    outcome = run(capsys, "generate", bundle_copy, "--prompt", "Hi", "--json")
    assert outcome.code == 2
    assert crash in outcome.json["error"]
    outcome = run(capsys, "verify", bundle_copy, "--json")
    notes = [check["note"] for check in outcome.json["checks"] if not check["passed"]]
    assert (outcome.code, notes) == (1, [crash] * 3)


@pytest.mark.parametrize(
    ("service", "problem"),
    [("Lying", "gives 511 logits, not 512"),
     ("Boasting", "has a vocabulary of 1000000000 tokens")],
)  # fmt: skip
def test_sizes_that_no_artifact_has_are_refused(
    service: str, problem: str, finished_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact_runner, "_SERVICE", f"misbehaving_runner:{service}")
    runner = ArtifactRunner(finished_bundle.artifacts["onnx"].artifact)
    with pytest.raises(InputError, match=problem):
        runner.prefill([1])


# Programs that are valid, but do not end or allocate without end.


def graph(*nodes: onnx.NodeProto, **constants: np.ndarray) -> onnx.ModelProto:
    """A model whose logits are computed from `value`, the result of the nodes."""
    values = {"shape": np.array([1, 1, 512]), **constants}
    made = helper.make_graph(
        [
            *nodes,
            helper.make_node("Cast", ["value"], ["scalar"], to=TensorProto.FLOAT),
            helper.make_node("Expand", ["scalar", "shape"], ["logits"]),
        ],
        "hostile",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "length"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 1, 512])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def endless_loop() -> onnx.ModelProto:
    def value(name: str, kind: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, [])

    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("Add", ["before", "number"], ["after"]),
        ],
        "body",
        [value("number", TensorProto.INT64), value("go", TensorProto.BOOL),
         value("before", TensorProto.INT64)],
        [value("on", TensorProto.BOOL), value("after", TensorProto.INT64)],
    )  # fmt: skip
    return graph(
        helper.make_node("ReduceMax", ["input_ids"], ["first"], keepdims=0),
        helper.make_node("Loop", ["", "forever", "first"], ["value"], body=body),
        forever=np.array(True),
    )


def huge_tensor() -> onnx.ModelProto:
    return graph(
        helper.make_node("Mul", ["many", "input_ids"], ["wide"]),
        helper.make_node("ReduceMax", ["wide"], ["longest"], keepdims=1),
        helper.make_node("Reshape", ["longest", "one"], ["size"]),
        helper.make_node("ConstantOfShape", ["size"], ["huge"]),
        helper.make_node("ReduceSum", ["huge"], ["value"], keepdims=0),
        many=np.array(2 * 10**9),
        one=np.array([1]),
    )


def huge_state() -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / MODEL.partition("/")[2]
        spec = Model_pb2.Model.FromString(path.read_bytes())
        for function in spec.mlProgram.functions.values():
            for given in function.inputs:
                kind = given.type.stateType.wrappedType.tensorType
                if kind.rank:
                    kind.dimensions[0].constant.size = 1 << 40
        path.write_bytes(spec.SerializeToString())

    return change


def written(model: onnx.ModelProto) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        onnx.save(model, folder / "onnx" / "model_q4.onnx")

    return change


@pytest.fixture
def short_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(artifact_runner, "CALL_SECONDS", 1.0)
    monkeypatch.setattr(artifact_runner, "CALL_SECONDS_PER_MB", 0.0)
    yield


@pytest.mark.parametrize(
    ("target", "change", "problem"),
    [
        ("onnx", written(endless_loop()), "the runtime did not finish within 1 s, its limit"),
        ("onnx", written(huge_tensor()), "its memory is limited to "),
        ("coreml", huge_state(), "its memory is limited to "),
    ],
    ids=["an endless loop", "a huge tensor", "a huge state"],
)
def test_a_program_without_end_is_stopped_with_the_limit(
    target: str, change: Callable[[Path], None], problem: str, bundle_copy: Path,
    short_limits: None,
) -> None:  # fmt: skip
    change(bundle_copy / target)
    runner, begun = ArtifactRunner(open_artifact(bundle_copy / target).artifact), 0.0
    with pytest.raises(InputError) as raised:
        runner.wait()
        begun = time.monotonic()
        runner.prefill([1, 2])
    assert problem in raised.value.problem
    assert not begun or time.monotonic() - begun < 10
