"""`mobilellm inspect X.mlpackage`: our packages, and packages that others made."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
from commands import contents, run
from coremltools.converters.mil import Builder as mb  # noqa: N813  # its name everywhere
from coremltools.converters.mil import get_new_symbol
from coremltools.converters.mil.mil import Program, types
from coremltools.optimize.coreml import (
    OpPalettizerConfig,
    OptimizationConfig,
    palettize_weights,
)

from exporter.backends.coreml.inspection import Feature, WeightFormat, inspect_package
from exporter.bundle.bundle import Bundle

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def ours(finished_bundle: Bundle) -> Path:
    return finished_bundle.path / "coreml" / "model.mlpackage"


def test_a_package_of_ours_has_two_functions_two_states_and_each_weight_once(ours: Path) -> None:
    found = inspect_package(ours)
    assert [function.name for function in found.functions] == ["decode", "prefill"]
    for function, tokens in zip(found.functions, (1, 128), strict=True):
        assert function.inputs[0] == Feature("input_ids", "int32", (1, tokens))
        assert [state.name for state in function.states] == ["key_cache", "value_cache"]
        assert [(one.name, one.type) for one in function.outputs] == [("logits", "fp16")]
        assert function.unknown == ()
        assert function.operators["linear"] > 7
    assert found.metadata["max_context"] == "1024"
    quantized = found.weights[0]
    assert quantized.format == "int4 in blocks of 1 × 32, fp16 scales"
    manifest = json.loads((ours.parent.parent / "quantized" / "quantization.json").read_text())
    stored = [entry["scheme"] for entry in manifest["tensors"].values()]
    assert quantized.tensors == stored.count("int4-g32")


def test_inspect_shows_a_package_as_tables_and_as_json(ours: Path, capsys: Capture) -> None:
    before = contents(ours)
    shown = run(capsys, "inspect", ours)
    assert (shown.code, shown.err) == (0, "")
    for part in (
        "prefill",
        "decode",
        "key_cache",
        "linear",
        "int4 in blocks of 1 × 32",
        "version 9",
    ):
        assert part in shown.out
    found = run(capsys, "inspect", ours, "--json").json
    assert found["specification_version"] == 9
    assert [function["name"] for function in found["functions"]] == ["decode", "prefill"]
    assert contents(ours) == before


def _program(shape: tuple[Any, ...], build: Callable[[Any], Any]) -> Program:
    @mb.program(input_specs=[mb.TensorSpec(shape, types.fp32)], opset_version=ct.target.iOS18)  # type: ignore[untyped-decorator]
    def program(x: Any) -> Any:
        return build(x)

    return program


def foreign(folder: Path, palettized: bool) -> Path:
    """A package as coremltools makes it: a flexible input, and an operator that ours lack."""
    weight = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    program = _program(
        (get_new_symbol(), 256), lambda x: mb.elu(x=mb.linear(x=x, weight=weight), alpha=1.0)
    )
    model = ct.convert(
        program,
        inputs=[ct.TensorType("x", shape=(ct.RangeDim(1, 16, default=4), 256))],
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )
    if palettized:
        model = palettize_weights(model, OptimizationConfig(OpPalettizerConfig(nbits=4)))
    path = folder / "foreign.mlpackage"
    model.save(str(path))
    return path


@pytest.mark.parametrize(
    ("palettized", "weights"),
    {
        # with the bias that coremltools adds
        "plain": (False, WeightFormat("fp16", 2, 2 * 64 * 256 + 2 * 64)),
        "palettized": (
            True, WeightFormat("constexpr_lut_to_dense of uint4, fp16", 1, 64 * 128 + 2 * 16),
        ),
    }.values(),
    ids=["plain", "palettized"],
)  # fmt: skip
def test_a_foreign_package_shows_its_formats_and_what_the_interpreter_lacks(
    palettized: bool, weights: WeightFormat, tmp_path: Path, capsys: Capture
) -> None:
    path = foreign(tmp_path, palettized)
    found = inspect_package(path)
    (main,) = found.functions
    assert main.name == "main"
    assert main.inputs == (Feature("x", "fp32", ("1..16", 256)),)
    assert "elu" in main.unknown
    assert weights in found.weights
    assert "does not support: " in run(capsys, "inspect", path).out


@pytest.mark.parametrize(
    ("damage", "said"),
    {
        "missing": (lambda path: path.rename(path.with_name("elsewhere")), "no such"),
        "not a program": (
            lambda path: next(path.rglob("*.mlmodel")).write_bytes(b"\xff" * 99), "model.mlmodel",
        ),
    }.values(),
    ids=["missing", "not a program"],
)  # fmt: skip
def test_what_is_no_package_is_refused(
    damage: Callable[[Path], object], said: str, tmp_path: Path, capsys: Capture
) -> None:
    path = foreign(tmp_path, palettized=False)
    damage(path)
    outcome = run(capsys, "inspect", path)
    assert (outcome.code, outcome.out) == (2, "")
    assert said in outcome.err
