"""Writing the files of an ONNX artifact, reading its weights back, and running it."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto
from torch import Tensor

from exporter.backends import Artifact
from exporter.backends.onnx import (
    DATA_NAME,
    FILE_NAME,
    GENAI_CONFIG,
    OPERATORS_NAME,
    ORT_NAME,
    Target,
)
from exporter.backends.onnx.forms import ContribForm, PortableForm, build
from exporter.backends.onnx.graph import OnnxGraph
from exporter.backends.onnx.layout import StoredWeight
from exporter.errors import InputError
from exporter.files import copy_file, replacing, write_json
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.quantization.schemes import QuantizedTensor


def lower(quantized: QuantizedCheckpoint, target: Target, out: Path) -> Artifact:
    """Write model.onnx, its data file and genai_config.json, and the .ort pair on request."""
    with replacing(out / DATA_NAME) as data:
        graph = OnnxGraph(DATA_NAME, data)
        form = ContribForm if target.form == "contrib" else PortableForm
        build(graph, form(graph, quantized, target), quantized.config)
    model = graph.model(form.opset, _metadata(quantized, target))
    with replacing(out / FILE_NAME) as file:
        file.write(model.SerializeToString(deterministic=True))
    files = [FILE_NAME, DATA_NAME]
    if target.form == "contrib":
        write_json(out / GENAI_CONFIG, _genai_config(quantized, target))
        files.append(GENAI_CONFIG)
    if target.ort:
        files += _write_ort(out)
    return Artifact(out, target, tuple(files))


def _metadata(quantized: QuantizedCheckpoint, target: Target) -> dict[str, str]:
    return {
        "bos_token_id": json.dumps(quantized.bos_token_id),
        "eos_token_ids": json.dumps(list(quantized.eos_token_ids)),
        "max_context": str(target.max_context),
    }


def _genai_config(quantized: QuantizedCheckpoint, target: Target) -> dict[str, Any]:
    """What onnxruntime-genai needs; the type only picks its decoder-only loop."""
    config, ends = quantized.config, list(quantized.eos_token_ids)
    end = ends[0] if ends else 0
    return {
        "model": {
            "type": "llama",
            "bos_token_id": quantized.bos_token_id if quantized.bos_token_id is not None else end,
            "eos_token_id": ends or end,
            "pad_token_id": end,
            "context_length": target.max_context,
            "vocab_size": config.vocab_size,
            "decoder": {
                "filename": FILE_NAME,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "hidden_size": config.hidden_size,
                "head_size": config.head_dim,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": config.num_key_value_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "max_length": target.max_context,
            "do_sample": False,
            "num_beams": 1,
            "past_present_share_buffer": True,
        },
    }


def _write_ort(out: Path) -> list[str]:
    """The .ort form of the model, and the operators that a reduced build of the runtime needs."""
    converter = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort"]
    options = ["--optimization_style", "Fixed", "--target_platform", "arm", "--output_dir"]
    with tempfile.TemporaryDirectory() as scratch:  # not in `out`, where a kill would leave it
        command = [*converter, *options, scratch, str(out / FILE_NAME)]
        result = subprocess.run(
            [*_without_address_randomization(), *command],
            check=False,
            capture_output=True,
            text=True,
        )
        if result.returncode:
            reason = (result.stderr.strip() or "no message").splitlines()[-1]
            raise InputError(FILE_NAME, f"ONNX Runtime cannot convert it to .ort ({reason})")
        copy_file(Path(scratch) / ORT_NAME, out / ORT_NAME)
        lines = (Path(scratch) / OPERATORS_NAME).read_text().splitlines(keepends=True)
        with replacing(out / OPERATORS_NAME) as file:  # the comments name the scratch folder
            file.write("".join(line for line in lines if not line.startswith("#")).encode())
    return [ORT_NAME, OPERATORS_NAME]


def _without_address_randomization() -> list[str]:
    """The converter writes a table in the order of a hash that is seeded with an address: with
    fixed addresses (where the system allows it) two runs give the same bytes."""
    prefix = ["setarch", "--addr-no-randomize"]
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return prefix


def weights(
    artifact: Artifact, quantized: QuantizedCheckpoint
) -> Iterator[tuple[str, str, QuantizedTensor | Tensor]]:
    """Every weight decoded out of the model and its data file: name, place, codes and scales.

    Weights that share one product are taken apart; a tied embedding is given as the table that
    is looked up and as the filter of the output layer.
    """
    model = onnx.load(str(artifact.path / FILE_NAME), load_external_data=False)
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    data = artifact.path / DATA_NAME

    def content(name: str) -> bytes:
        return _content(found[name], data)

    for stored, tensor in found.items():
        base = stored.removesuffix(".transposed")
        names = tuple(base.split("+"))
        if not all(name in quantized.schemes for name in names):
            continue
        like = [quantized.read(name) for name in names]
        if not all(isinstance(weight, QuantizedTensor) for weight in like):
            array = np.frombuffer(content(stored), _numpy_type(tensor))
            value = torch.from_numpy(array.astype(np.float32)).view(*tensor.dims)
            yield base, "float", value.t().contiguous() if stored != base else value
            continue
        scales = np.frombuffer(content(f"{base}.scales"), _numpy_type(found[f"{base}.scales"]))
        yield from _taken_apart(tensor, content(stored), scales, names, quantized)
        table = f"{stored}.table"
        if table in found:
            read = _taken_apart(tensor, content(table), scales, names, quantized)
            yield from ((name, "table", weight) for name, _, weight in read)


def _taken_apart(
    tensor: TensorProto,
    content: bytes,
    scales: np.ndarray,
    names: tuple[str, ...],
    quantized: QuantizedCheckpoint,
) -> Iterator[tuple[str, str, QuantizedTensor]]:
    """The weights that lie in one tensor, one after the other along their outputs."""
    shapes = [quantized.config.parameter_shapes()[name] for name in names]
    total, columns = sum(shape[0] for shape in shapes), shapes[0][1]
    codes, layout = np.frombuffer(content, np.uint8), "signed"
    if tensor.name.endswith(".transposed"):
        codes, layout = codes.reshape(columns, total), "transposed"
    else:
        codes = codes.reshape(total, -1)
        layout = "unsigned" if tensor.data_type == TensorProto.UINT8 else "signed"
    by_row, start = scales.reshape(total, -1), 0
    for name, shape in zip(names, shapes, strict=True):
        rows = slice(start, start + shape[0])
        part = codes[:, rows] if layout == "transposed" else codes[rows]
        like = quantized.read(name)
        assert isinstance(like, QuantizedTensor)
        yield name, "filter", StoredWeight(layout, part.tobytes(), by_row[rows]).decode(like)
        start += shape[0]


def _content(tensor: TensorProto, data: Path) -> bytes:
    if tensor.data_location != TensorProto.EXTERNAL:
        return tensor.raw_data
    place = {entry.key: entry.value for entry in tensor.external_data}
    if place["location"] != data.name:
        raise InputError(tensor.name, f"lies in {place['location']!r}, not in {data.name}")
    with data.open("rb") as file:
        file.seek(int(place["offset"]))
        content = file.read(int(place["length"]))
    if len(content) != int(place["length"]):
        raise InputError(tensor.name, f"ends beyond the end of {data.name}")
    return content


def _numpy_type(tensor: TensorProto) -> type[np.floating[Any]]:
    return np.float16 if tensor.data_type == TensorProto.FLOAT16 else np.float32


class OnnxRunner:
    """The model in ONNX Runtime; keys and values stay in buffers of the whole context."""

    def __init__(self, folder: Path, context: int) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(
            folder / FILE_NAME, options, providers=["CPUExecutionProvider"]
        )
        self._context, self._position = context, 0
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._shared = "attention_mask" in self._inputs
        self._past = self._empty_cache()

    @property
    def context(self) -> int:
        return self._context

    @property
    def vocab_size(self) -> int:
        return int(self._session.get_outputs()[0].shape[-1])

    def prefill(self, tokens: list[int]) -> Tensor:
        self._position = 0
        if not self._shared:
            self._past = self._empty_cache()
        return self._step(tokens)

    def decode(self, token: int) -> Tensor:
        return self._step([token])

    def _empty_cache(self) -> dict[str, Any]:
        """`contrib` writes into the whole context, `portable` gives a longer cache each time."""
        cache = {}
        for name, value in self._inputs.items():
            if name.startswith("past_key_values."):
                _, heads, _, head_dim = value.shape
                length = self._context if self._shared else 0
                kind = np.float16 if "float16" in value.type else np.float32
                cache[name] = onnxruntime.OrtValue.ortvalue_from_numpy(
                    np.zeros((1, heads, length, head_dim), kind)
                )
        return cache

    def _step(self, tokens: list[int]) -> Tensor:
        end = self._position + len(tokens)
        if end > self._context:
            raise InputError(
                "context", f"{end} tokens do not fit into {self._context}", "Lower with more"
            )
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.array([tokens], np.int64))
        if self._shared:
            binding.bind_cpu_input("attention_mask", np.ones((1, end), np.int64))
        binding.bind_output("logits")
        for name, value in self._past.items():
            binding.bind_ortvalue_input(name, value)
            present = name.replace("past_key_values", "present")
            if self._shared:
                binding.bind_ortvalue_output(present, value)
            else:
                binding.bind_output(present)
        self._session.run_with_iobinding(binding)
        outputs = dict(zip(self._output_names(), binding.get_outputs(), strict=True))
        if not self._shared:
            self._past = {
                name: outputs[name.replace("past_key_values", "present")] for name in self._past
            }
        self._position = end
        return torch.from_numpy(outputs["logits"].numpy()[0, -1].astype(np.float32))

    def _output_names(self) -> list[str]:
        """In the order in which they were bound."""
        return ["logits", *(name.replace("past_key_values", "present") for name in self._past)]
