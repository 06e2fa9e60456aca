"""The gate on real counts: it finds a changed attention and a product out of its delegate, and
neither of two counts of the same model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from undelegated import lower_with_undelegated_output

from devices.engines import Model
from devices.errors import BadDeviceError
from devices.instructions import tools
from devices.instructions.counter import Settings, count
from exporter import profiling
from exporter.backends import backend
from exporter.bundle.bundle import Bundle
from exporter.bundle.results import INSTRUCTIONS, Result
from exporter.gate.baseline import compare
from exporter.gate.budget import Tolerances
from exporter.gate.figure import Figures
from exporter.gate.figures import collect
from exporter.gate.finding import Finding

Count = Callable[[Model], Figures]


@pytest.fixture(scope="module")
def model(portable_bundle: Bundle) -> Model:
    try:
        tools.build()
    except BadDeviceError as error:
        pytest.skip(str(error))
    finished = portable_bundle.artifacts["executorch"]
    return profiling.job(portable_bundle, finished, profiling.Request(devices=())).model


@pytest.fixture(scope="module")
def figures(portable_bundle: Bundle) -> Count:
    """figures(model) → those of a bundle whose decode steps are counted now."""

    def of(model: Model) -> Figures:
        counts = count(model, Settings(prompts=()), lambda *_: None)
        return collect(portable_bundle.manifest, {"counts": Result(INSTRUCTIONS, counts)})

    return of


@pytest.fixture(scope="module")
def before(model: Model, figures: Count) -> Figures:
    return figures(model)


def judged(now: Figures, before: Figures) -> Finding:
    findings = compare(now, before, Tolerances()).findings
    (found,) = [finding for finding in findings if finding.device == "cortex-a76"]
    assert all(finding.passed for finding in findings if finding is not found)
    return found


def test_two_counts_of_a_model_are_equal(model: Model, figures: Count, before: Figures) -> None:
    found = judged(figures(model), before)
    assert found.passed
    assert found.note.endswith(": +0.00 %")


def test_a_longer_cache_that_is_not_filled_passes_the_gate(
    model: Model, figures: Count, before: Figures, portable_bundle: Bundle, tmp_path: Path
) -> None:
    target = portable_bundle.artifacts["executorch"].artifact.target
    longer = target.model_copy(update={"max_context": target.max_context * 5 // 4})
    backend("executorch").lower(portable_bundle.quantized, longer, tmp_path)
    changed = replace(model, folder=tmp_path, files=(model.main,), context=longer.max_context)
    assert judged(figures(changed), before).passed


def test_a_product_out_of_its_delegate_breaks_the_gate_and_its_library_is_named(
    model: Model, figures: Count, before: Figures, portable_bundle: Bundle, tmp_path: Path
) -> None:
    target = portable_bundle.artifacts["executorch"].artifact.target
    lower_with_undelegated_output(portable_bundle.quantized, target, tmp_path)
    found = judged(figures(replace(model, folder=tmp_path, files=(model.main,))), before)
    assert not found.passed
    assert "in libexecutorch_kernels_optimized.so: +" in found.note
