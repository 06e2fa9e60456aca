"""A GGUF file that was tampered with, checksums aside: what differs is named, or it is refused."""

import random
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import NANO
from gguf import GGMLQuantizationType, GGUFValueType
from lowering import Lowered, differences, failed_integers

from exporter import pipeline
from exporter.backends import gguf as backend
from exporter.backends.gguf.contents import Contents, open_contents
from exporter.errors import InputError
from exporter.model.checkpoint import open_checkpoint
from exporter.pipeline import no_progress
from exporter.recipe import parse_recipe

Q_PROJ, NORM = "blk.1.attn_q.weight", "output_norm.weight"
INT4 = {"linear": "int4-g32", "embedding": "int4-g32"}


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """The demo, with its tokenizer."""
    folder = tmp_path_factory.mktemp("gguf")
    raw = {"name": "t", "quantization": INT4, "targets": [{"target": "gguf", "max_context": 64}]}
    recipe = parse_recipe(raw, "t")
    quantized = pipeline.quantize(recipe, open_checkpoint(NANO), folder / "q", no_progress)
    assert quantized is not None
    return quantized, pipeline.lower(quantized, recipe.targets[0], folder / "a", no_progress)


class Parts:
    """The metadata and the tensors of a file, which may be changed and are written again."""

    def __init__(self, contents: Contents) -> None:
        self.metadata: dict[str, tuple[Any, GGUFValueType, GGUFValueType | None]] = {}
        for key, value in contents.metadata.items():
            plain, kind = value.value, value.type
            if isinstance(plain, np.ndarray):
                plain = plain.tolist()
            if kind.startswith("["):
                entries = GGUFValueType[kind.strip("[]")]
                self.metadata[key] = plain, GGUFValueType.ARRAY, entries
            else:
                self.metadata[key] = plain, GGUFValueType[kind], None
        self.tensors = {
            name: (one.type, one.shape, np.array(contents.bytes_of(name)))
            for name, one in contents.tensors.items()
        }

    def set(self, key: str, value: Any) -> None:
        self.metadata[key] = (value, *self.metadata[key][1:])

    def write(self, path: Path) -> None:
        writer = gguf.GGUFWriter(path, "replaced below")
        writer.kv_data = [{}]
        for key, (value, kind, entries) in self.metadata.items():
            writer.add_key_value(key, value, kind, entries)
        if "general.alignment" in self.metadata:
            writer.data_alignment = self.metadata["general.alignment"][0]
        for name, (kind, shape, data) in self.tensors.items():
            writer.add_tensor_info(name, shape, np.dtype("f4"), data.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for *_, data in self.tensors.values():
            writer.write_tensor_data(data)
        writer.close()


Change = Callable[[Parts], object]


def changed(lowered: Lowered, change: Change, folder: Path) -> Path:
    parts = Parts(open_contents(lowered[1].artifact.path / "model.gguf"))
    change(parts)
    folder.mkdir()
    parts.write(folder / "model.gguf")
    return folder


def replace_token(parts: Parts) -> None:
    parts.metadata["tokenizer.ggml.tokens"][0][40] = b"EVIL"


def fuse_weights(parts: Parts) -> None:
    """llama.cpp reads one tensor of queries, keys and values if there is one."""
    three = [parts.tensors[f"blk.0.attn_{which}.weight"] for which in "qkv"]
    rows, width = sum(one[1][0] for one in three), three[0][1][1]
    data = np.concatenate([one[2] for one in three])
    parts.tensors["blk.0.attn_qkv.weight"] = three[0][0], (rows, width), data


def store_as_floats(parts: Parts) -> None:
    """The same values as floats: another product, without rounded activations."""
    kind, shape, data = parts.tensors[Q_PROJ]
    values = gguf.dequantize(data.reshape(shape[0], -1), kind)
    parts.tensors[Q_PROJ] = GGMLQuantizationType.F32, shape, values.view(np.uint8).reshape(-1)


def change_a_norm(parts: Parts) -> None:
    parts.tensors[NORM][2].view(np.float32)[5] = 3


def transpose(parts: Parts) -> None:
    kind, (rows, width), data = parts.tensors["blk.0.ffn_up.weight"]
    parts.tensors["blk.0.ffn_up.weight"] = kind, (width, rows), data


TAMPERINGS: Mapping[str, tuple[Change, list[str]]] = {
    "the family": (
        lambda parts: parts.set("general.architecture", "llama"),
        ["metadata.general.architecture.value: is 'llama', not 'qwen3'"],
    ),
    "epsilon": (
        lambda parts: parts.set("qwen3.attention.layer_norm_rms_epsilon", 2e-5),
        ["metadata.qwen3.attention.layer_norm_rms_epsilon.value: is 2e-05, not 1e-05"],
    ),
    "RoPE": (
        lambda parts: parts.set("qwen3.rope.freq_base", 1e4),
        ["metadata.qwen3.rope.freq_base.value: is 10000.0, not 8e+06"],
    ),
    "scaled RoPE": (
        lambda parts: parts.metadata.update(
            {"qwen3.rope.scaling.type": ("yarn", GGUFValueType.STRING, None)}
        ),
        ["metadata.qwen3.rope.scaling.type: is not in the derived model"],
    ),
    "a type": (
        lambda parts: parts.metadata.update(
            {"qwen3.block_count": (6, GGUFValueType.UINT64, None)}
        ),
        ["metadata.qwen3.block_count.type: is 'UINT64', not 'UINT32'"],
    ),
    "a missing key": (
        lambda parts: parts.metadata.pop("tokenizer.ggml.eos_token_id"),
        ["metadata.tokenizer.ggml.eos_token_id: is missing"],
    ),
    "a token": (replace_token, ["metadata.tokenizer.ggml.tokens.value[40]: is b'EVIL', not "]),
    "the template": (
        lambda parts: parts.set("tokenizer.chat_template", "{{ 'EVIL' }}"),
        ["metadata.tokenizer.chat_template.value: is \"{{ 'EVIL' }}\", not "],
    ),
    "an override": (
        lambda parts: parts.metadata.update(
            {"general.sampling.temp": (2.0, GGUFValueType.FLOAT32, None)}
        ),
        ["metadata.general.sampling.temp: is not in the derived model"],
    ),
    "a fused weight": (
        fuse_weights, ["tensors.blk.0.attn_qkv.weight: is not in the derived model"]
    ),
    "floats": (
        store_as_floats,
        [
            f"tensors.{Q_PROJ}.type: is 'F32', not 'Q4_0'",
            f"tensors.{Q_PROJ}.data: has values of type float32, not uint8",
        ],
    ),
    "a norm": (
        change_a_norm,
        [f"tensors.{NORM}.data: 1 of 192 values differ, first at [5]: 3.0, not "],
    ),
    "a shape": (transpose, ["tensors.blk.0.ffn_up.weight.shape[0]: is 192, not 512"]),
    "a missing tensor": (
        lambda parts: parts.tensors.pop("blk.5.attn_k_norm.weight"),
        ["tensors.blk.5.attn_k_norm.weight: is missing"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_tampered_file_is_named(name: str, lowered: Lowered, tmp_path: Path) -> None:
    change, expected = TAMPERINGS[name]
    found = differences(lowered, changed(lowered, change, tmp_path / "tampered"))
    for text in expected:
        assert any(text in line for line in found), found[:10]
    assert len(found) <= len(expected) + 2, found


@pytest.mark.parametrize(
    ("change", "notes"),
    [
        (fuse_weights, ["model.gguf: blk.0.attn_qkv.weight: is no weight of the checkpoint"]),
        (store_as_floats, [f"({Q_PROJ}): one is quantized, the other is not"]),
        (transpose, ["up_proj.weight (blk.0.ffn_up.weight): codes have shape [192, 512], not"]),
        (
            lambda parts: parts.set("general.architecture", "llama"),
            ["general.architecture: is 'llama', not 'qwen3'", "q_proj.weight: is not in the"],
        ),
        (
            lambda parts: parts.tensors.update(
                {"output.weight": (*parts.tensors["token_embd.weight"][:2], zeros(parts))}
            ),
            ["model.embed_tokens.weight (output.weight): "],
        ),
    ],
)
def test_a_weight_is_decoded_as_llama_cpp_reads_it(
    change: Change, notes: list[str], lowered: Lowered, tmp_path: Path
) -> None:
    found = failed_integers(lowered, changed(lowered, change, tmp_path / "tampered"))
    for note in notes:
        assert any(note in line for line in found), found[:5]


def zeros(parts: Parts) -> np.ndarray:
    """An output layer of its own, of codes that are all -8."""
    return np.zeros_like(parts.tensors["token_embd.weight"][2])


def test_the_same_content_in_another_order_does_not_differ(
    lowered: Lowered, tmp_path: Path
) -> None:
    def reverse(parts: Parts) -> None:
        parts.metadata = dict(reversed(parts.metadata.items()))
        parts.tensors = dict(reversed(parts.tensors.items()))

    folder = changed(lowered, reverse, tmp_path / "moved")
    path = folder / "model.gguf"
    path.write_bytes(path.read_bytes() + bytes(999))
    assert differences(lowered, folder) == []
    assert failed_integers(lowered, folder) == []
    own = [
        backend.load(replace(lowered[1].artifact, path=where)).prefill([5, 6, 7])
        for where in (folder, lowered[1].artifact.path)
    ]
    assert own[0].equal(own[1])


def test_another_alignment_is_named_and_read(lowered: Lowered, tmp_path: Path) -> None:
    def align(parts: Parts) -> None:
        parts.metadata["general.alignment"] = (256, GGUFValueType.UINT32, None)

    folder = changed(lowered, align, tmp_path / "aligned")
    assert differences(lowered, folder) == [
        "metadata.general.alignment: is not in the derived model"
    ]
    assert failed_integers(lowered, folder) == []


def test_a_flipped_bit_is_named_refused_or_in_the_padding(lowered: Lowered, tmp_path: Path) -> None:
    """All over the file, and densely over the header, which ends where the data begin."""
    path, rng = tmp_path / "model.gguf", random.Random(0)
    shutil.copy(lowered[1].artifact.path / "model.gguf", path)
    contents, data = open_contents(path), bytearray(path.read_bytes())
    used = np.zeros(len(data), bool)
    for tensor in contents.tensors.values():
        used[tensor.offset : tensor.offset + tensor.bytes] = True
    begin = min(tensor.offset for tensor in contents.tensors.values())
    used[: begin - 32] = True  # padding is shorter than the alignment
    header_only = [rng.randrange(begin) for _ in range(300)]
    everywhere = [rng.randrange(len(data)) for _ in range(60)]
    outcomes = Counter[str]()
    for offset in header_only + everywhere:
        bit = 1 << rng.randrange(8)
        data[offset] ^= bit
        path.write_bytes(data)
        try:
            outcome = "named" if differences(lowered, tmp_path) else "without effect"
        except InputError:
            outcome = "refused"
        data[offset] ^= bit
        outcomes[outcome] += 1
        assert outcome != "without effect" or not used[offset], offset
    assert outcomes["named"] > 100 and outcomes["refused"] > 50, outcomes


# Files that are no model, or that ask for too much.

HEAD = b"GGUF" + struct.pack("<I", 3)


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def header(tensors: int, keys: int, rest: bytes = b"") -> bytes:
    return HEAD + struct.pack("<QQ", tensors, keys) + rest


def tensor_entry(name: bytes, shape: list[int], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is not a GGUF file"),
        (b"GGUF", "is not a GGUF file"),
        (b"\xff" * 999, "is not a GGUF file"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(64), "has version 50331648"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(64), "has version 1"),
        (header(2**63, 0), "tensors; the limit is"),
        (header(0, 2**63), "keys; the limit is"),
        (header(0, 1, struct.pack("<Q", 2**62)), "bytes in the name of key 0; the limit is"),
        (header(0, 1, text(b"k") + struct.pack("<IQ", 8, 2**40)), "bytes in k; the limit is"),
        (header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 8, 2**50)), "texts in k and before it"),
        (header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 8, 2**20)), "bytes of k are missing"),
        (header(0, 1, text(b"k") + struct.pack("<IIQQ", 9, 8, 1, 2**63)), "of k are missing"),
        (header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 10, 2**60)), "entries in k; the limit"),
        (header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 10, 2**20)), "bytes of k are missing"),
        (header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 9, 1)), "is an array of arrays"),
        (header(0, 1, text(b"k") + struct.pack("<II", 77, 0)), "has the unknown type 77"),
        (header(0, 2, (text(b"k") + struct.pack("<IB", 7, 1)) * 2), "has the key 'k' twice"),
        (header(2, 0, tensor_entry(b"t", [8], 0, 0) * 2), "has the tensor 't' twice"),
        (header(1, 0, tensor_entry(b"t", [8], 4, 0)), "has the unknown type 4"),
        (header(1, 0, tensor_entry(b"t", [8, 8], 2, 0)), "no whole blocks of 32"),
        (header(1, 0, tensor_entry(b"t", [1] * 5, 0, 0)), "5 dimensions of t; the limit is 4"),
        (header(1, 0, tensor_entry(b"t", [2**63], 0, 0)), "numbers in a row of t; the limit is"),
        (header(1, 0, tensor_entry(b"t", [2**30] * 4, 0, 0)), "lies beyond the end of the file"),
        (header(1, 0, tensor_entry(b"t", [8], 0, 32)), "lies at offset 32, not 0"),
        (header(1, 0, tensor_entry(b"t", [8], 0, 2**63)), "lies at offset 9223372036854775808"),
        (
            header(1, 1, text(b"general.alignment") + struct.pack("<II", 4, 0)
                   + tensor_entry(b"t", [8], 0, 0)),
            "is 0, not a power of two",
        ),
        (
            header(1, 1, text(b"general.alignment") + struct.pack("<II", 4, 2**31)
                   + tensor_entry(b"t", [8], 0, 0)),
            "is 2147483648, not a power of two",
        ),
    ],
)  # fmt: skip
def test_what_is_no_model_is_refused(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        backend.inspect(path)
    assert problem in raised.value.problem, raised.value


def test_a_missing_file_and_a_link_out_of_its_folder_are_refused(
    lowered: Lowered, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no such file"):
        backend.inspect(tmp_path / "model.gguf")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "model.gguf").symlink_to(lowered[1].artifact.path / "model.gguf")
    with pytest.raises(InputError, match="leads out of its folder"):
        differences(lowered, tmp_path / "inner")


def test_a_truncated_file_is_refused_at_every_length(lowered: Lowered, tmp_path: Path) -> None:
    data = (lowered[1].artifact.path / "model.gguf").read_bytes()
    rng, path = random.Random(1), tmp_path / "model.gguf"
    for length in [0, 23, 24, len(data) - 1, *(rng.randrange(len(data)) for _ in range(40))]:
        path.write_bytes(data[:length])
        with pytest.raises(InputError):
            open_contents(path)
