"""The comparison of two Core ML packages: every kind of change is found, and named."""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import flip
from conftest import LLAMA4
from lowering import Lowered, lowered_in

from exporter.backends import Artifact
from exporter.backends import coreml as backend
from exporter.backends.coreml.package import MANIFEST, MODEL, WEIGHTS, open_package, place_of
from exporter.errors import InputError

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    target = {"target": "coreml", "max_context": 64, "prefill": 7}
    quantization = {"linear": "int4-g32", "embedding": "int4-g32"}
    return lowered_in(tmp_path_factory.mktemp("compared"), LLAMA4, target, quantization)


@pytest.fixture
def pair(lowered: Lowered, tmp_path: Path) -> tuple[Artifact, Artifact]:
    """A copy to change, and the artifact itself."""
    expected = lowered[1].artifact
    folder = shutil.copytree(expected.path, tmp_path / "found")
    return replace(expected, path=Path(folder)), expected


def changed(change: Callable[[Any], object]) -> Damage:
    """Change the protobuf."""

    def damage(package: Path) -> None:
        spec = open_package(package).spec
        change(spec)
        (package / MODEL).write_bytes(spec.SerializeToString(deterministic=True))

    return damage


def operations(spec: Any, name: str = "prefill") -> Any:
    function = spec.mlProgram.functions[name]
    return function.block_specializations[function.opset].operations


def operation(spec: Any, output: str, name: str = "prefill") -> Any:
    return next(
        one for one in operations(spec, name) if one.outputs and one.outputs[0].name == output
    )


def another_epsilon(spec: Any) -> None:
    """A constant that an operation reads by name."""
    name = operation(spec, "rsqrt_0").inputs["epsilon"].arguments[0].name
    value = operation(spec, name).attributes["val"].immediateValue.tensor
    value.bytes.values = np.float16(2e-5).tobytes()


def another_type(spec: Any) -> None:
    operation(spec, "silu_0").type = "relu"


def another_input(spec: Any) -> None:
    operation(spec, "rsqrt_0").inputs["x"].arguments[0].name = "reduce_mean_0"


def an_input_more(spec: Any) -> None:
    added = operation(spec, "silu_0").inputs["alpha"]
    added.CopyFrom(operation(spec, "rsqrt_0").inputs["x"])


def another_attribute(spec: Any) -> None:
    value = operation(spec, "silu_0").attributes["name"].immediateValue.tensor.strings
    value.values[0] = "other"


def an_extra_operation(spec: Any) -> None:
    extra = operations(spec).add()
    extra.CopyFrom(operation(spec, "silu_0"))
    extra.outputs[0].name = "extra"


def an_operation_twice(spec: Any) -> None:
    operations(spec).add().CopyFrom(operation(spec, "silu_0"))


def an_operation_less(spec: Any) -> None:
    operations(spec).remove(operation(spec, "silu_0"))


def another_order(spec: Any) -> None:
    first, second = operations(spec)[0], operations(spec)[1]
    held = type(first)()
    held.CopyFrom(first)
    first.CopyFrom(second)
    second.CopyFrom(held)


def a_wired_copy(spec: Any) -> None:
    """The constant stays; a product reads another of the same shape."""
    weight = "model_layers_0_self_attn_q_proj_weight"
    copy = operations(spec).add()
    copy.CopyFrom(operation(spec, weight))
    copy.outputs[0].name = "copy"
    place = operation(spec, weight.replace("0", "1")).inputs["data"]
    copy.inputs["data"].CopyFrom(place)
    for one in operations(spec):
        for given in one.inputs.values():
            for binding in given.arguments:
                if binding.name == weight:
                    binding.name = "copy"


def another_offset(spec: Any) -> None:
    """A weight points to the codes of another."""
    weight = "model_layers_0_self_attn_q_proj_weight"
    place = operation(spec, weight.replace("0", "1")).inputs["data"]
    operation(spec, weight).inputs["data"].CopyFrom(place)


def another_file_name(spec: Any) -> None:
    value = operation(spec, "rope_cos").attributes["val"].blobFileValue
    value.fileName = "@model_path/weights/../weights/weight.bin"


def another_state(spec: Any) -> None:
    state = spec.description.functions[0].state[0].type.stateType.arrayType
    state.shape[2] = 96


def another_state_of_the_function(spec: Any) -> None:
    for given in spec.mlProgram.functions["prefill"].inputs:
        if given.type.WhichOneof("type") == "stateType":
            given.type.stateType.wrappedType.tensorType.dimensions[2].constant.size = 96


def another_default(spec: Any) -> None:
    spec.description.defaultFunctionName = "prefill"


def another_end(spec: Any) -> None:
    spec.description.metadata.userDefined["eos_token_ids"] = "[7]"


def an_entry_more(spec: Any) -> None:
    spec.description.metadata.userDefined["more\x1b[2J"] = "7"


def a_function_more(spec: Any) -> None:
    spec.mlProgram.functions["more"].CopyFrom(spec.mlProgram.functions["decode"])


def another_opset(spec: Any) -> None:
    """Another specialization, which computes something else, is the one in use."""
    function = spec.mlProgram.functions["decode"]
    function.block_specializations["CoreML9"].CopyFrom(function.block_specializations["CoreML8"])
    function.opset = "CoreML9"


def another_output(spec: Any) -> None:
    function = spec.mlProgram.functions["decode"]
    function.block_specializations["CoreML8"].outputs[0] = "silu_0"


def an_unknown_field(package: Path) -> None:
    """Field 1000 of the model with the text ``x``, which this version does not know."""
    path = package / MODEL
    path.write_bytes(path.read_bytes() + bytes([0xC2, 0x3E, 1]) + b"x")


def the_table(package: Path) -> None:
    """The row of the last position in a table of RoPE."""
    opened = open_package(package)
    constant = operation(opened.spec, "rope_cos").attributes["val"]
    place = place_of(constant)
    assert place is not None
    data = (package / WEIGHTS).read_bytes()
    start = int.from_bytes(data[place[1] + 16 : place[1] + 24], "little")
    flip(package / WEIGHTS, start + 2 * (63 * 32 + 5) + 1, bit=2)


def a_record(package: Path) -> None:
    """The type in the record of a constant in the weight file."""
    opened = open_package(package)
    place = place_of(operation(opened.spec, "rope_cos").attributes["val"])
    assert place is not None
    flip(package / WEIGHTS, place[1] + 4, bit=1)


def more_bytes(package: Path) -> None:
    with (package / WEIGHTS).open("ab") as file:
        file.write(b"\0" * 64)


def the_version(package: Path) -> None:
    flip(package / WEIGHTS, 4, bit=0)


def a_file(package: Path) -> None:
    (package / "Data" / "com.apple.CoreML" / "more.bin").write_bytes(b"")


def a_link(package: Path) -> None:
    (package / "Data" / "linked").symlink_to(package / WEIGHTS)


def an_item(package: Path) -> None:
    manifest = json.loads((package / MANIFEST).read_text())
    manifest["itemInfoEntries"]["more"] = {"path": "com.apple.CoreML/weights"}
    (package / MANIFEST).write_text(json.dumps(manifest))


def another_model(package: Path) -> None:
    """A second model in the package is the one that the manifest names."""
    shutil.copy(package / MODEL, package / "Data" / "com.apple.CoreML" / "other.mlmodel")
    text = (package / MANIFEST).read_text()
    (package / MANIFEST).write_text(text.replace("model.mlmodel", "other.mlmodel"))


CHANGES: dict[str, tuple[Damage, str, str]] = {
    "epsilon": (changed(another_epsilon), "prefill: rsqrt_0_epsilon_0", "is 2.00272e-05, not 0"),
    "type": (changed(another_type), "prefill: op silu_0", "type is 'relu', not 'silu'"),
    "input": (
        changed(another_input), "prefill: op rsqrt_0", "x.name is 'reduce_mean_0', not 'add_2'",
    ),
    "input more": (changed(an_input_more), "prefill: op silu_0", "alpha is extra"),
    "attribute": (
        changed(another_attribute), "prefill: op silu_0", "name is 'other', not 'silu_0'",
    ),
    "operation more": (changed(an_extra_operation), "prefill: op extra", "is extra: silu"),
    "operation twice": (changed(an_operation_twice), "prefill: op silu_0", "is extra: silu"),
    "operation less": (changed(an_operation_less), "prefill: op silu_0", "is missing: silu"),
    "order": (changed(another_order), "prefill", "computes add_0 where add_0_y_0 is expected"),
    "copy": (
        changed(a_wired_copy), "prefill: op copy", "is extra: constexpr_blockwise_shift_scale",
    ),
    "offset": (
        changed(another_offset),
        "prefill: model_layers_0_self_attn_q_proj_weight",
        "of 6144 values differ, first at [0, ",
    ),
    "file name": (
        changed(another_file_name), "prefill: rope_cos", "is in the file '@model_path/weights/../",
    ),
    "state": (
        changed(another_state),
        "description",
        "prefill.state.key_cache.type.stateType.arrayType.shape[2] is 96, not 64",
    ),
    "state of the function": (
        changed(another_state_of_the_function), "prefill",
        "key_cache.type.stateType.wrappedType.tensorType.dimensions[2].constant.size is 96, not 64",
    ),
    "default": (
        changed(another_default), "description", "defaultFunctionName is 'prefill', not 'decode'",
    ),
    "end": (
        changed(another_end), "description",
        "metadata.userDefined.eos_token_ids is '[7]', not '[1, 2]'",
    ),
    "entry more": (
        changed(an_entry_more), "description", r"metadata.userDefined.'more\x1b[2J' is extra",
    ),
    "function more": (changed(a_function_more), "mlProgram", "more is extra"),
    "opset": (changed(another_opset), "decode", "opset is 'CoreML9', not 'CoreML8'"),
    "output": (changed(another_output), "decode", "outputs is 'silu_0', not 'logits'"),
    "unknown field": (an_unknown_field, "model", "has fields that are not in the format"),
    "table": (
        the_table, "decode: rope_cos", "1 of 2048 values differ, first at [63, 5]: ",
    ),
    "record": (a_record, "decode: rope_cos", "is stored in another way"),
    "bytes more": (more_bytes, "weight.bin", "(0, 64, 2), not (0, 0, 2)"),
    "version": (the_version, "weight.bin", "(0, 0, 3), not (0, 0, 2)"),
    "file": (
        a_file, "Data/com.apple.CoreML/more.bin", "is a file that is not part of the package",
    ),
    "link": (a_link, "Data/linked", "is a link that is not part of the package"),
    "item": (an_item, "Manifest.json", "itemInfoEntries is ["),
    "model": (another_model, "Manifest.json", "rootModelIdentifier is {"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "place", "said"), CHANGES.values(), ids=CHANGES)
def test_a_change_is_found_and_named(
    damage: Damage, place: str, said: str, pair: tuple[Artifact, Artifact]
) -> None:
    damage(pair[0].path / backend.FILE_NAME)
    found = list(backend.differences(*pair))
    assert any(where == place and said in what for where, what in found), found


def test_equal_packages_do_not_differ(pair: tuple[Artifact, Artifact]) -> None:
    assert list(backend.differences(*pair)) == []


def record_other_versions(spec: Any) -> None:
    spec.description.metadata.versionString = "0.0.1"
    spec.description.metadata.userDefined["com.github.apple.coremltools.version"] = "10.0"
    spec.mlProgram.attributes["buildInfo"].docString = "10.0"


def test_versions_of_tools_and_random_identifiers_are_no_differences(
    pair: tuple[Artifact, Artifact],
) -> None:
    package = pair[0].path / backend.FILE_NAME
    changed(record_other_versions)(package)
    manifest = json.loads((package / MANIFEST).read_text())
    others = {identifier: f"id {n}" for n, identifier in enumerate(manifest["itemInfoEntries"])}
    entries = {others[old]: item for old, item in manifest["itemInfoEntries"].items()}
    root = others[manifest["rootModelIdentifier"]]
    manifest |= {"itemInfoEntries": entries, "rootModelIdentifier": root}
    (package / MANIFEST).write_text(json.dumps(manifest, sort_keys=True))
    assert list(backend.differences(*pair)) == []


def named_as_a_version(spec: Any) -> None:
    """What is left out in one place counts in every other."""
    added = operation(spec, "silu_0").attributes
    for name in ("buildInfo", "com.github.apple.coremltools.version", "versionString"):
        added[name].CopyFrom(added["name"])
    spec.description.metadata.userDefined["buildInfo"] = "1"
    spec.mlProgram.functions["buildInfo"].opset = "1"


def test_only_the_fields_of_versions_are_left_out(pair: tuple[Artifact, Artifact]) -> None:
    changed(named_as_a_version)(pair[0].path / backend.FILE_NAME)
    assert sorted(backend.differences(*pair)) == [
        ("description", "metadata.userDefined.buildInfo is extra"),
        ("mlProgram", "buildInfo is extra"),
        ("prefill: op silu_0", "buildInfo is extra"),
        ("prefill: op silu_0", "com.github.apple.coremltools.version is extra"),
        ("prefill: op silu_0", "versionString is extra"),
    ]


def reorder(package: Path) -> None:
    """Write the constants of the weight file in reverse order."""
    opened, content = open_package(package), (package / WEIGHTS).read_bytes()
    values = [
        value
        for name in opened.functions
        for one in opened.block(name).operations
        for value in (
            *one.attributes.values(),
            *(given.arguments[0].value for given in one.inputs.values()),
        )
        if place_of(value)
    ]
    moved, made = dict[int, int](), bytearray(content[:64])
    for offset in sorted({value.blobFileValue.offset for value in values}, reverse=True):
        kind, size, start, padding = struct.unpack_from("<IQQQ", content, offset + 4)
        moved[offset] = len(made)
        made += struct.pack("<IIQQQ", 0xDEADBEEF, kind, size, len(made) + 64, padding).ljust(
            64, b"\0"
        )
        made += content[start : start + size].ljust(-(-size // 64) * 64, b"\0")
    for value in values:
        value.blobFileValue.offset = moved[value.blobFileValue.offset]
    (package / WEIGHTS).write_bytes(made)
    (package / MODEL).write_bytes(opened.spec.SerializeToString(deterministic=True))


def test_the_order_in_the_weight_file_does_not_matter(pair: tuple[Artifact, Artifact]) -> None:
    reorder(pair[0].path / backend.FILE_NAME)
    found, expected = ((one.path / backend.FILE_NAME / WEIGHTS).read_bytes() for one in pair)
    assert found != expected
    assert list(backend.differences(*pair)) == []
    the_table(pair[0].path / backend.FILE_NAME)
    assert [place for place, _ in backend.differences(*pair)] == [
        "decode: rope_cos",
        "prefill: rope_cos",
    ]


@pytest.mark.parametrize(
    "damage",
    [
        lambda package: (package / MODEL).write_bytes(b"\xff" * 99),
        lambda package: (package / MANIFEST).write_text("[" * 9),
        lambda package: (package / WEIGHTS).write_bytes(b""),
        lambda package: (package / WEIGHTS).unlink(),
        changed(lambda spec: operations(spec)[0].attributes["val"].type.Clear()),
        changed(lambda spec: operations(spec)[0].attributes["val"].immediateValue.tensor.Clear()),
    ],
    ids=["model", "manifest", "empty weights", "no weights", "no type", "no tensor"],
)
def test_a_damaged_package_is_an_input_error_or_a_difference(
    damage: Damage, pair: tuple[Artifact, Artifact]
) -> None:
    damage(pair[0].path / backend.FILE_NAME)
    try:
        found = list(backend.differences(*pair))
    except InputError:
        return
    assert found != []


def test_no_flipped_bit_of_the_program_goes_unnoticed(pair: tuple[Artifact, Artifact]) -> None:
    """Each is found, or names what cannot be read, or was in a version that is left out."""
    path = pair[0].path / backend.FILE_NAME / MODEL
    content = path.read_bytes()
    unnoticed = list[int]()
    for place in np.random.default_rng(0).integers(0, len(content), 60).tolist():
        flip(path, place, bit=place % 8)
        try:
            if not any(True for _ in backend.differences(*pair)):
                unnoticed.append(place)
        except InputError:
            pass
        path.write_bytes(content)
    assert unnoticed == []
