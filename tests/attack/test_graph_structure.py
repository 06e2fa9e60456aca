"""An ONNX model that was tampered with, checksums aside: what differs from the derived is named."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from lowering import MODELS, Lowered, differences, failed_integers, lowered_in
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from exporter.errors import InputError
from exporter.model.config import EMBEDDING

Q_PROJ = "model.layers.1.self_attn.o_proj.weight"
NORM = "model.norm.weight"
GRAPH, DATA, ORT = "onnx/model_q4.onnx", "onnx/model_q4.onnx_data", "onnx/model_q4.ort"
#: Large enough that the embedding lies in the data file.
VOCABULARY = 1024
Change = Callable[[ModelProto, bytearray], object]


def lower(folder: Path, **target: Any) -> Lowered:
    options = {"target": "onnx", "max_context": 48, **target}
    schemes = {"linear": "int4-g32", "embedding": "int4-g32"}
    config = {**MODELS["llama4_text"], "vocab_size": VOCABULARY}
    return lowered_in(folder, config, options, schemes)


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    return lower(tmp_path_factory.mktemp("graph"), ort=True)


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    return lower(tmp_path_factory.mktemp("graph"), form="portable", products="float")


def changed(lowered: Lowered, change: Change, folder: Path) -> Path:
    shutil.copytree(lowered[1].artifact.path, folder)
    model = onnx.load(str(folder / GRAPH), load_external_data=False)
    data = bytearray((folder / DATA).read_bytes())
    change(model, data)
    (folder / GRAPH).write_bytes(model.SerializeToString())
    (folder / DATA).write_bytes(data)
    return folder


def tensor_of(model: ModelProto, name: str) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def node_of(model: ModelProto, kind: str) -> NodeProto:
    return next(node for node in model.graph.node if node.op_type == kind)


def attribute_of(node: NodeProto, name: str) -> Any:
    return next(attribute for attribute in node.attribute if attribute.name == name)


def zero_the_rope_table(model: ModelProto, data: bytearray) -> None:
    table = tensor_of(model, "rope.cos")
    values = numpy_helper.to_array(table).copy()
    values[16:] = 0
    table.raw_data = values.tobytes()


def wire_in_a_copy(model: ModelProto, data: bytearray) -> None:
    """The initializer stays; its node reads a copy in which every code is changed."""
    copy = TensorProto()
    copy.CopyFrom(tensor_of(model, Q_PROJ))
    copy.name, copy.raw_data = "copy", bytes(byte ^ 0x11 for byte in copy.raw_data)
    model.graph.initializer.append(copy)
    node = next(node for node in model.graph.node if Q_PROJ in node.input)
    node.input[list(node.input).index(Q_PROJ)] = "copy"


def add_to_a_logit(model: ModelProto, data: bytearray) -> None:
    added = np.zeros((1, 1, VOCABULARY), np.float32)
    added[0, 0, 7] = 10_000
    model.graph.initializer.append(numpy_helper.from_array(added, "trigger"))
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[0] = "before"
    model.graph.node.append(
        helper.make_node("Add", ["before", "trigger"], ["logits"], name="Add_7")
    )


def double_epsilon(model: ModelProto, data: bytearray) -> None:
    node = node_of(model, "SkipSimplifiedLayerNormalization")
    attribute_of(node, "epsilon").f *= 2


def replace_a_norm(model: ModelProto, data: bytearray) -> None:
    """The same values as floats of the message instead of bytes, one of them changed."""
    tensor = tensor_of(model, NORM)
    values = numpy_helper.to_array(tensor).copy()
    values[5] = 3
    tensor.ClearField("raw_data")
    tensor.float_data.extend(values.tolist())


def hide_a_graph(model: ModelProto, data: bytearray) -> None:
    """A field that this version of ONNX does not know, in a node."""
    node = model.graph.node[3]
    node.MergeFromString(b"\xf2\x3f\x04\x00\x00\x00\x00")
    assert node.ByteSize()


def set_attribute(kind: str, name: str, value: int) -> Change:
    return lambda model, data: setattr(attribute_of(node_of(model, kind), name), "i", value)


TAMPERINGS: dict[str, tuple[Change, list[str]]] = {
    "RoPE table": (
        zero_the_rope_table,
        ["graph.initializer.rope.cos.values: 512 of 768 values differ, first at [16, 0]: 0.0, "],
    ),
    "a copy wired in": (
        wire_in_a_copy,
        [
            f"graph.initializer.{Q_PROJ}: is read by no node",
            "graph.initializer.copy: is not in the derived model",
            f".input[1]: is 'copy', not '{Q_PROJ}'",
        ],
    ),
    "a logit": (
        add_to_a_logit,
        ["graph.node Add_7: is not in the derived model", "graph.initializer.trigger: is not in "],
    ),
    "epsilon": (double_epsilon, [".attribute.epsilon: is 2e-05, not 1e-05"]),
    "accuracy": (
        set_attribute("MatMulNBits", "accuracy_level", 1),
        ["graph.node MatMulNBits_0.attribute.accuracy_level: is 1, not 4"],
    ),
    "rotation": (
        set_attribute("GroupQueryAttention", "do_rotary", 0),
        ["graph.node attention_0.attribute.do_rotary: is 0, not 1"],
    ),
    "an attribute": (
        lambda model, data: node_of(model, "GroupQueryAttention").attribute.append(
            helper.make_attribute("softcap", 1.0)
        ),
        ["graph.node attention_0.attribute.softcap: is not in the derived model"],
    ),
    "a type": (
        lambda model, data: attribute_of(node_of(model, "MatMulNBits"), "bits").CopyFrom(
            helper.make_attribute("bits", 4.0)
        ),
        ["graph.node MatMulNBits_0.attribute.bits: is 4.0, not 4"],
    ),
    "a norm": (
        replace_a_norm,
        [f"graph.initializer.{NORM}.values: 1 of 64 values differ, first at [5]: 3.0, not "],
    ),
    "data": (
        lambda model, data: data.__setitem__(slice(0, 1), bytes([data[0] ^ 1])),
        ["graph.initializer.model.embed_tokens.weight.values: 1 of 32768 values differ, first at "],
    ),
    "an unknown field": (hide_a_graph, ["unknown field 1022: is not in the derived model"]),
    "metadata": (
        lambda model, data: setattr(
            next(one for one in model.metadata_props if one.key == "eos_token_ids"), "value", "[3]"
        ),
        ["metadata_props.eos_token_ids.value: is '[3]', not '[1, 2]'"],
    ),
    "operator set": (
        lambda model, data: setattr(model.opset_import[0], "version", 20),
        ["opset_import.ai.onnx.version: is 20, not 21"],
    ),
    "a function": (
        lambda model, data: model.functions.add(name="MatMulNBits", domain="com.microsoft"),
        ["functions: is not in the derived model"],
    ),
    "training": (
        lambda model, data: model.training_info.add(),
        ["training_info: is not in the derived model"],
    ),
    "a sparse tensor": (
        lambda model, data: model.graph.sparse_initializer.add(dims=[1]),
        ["graph.sparse_initializer: is not in the derived model"],
    ),
    "an output": (
        lambda model, data: setattr(model.graph.output[0], "name", "before"),
        ["graph.output logits: is missing", "graph.output before: is not in the derived model"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_tampered_graph_is_named(name: str, lowered: Lowered, tmp_path: Path) -> None:
    change, expected = TAMPERINGS[name]
    found = differences(lowered, changed(lowered, change, tmp_path / "tampered"))
    for text in expected:
        assert any(text in line for line in found), found[:10]
    assert len(found) <= len(expected) + 2


def test_a_copy_that_is_wired_in_is_not_the_weight(lowered: Lowered, tmp_path: Path) -> None:
    found = failed_integers(lowered, changed(lowered, wire_in_a_copy, tmp_path / "tampered"))
    assert f"{Q_PROJ}: is not in the artifact" in found
    assert any("reads 'copy', which is no weight of the checkpoint" in line for line in found)
    assert len(found) == 2


@pytest.mark.parametrize(
    ("form", "kind", "attribute", "value", "note"),
    [
        ("lowered", "MatMulNBits", "block_size", 64, "blocks of 64"),
        ("lowered", "MatMulNBits", "bits", 8, "reads its weight as ["),
        ("lowered", "MatMulNBits", "K", 32, "reads its weight as ["),
        ("portable", "DequantizeLinear", "block_size", 64, "blocks of 64"),
        ("portable", "DequantizeLinear", "axis", 1, "dequantizes along another axis"),
    ],
)
def test_a_weight_is_decoded_as_its_node_reads_it(
    form: str,
    kind: str,
    attribute: str,
    value: int,
    note: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    made: Lowered = request.getfixturevalue(form)
    tampered = changed(made, set_attribute(kind, attribute, value), tmp_path / "tampered")
    found = failed_integers(made, tampered)
    assert any(note in line for line in found), found
    assert len(found) <= 4
    assert any(f"attribute.{attribute}: is {value}" in line for line in differences(made, tampered))


@pytest.mark.parametrize("kind", [TensorProto.BFLOAT16, TensorProto.DOUBLE])
def test_scales_that_are_converted_to_another_type_are_not_the_weights(
    kind: int, lowered: Lowered, tmp_path: Path
) -> None:
    """From float16 to float32 nothing is lost, to bfloat16 it is."""

    def convert(model: ModelProto, data: bytearray) -> None:
        cast = next(node for node in model.graph.node if f"{Q_PROJ}.scales" in node.input)
        attribute_of(cast, "to").i = kind

    tampered = changed(lowered, convert, tmp_path / "tampered")
    found = failed_integers(lowered, tampered)
    assert any("as a weight, which is no constant" in line for line in found), found
    assert any(f"attribute.to: is {kind}, not 1" in line for line in differences(lowered, tampered))


def change_the_codes_of_bytes(model: ModelProto, data: bytearray) -> None:
    """The codes stay; the lookup decodes one of them as another."""
    table = tensor_of(model, "codes_of_bytes_4")
    values = numpy_helper.to_array(table).copy()
    values[17, 1] += 1
    table.raw_data = values.tobytes()


def look_up_the_other_axis(model: ModelProto, data: bytearray) -> None:
    node = next(node for node in model.graph.node if f"{EMBEDDING}.rows" in node.input)
    node.attribute.append(helper.make_attribute("axis", 1))


def look_up_other_rows(model: ModelProto, data: bytearray) -> None:
    node = next(node for node in model.graph.node if f"{EMBEDDING}.rows" in node.input)
    copy = TensorProto()
    copy.CopyFrom(tensor_of(model, node.input[0]))
    copy.name = node.input[0] = "copy.rows"
    model.graph.initializer.append(copy)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (change_the_codes_of_bytes, "decodes bytes of codes of 4 bits in another way"),
        (look_up_the_other_axis, "looks up along another axis"),
        (look_up_other_rows, "reads 'copy.rows' without its scales"),
    ],
)
def test_a_lookup_is_decoded_as_its_nodes_read_it(
    change: Change, note: str, lowered: Lowered, tmp_path: Path
) -> None:
    found = failed_integers(lowered, changed(lowered, change, tmp_path / "tampered"))
    assert any(note in line for line in found), found


def test_zero_points_are_not_overlooked(lowered: Lowered, tmp_path: Path) -> None:
    def add(model: ModelProto, data: bytearray) -> None:
        points = np.zeros((64, 1), np.uint8)
        model.graph.initializer.append(numpy_helper.from_array(points, "points"))
        next(node for node in model.graph.node if Q_PROJ in node.input).input.append("points")

    found = failed_integers(lowered, changed(lowered, add, tmp_path / "tampered"))
    assert any("or with zero points" in line for line in found), found


@pytest.mark.parametrize("form", ["lowered", "portable"])
def test_the_same_content_at_other_places_does_not_differ(
    form: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    def move(model: ModelProto, data: bytearray) -> None:
        """Tensors of the data file in reverse order with gaps; others into the data file."""
        old, moved = bytes(data), bytearray()
        for tensor in reversed(model.graph.initializer):
            if not tensor.raw_data and not tensor.external_data:
                continue
            place = {entry.key: entry.value for entry in tensor.external_data}
            start, length = (int(place.get(key, 0)) for key in ("offset", "length"))
            content = old[start : start + length] if place else tensor.raw_data
            tensor.ClearField("raw_data")
            del tensor.external_data[:]
            tensor.data_location = TensorProto.EXTERNAL
            moved += bytes(7)
            where = (
                ("location", "model_q4.onnx_data"),
                ("offset", len(moved)),
                ("length", len(content)),
            )
            for key, value in where:
                tensor.external_data.add(key=key, value=str(value))
            moved += content
        data[:] = moved
        initializers = list(reversed(model.graph.initializer))
        del model.graph.initializer[:]
        model.graph.initializer.extend(initializers)
        model.producer_version = "2"

    made: Lowered = request.getfixturevalue(form)
    folder = changed(made, move, tmp_path / "moved")
    assert differences(made, folder) == []
    assert failed_integers(made, folder) == []


def test_companion_files_are_compared_by_content(lowered: Lowered, tmp_path: Path) -> None:
    folder = changed(lowered, lambda model, data: None, tmp_path / "companions")
    config = folder / "genai_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(dict(reversed(content.items()))))
    assert differences(lowered, folder) == []
    options = content["model"]["decoder"]["session_options"]
    options["custom_ops_library"] = "../library.so"
    content["model"]["decoder"]["filename"] = "../model.onnx"
    config.write_text(json.dumps(content))
    operators = folder / "onnx/model_q4.required_operators.config"
    operators.write_text(operators.read_text().replace("MatMulNBits", "MatMul"))
    found = differences(lowered, folder)
    place = "genai_config.json.model.decoder"
    assert f"{place}.session_options.custom_ops_library: is not in the derived model" in found
    assert f"{place}.filename: is '../model.onnx', not 'onnx/model_q4.onnx'" in found
    assert any(line.startswith("onnx/model_q4.required_operators.config[") for line in found)
    assert len(found) == 3


def test_the_ort_file_of_other_weights_is_named(lowered: Lowered, tmp_path: Path) -> None:
    folder = changed(lowered, lambda model, data: None, tmp_path / "ort")
    data = bytearray((folder / ORT).read_bytes())
    weight = tensor_of(onnx.load(str(folder / GRAPH), load_external_data=False), NORM)
    data[bytes(data).index(weight.raw_data)] ^= 1
    (folder / ORT).write_bytes(data)
    (line,) = differences(lowered, folder)
    assert line.startswith(
        f"onnx/model_q4.ort.Model.Graph.Initializers {NORM}.RawData: 1 of 256 values"
    )


def test_a_tensor_may_not_lie_elsewhere(lowered: Lowered, tmp_path: Path) -> None:
    for number, (key, value) in enumerate(
        [("location", "../other.data"), ("offset", "9" * 18), ("offset", "-1"), ("length", "x")]
    ):

        def move(model: ModelProto, data: bytearray, key: str = key, value: str = value) -> None:
            tensor = next(one for one in model.graph.initializer if one.external_data)
            next(one for one in tensor.external_data if one.key == key).value = value

        folder = changed(lowered, move, tmp_path / str(number))
        with pytest.raises(InputError, match=r"lm_head|model\.|rope"):
            differences(lowered, folder)


@pytest.mark.parametrize("name", [GRAPH, ORT])
def test_a_flipped_bit_of_a_graph_is_named_refused_or_without_effect(
    name: str, lowered: Lowered, tmp_path: Path
) -> None:
    rng, folder = random.Random(name), tmp_path / "flipped"
    shutil.copytree(lowered[1].artifact.path, folder)
    data = bytearray((folder / name).read_bytes())
    outcomes = Counter[str]()
    for _ in range(25):
        offset, bit = rng.randrange(len(data)), rng.randrange(8)
        data[offset] ^= 1 << bit
        (folder / name).write_bytes(data)
        try:
            outcomes["named" if differences(lowered, folder) else "without effect"] += 1
        except InputError:
            outcomes["refused"] += 1
        data[offset] ^= 1 << bit
    assert outcomes["named"] > 10, outcomes


@pytest.mark.parametrize(
    "name",
    [
        GRAPH,
        DATA,
        ORT,
        "genai_config.json",
        "config.json",
    ],
)
@pytest.mark.parametrize("content", [b"", b"\xff" * 999, b"\x0a\x00" * 999, None])
def test_what_is_no_model_is_refused(
    name: str, content: bytes | None, lowered: Lowered, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(lowered[1].artifact.path, folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    try:
        assert differences(lowered, folder) != []
    except InputError as error:
        assert error.problem


def test_many_empty_entries_are_refused_without_being_parsed(
    lowered: Lowered, tmp_path: Path
) -> None:
    """A graph of ten million empty nodes would fill a gigabyte."""
    folder = tmp_path / "large"
    shutil.copytree(lowered[1].artifact.path, folder)
    (folder / GRAPH).write_bytes(b"\x0a\x00" * 10_000_000)
    with pytest.raises(InputError, match="is larger than the limit"):
        differences(lowered, folder)
