"""Lower a program whose output layer is outside of its delegate: a product of float32 by the
runtime's own kernel, as where a partitioner misses an operator."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from exporter.backends import Artifact
from exporter.backends.executorch import Target, lowering
from exporter.model.config import EMBEDDING
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint


def lower_with_undelegated_output(
    quantized: QuantizedCheckpoint, target: Target, out: Path
) -> Artifact:
    """Write `out`/model.pte for a checkpoint whose embedding is tied."""
    hidden_size = quantized.config.hidden_size

    class Segments(lowering.Segments):
        """The last graph gives the normalized hidden state in place of the logits."""

        def _output_layer(self, g: Any, x: int, weight: str) -> int:
            assert weight == EMBEDDING
            return int(g.reshape(x, 1, hidden_size))

    class Program(lowering.Program):
        """The program multiplies it by the embedding."""

        def __init__(self, quantized: QuantizedCheckpoint, *rest: Any) -> None:
            super().__init__(quantized, *rest)
            # The shape of the last graph's output is taken from here.
            self.config = replace(self.config, vocab_size=hidden_size)
            self.register_buffer("output", quantized.float_weight(EMBEDDING))

        def forward(self, tokens: Tensor, start: Tensor) -> Tensor:
            hidden = super().forward(tokens, start)
            return nn.functional.linear(hidden, self.get_buffer("output"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowering, "Segments", Segments)
        patch.setattr(lowering, "Program", Program)
        return lowering.lower(quantized, target, out)
