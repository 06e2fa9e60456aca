"""Write a GGUF file tensor by tensor, so that one of them is in memory at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.gguf_writer import WriterState
from torch import Tensor

from exporter.backends import Artifact
from exporter.backends.gguf import FILE_NAME, FILES, Target, blocks, metadata
from exporter.backends.gguf.names import (
    OUTPUT_TENSOR,
    as_written,
    repeats_embedding,
    tensor_names,
)
from exporter.backends.gguf.schemes import BLOCK_TYPES
from exporter.errors import InputError
from exporter.files import replacing
from exporter.model.config import EMBEDDING
from exporter.quantization.equivalent_checkpoint import EquivalentCheckpoint
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.quantization.schemes import QuantizedTensor

#: The types of floats, as the target names them.
_FLOATS = {
    "float32": (GGMLQuantizationType.F32, torch.float32),
    "float16": (GGMLQuantizationType.F16, torch.float16),
    "bfloat16": (GGMLQuantizationType.BF16, torch.bfloat16),
}


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: its name there, the weight that it holds, its shape and its type."""

    tensor: str
    weight: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType

    @property
    def bytes(self) -> int:
        values, size = gguf.GGML_QUANT_SIZES[self.type]
        return torch.Size(self.shape).numel() // values * size


def lower(quantized: QuantizedCheckpoint, target: Target, out: Path) -> Artifact:
    known = as_written(quantized)
    entries = list(_entries(known, target))
    sizes = [(entry.type, entry.bytes) for entry in entries]
    with replacing(out / FILE_NAME) as file:
        writer = gguf.GGUFWriter(None, known.config.model_type)
        for key, field in metadata.fields(quantized, known.config, target, sizes).items():
            writer.add_key_value(key, field.value, field.type, field.entries)
        for entry in entries:
            kind = np.dtype(np.float32)  # not used, since `raw_dtype` is given
            writer.add_tensor_info(
                entry.tensor, entry.shape, kind, entry.bytes, raw_dtype=entry.type
            )
        opened: Any = file  # instead of `open_output_file`, which follows links
        writer.fout, writer.state = [opened], WriterState.EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            data = _data(known, entry, target)
            writer.write_tensor_data(data.contiguous().view(torch.uint8).numpy())
    return Artifact(out, target, FILES)


def _entries(known: EquivalentCheckpoint, target: Target) -> Iterator[_Entry]:
    names, shapes = tensor_names(known.config), known.config.parameter_shapes()
    kinds = {name: _type(known, name, target) for name in names}
    for name, tensor in names.items():
        yield _Entry(tensor, name, shapes[name], kinds[name])
    if repeats_embedding(known.config):
        yield _Entry(OUTPUT_TENSOR, EMBEDDING, shapes[EMBEDDING], kinds[EMBEDDING])


def _type(known: EquivalentCheckpoint, name: str, target: Target) -> GGMLQuantizationType:
    scheme = known.schemes[name]
    if scheme.bits:
        return GGMLQuantizationType[BLOCK_TYPES[scheme.bits][0]]
    is_vector = len(known.config.parameter_shapes()[name]) == 1
    return _FLOATS["float32" if is_vector else target.floats][0]


def _data(known: EquivalentCheckpoint, entry: _Entry, target: Target) -> Tensor:
    weight = known.read(entry.weight)
    if isinstance(weight, QuantizedTensor):
        return blocks.pack(weight)
    values = weight.float()
    if entry.type == GGMLQuantizationType.F32:
        return values
    stored = values.to(_FLOATS[target.floats][1])
    different = stored.float() != values
    if different.any():
        name = known.model.sources[entry.weight].name
        first = values[different][0].item()
        raise InputError(
            f"{name}: float",
            f"{int(different.sum())} of its values are no {target.floats}, such as {first!r}",
            "Set the target's floats to float32, which holds all of them",
        )
    return stored
