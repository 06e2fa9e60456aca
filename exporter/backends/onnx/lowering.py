"""Write the files of an ONNX artifact, read its weights back, and run it."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from exporter.backends import Artifact, check_fits
from exporter.backends.onnx import (
    CHUNK,
    DATA,
    FLOAT_PRODUCTS,
    FOLDER,
    OPERATORS,
    ORT,
    STEMS,
    Target,
)
from exporter.backends.onnx.client_files import client_files
from exporter.backends.onnx.forms import ContribForm, PortableForm
from exporter.backends.onnx.graph import OnnxGraph
from exporter.backends.onnx.ort import in_order
from exporter.backends.onnx.schemes import data_type
from exporter.errors import InputError
from exporter.files import replacing, replacing_folder, write_json
from exporter.model.walk import walk
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint


def lower(quantized: QuantizedCheckpoint, target: Target, out: Path) -> Artifact:
    """Write the graph, its data file, what clients read, and with `ort` the .ort files."""
    kind = data_type(quantized.schemes, target)
    stem = STEMS[kind]
    with replacing_folder(out / FOLDER) as folder:
        written = _write_graph(quantized, target, folder, f"{stem}.onnx")
        if target.ort:
            written += _write_ort(folder, stem)
    graph = f"{FOLDER}/{stem}.onnx"
    written = [f"{FOLDER}/{name}" for name in written]
    for name, content in client_files(quantized, target, kind, graph).items():
        write_json(out / name, content)
        written.append(name)
    return Artifact(out, target, tuple(written))


def _write_graph(
    quantized: QuantizedCheckpoint, target: Target, folder: Path, name: str
) -> list[str]:
    """Write the graph and its data file. Returns their names."""
    with replacing(folder / f"{name}{DATA}") as data:
        graph = OnnxGraph(f"{name}{DATA}", data)
        form = ContribForm if target.form == "contrib" else PortableForm
        walk(quantized.config, form(graph, quantized, target))
    model = graph.model(form.opset, _metadata(quantized, target))
    with replacing(folder / name) as file:
        file.write(model.SerializeToString(deterministic=True))
    return [name, f"{name}{DATA}"]


def _metadata(quantized: QuantizedCheckpoint, target: Target) -> dict[str, str]:
    return {
        "bos_token_id": json.dumps(quantized.bos_token_id),
        "eos_token_ids": json.dumps(list(quantized.eos_token_ids)),
        "max_context": str(target.max_context),
    }


def _write_ort(folder: Path, stem: str) -> list[str]:
    """Write the .ort file, and the list of operators for a reduced build of the runtime."""
    converter = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort"]
    options = ["--optimization_style", "Fixed", "--target_platform", "arm", "--output_dir"]
    graph, model, operators = (f"{stem}{end}" for end in (".onnx", ORT, OPERATORS))
    with tempfile.TemporaryDirectory() as scratch:  # not in `folder`, which would keep all of it
        command = [*converter, *options, scratch, str(folder / graph)]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip() or "no message").splitlines()[-1]
            raise InputError(graph, f"ONNX Runtime cannot convert it to .ort ({reason})")
        with replacing(folder / model) as file:
            file.write(in_order((Path(scratch) / model).read_bytes()))
        lines = (Path(scratch) / operators).read_text().splitlines(keepends=True)
        with replacing(folder / operators) as file:  # the comments name the scratch folder
            file.write("".join(line for line in lines if not line.startswith("#")).encode())
    return [model, operators]


class OnnxRunner:
    """A `Runner` in ONNX Runtime, which reads a prompt in chunks.

    The `contrib` form updates its cache in place.
    """

    def __init__(self, path: Path, context: int) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry(*FLOAT_PRODUCTS)
        self._session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self.context, self._position = context, 0
        self.vocab_size = int(self._session.get_outputs()[0].shape[-1])
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._in_place = "attention_mask" in self._inputs
        self._past = self._empty_cache()

    def prefill(self, tokens: list[int]) -> Tensor:
        self._position = 0
        if not self._in_place:
            self._past = self._empty_cache()
        for start in range(0, len(tokens), CHUNK):
            logits = self._step(tokens[start : start + CHUNK])
        return logits

    def decode(self, token: int) -> Tensor:
        return self._step([token])

    def _empty_cache(self) -> dict[str, Any]:
        """A cache of `context` tokens for `contrib`; an empty one, which grows, for `portable`."""
        cache = {}
        for name, value in self._inputs.items():
            if name.startswith("past_key_values."):
                _, heads, _, head_dim = value.shape
                length = self.context if self._in_place else 0
                kind = np.float16 if "float16" in value.type else np.float32
                cache[name] = onnxruntime.OrtValue.ortvalue_from_numpy(
                    np.zeros((1, heads, length, head_dim), kind)
                )
        return cache

    def _step(self, tokens: list[int]) -> Tensor:
        end = self._position + len(tokens)
        check_fits(end, self.context)
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.array([tokens], np.int64))
        if self._in_place:
            binding.bind_cpu_input("attention_mask", np.ones((1, end), np.int64))
        binding.bind_output("logits")
        for name, value in self._past.items():
            binding.bind_ortvalue_input(name, value)
            present = name.replace("past_key_values", "present")
            if self._in_place:
                binding.bind_ortvalue_output(present, value)
            else:
                binding.bind_output(present)
        self._session.run_with_iobinding(binding)
        outputs = dict(zip(self._output_names(), binding.get_outputs(), strict=True))
        if not self._in_place:
            self._past = {
                name: outputs[name.replace("past_key_values", "present")] for name in self._past
            }
        self._position = end
        return torch.from_numpy(outputs["logits"].numpy()[0, -1].astype(np.float32))

    def _output_names(self) -> list[str]:
        """The outputs in the order in which `_step` binds them."""
        return ["logits", *(name.replace("past_key_values", "present") for name in self._past)]
