"""The payload of the Core ML delegate in a .pte that was tampered with: what differs is named."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from lowering import MODELS, Lowered, lowered_in
from programs import read_parts, write_parts

from exporter.backends import executorch
from exporter.backends.executorch.coreml_delegate import METADATA, flatten, unflatten

pytest.importorskip("exporter.backends.coreml.comparison")
WEIGHTS = "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    target = {"target": "executorch", "delegate": "coreml", "max_context": 64}
    schemes = {"linear": "int4-g32", "embedding": "int4-g32"}
    return lowered_in(tmp_path_factory.mktemp("payload"), MODELS["llama4_text"], target, schemes)


def with_metadata(**changes: object) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        files[METADATA] = json.dumps({**json.loads(files[METADATA]), **changes}).encode()

    return change


def change_a_weight(files: Files) -> None:
    files[WEIGHTS] = files[WEIGHTS][:-3] + bytes([files[WEIGHTS][-3] ^ 1]) + files[WEIGHTS][-2:]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda files: None, []),
        (with_metadata(identifier="executorch_0"), [f"payload.{METADATA}.identifier"]),
        (with_metadata(outputNames=["position"]), [f"payload.{METADATA}.outputNames[0]"]),
        (
            lambda files: files.update({"model.mlmodelc/model.mil": b"x"}),
            ["payload.model.mlmodelc/model.mil", f"payload.{METADATA}.identifier"],
        ),
        (change_a_weight, [f"payload.{METADATA}.identifier", "main: "]),
    ],
    ids=["nothing", "identifier", "names", "a compiled model", "a weight"],
)
def test_a_tampered_payload_is_named(
    change: Callable[[Files], None], expected: list[str], lowered: Lowered, tmp_path: Path
) -> None:
    artifact = lowered[1].artifact
    parts = read_parts(artifact.path / "model.pte")
    index = parts.plan().delegates[0].processed.index
    files = {
        name: bytes(data) for name, data in unflatten(memoryview(parts.segments[index])).items()
    }
    change(files)
    parts.segments[index] = flatten(files)
    write_parts(parts, tmp_path / "model.pte")
    found = list(executorch.differences(replace(artifact, path=tmp_path), artifact))
    assert len(found) == len(expected)
    for (place, _), wanted in zip(found, expected, strict=True):
        assert place.startswith(wanted)
