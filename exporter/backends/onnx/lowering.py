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

from exporter.backends import Artifact
from exporter.backends.onnx import (
    DATA_NAME,
    FILE_NAME,
    GENAI_CONFIG,
    OPERATORS_NAME,
    ORT_NAME,
    Target,
)
from exporter.backends.onnx.forms import ContribForm, PortableForm
from exporter.backends.onnx.graph import OnnxGraph
from exporter.backends.onnx.ort import in_order
from exporter.errors import InputError
from exporter.files import replacing, write_json
from exporter.model.walk import walk
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint


def lower(quantized: QuantizedCheckpoint, target: Target, out: Path) -> Artifact:
    """Write model.onnx, its data file, genai_config.json and, with `ort`, the .ort files."""
    with replacing(out / DATA_NAME) as data:
        graph = OnnxGraph(DATA_NAME, data)
        form = ContribForm if target.form == "contrib" else PortableForm
        walk(quantized.config, form(graph, quantized, target))
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
    """The configuration for onnxruntime-genai. `type` only selects its decoder-only loop."""
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
    """Write the .ort file, and the list of operators for a reduced build of the runtime."""
    converter = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort"]
    options = ["--optimization_style", "Fixed", "--target_platform", "arm", "--output_dir"]
    with tempfile.TemporaryDirectory() as scratch:  # not in `out`, where a kill would leave it
        command = [*converter, *options, scratch, str(out / FILE_NAME)]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip() or "no message").splitlines()[-1]
            raise InputError(FILE_NAME, f"ONNX Runtime cannot convert it to .ort ({reason})")
        with replacing(out / ORT_NAME) as file:
            file.write(in_order((Path(scratch) / ORT_NAME).read_bytes()))
        lines = (Path(scratch) / OPERATORS_NAME).read_text().splitlines(keepends=True)
        with replacing(out / OPERATORS_NAME) as file:  # the comments name the scratch folder
            file.write("".join(line for line in lines if not line.startswith("#")).encode())
    return [ORT_NAME, OPERATORS_NAME]


class OnnxRunner:
    """A `Runner` in ONNX Runtime. The `contrib` form updates its cache in place."""

    def __init__(self, folder: Path, context: int) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(
            folder / FILE_NAME, options, providers=["CPUExecutionProvider"]
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
        return self._step(tokens)

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
        if end > self.context:
            raise InputError(
                "context",
                f"{end} tokens do not fit into {self.context}",
                "Lower with a larger max_context",
            )
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
