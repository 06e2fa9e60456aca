"""A quantized checkpoint as the equivalent model of a family that other engines know."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from exporter.model.config import ModelConfig
from exporter.model.equivalent import Equivalent, equivalent
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.quantization.schemes import FLOAT, QuantizedTensor, Scheme


@dataclass(frozen=True)
class EquivalentCheckpoint:
    """The weights of `quantized` with the names and the order of rows of `model`."""

    quantized: QuantizedCheckpoint
    model: Equivalent

    @property
    def config(self) -> ModelConfig:
        """The configuration of the equivalent model."""
        return self.model.config

    @cached_property
    def schemes(self) -> Mapping[str, Scheme]:
        """The scheme of every weight of the equivalent model."""
        return {
            name: self.quantized.schemes[source.name] if source.name else FLOAT
            for name, source in self.model.sources.items()
        }

    def read(self, name: str) -> QuantizedTensor | Tensor:
        """Codes and scales of a weight of the equivalent model, or a float tensor."""
        source = self.model.sources[name]
        if source.name is None:
            return torch.ones(self.config.parameter_shapes()[name])
        stored = self.quantized.read(source.name)
        if isinstance(stored, QuantizedTensor):
            codes, scales = source.reorder(stored.codes), source.reorder(stored.scales)
            return replace(stored, codes=codes, scales=scales)
        return source.reorder(stored)

    def float_weight(self, name: str) -> Tensor:
        """The dequantized weight in float32, or the float tensor converted to float32."""
        stored = self.read(name)
        return stored.dequantize() if isinstance(stored, QuantizedTensor) else stored.float()

    def restore(self, name: str, weight: QuantizedTensor | Tensor) -> QuantizedTensor | Tensor:
        """A weight of the equivalent model with the rows in the order of the model itself."""
        source = self.model.sources[name]
        if isinstance(weight, QuantizedTensor):
            codes, scales = source.restore(weight.codes), source.restore(weight.scales)
            return replace(weight, codes=codes, scales=scales)
        return source.restore(weight)


def as_equivalent(
    quantized: QuantizedCheckpoint, *, rope_interleaved: bool | None = None
) -> EquivalentCheckpoint:
    """The checkpoint as `equivalent` describes its model."""
    model = equivalent(quantized.config, rope_interleaved=rope_interleaved)
    return EquivalentCheckpoint(quantized, model)
