"""The constants of a program: weights as codes and scales, or as palettes, and tables."""

import numpy as np
import torch
from torch import Tensor

from exporter.backends.coreml import Target
from exporter.backends.coreml.palette import make_palettes
from exporter.backends.coreml.toolkit import Var, mb, types
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.quantization.schemes import QuantizedTensor

#: Bits of the codes → the dtype of their arrays in coremltools.
_CODE_TYPES = {4: types.np_int4_dtype, 8: np.dtype(np.int8)}


def mil_name(weight: str) -> str:
    """The name of a weight as an ML Program allows it: without periods."""
    return weight.replace(".", "_")


class Constants:
    """The constants of the program. Its functions share one array for each name."""

    def __init__(self, quantized: QuantizedCheckpoint, target: Target) -> None:
        self.quantized, self._arrays = quantized, dict[str, np.ndarray]()
        self.float_type = np.float16 if target.activations == "float16" else np.float32
        self._with_palettes = target.compute == "neural_engine"

    def shared(self, name: str, array: np.ndarray) -> Var:
        constant = mb.const(val=self._arrays.setdefault(name, array), name=name)
        constant.op.weight_id = name
        return constant

    def matrix(self, name: str) -> Var:
        """A weight [out_features, in_features] with the quantized checkpoint's codes and scales.

        A weight that was left in float is float32 if float16 does not hold it exactly.
        """
        stored, mil = self.quantized.read(name), mil_name(name)
        if not isinstance(stored, QuantizedTensor):
            return self._exact(name, stored)
        if self._with_palettes and stored.scheme.bits == 4:
            indices, palettes = make_palettes(stored, name)
            return mb.constexpr_lut_to_dense(
                indices=self.shared(f"{mil}_indices", indices.astype(types.np_uint4_dtype)),
                lut=self.shared(f"{mil}_palettes", palettes),
                name=mil,
            )
        code_type = _CODE_TYPES[stored.scheme.code_bits]
        codes, scales = stored.codes.numpy(), stored.scales.numpy()
        return mb.constexpr_blockwise_shift_scale(
            data=self.shared(f"{mil}_codes", codes.astype(code_type)),
            scale=self.shared(f"{mil}_scales", scales.astype(self.float_type)),
            name=mil,
        )

    def vector(self, name: str) -> Var:
        """The weight of an RMS norm. It is float32 if float16 does not hold it exactly."""
        return self._exact(name, self.quantized.float_weight(name))

    def table(self, name: str, values: Tensor) -> Var:
        return self.shared(name, values.numpy().astype(self.float_type))

    def _exact(self, name: str, stored: Tensor) -> Var:
        exact = torch.equal(stored.half().float(), stored.float())
        float_type = self.float_type if exact else np.float32
        return self.shared(mil_name(name), stored.float().numpy().astype(float_type))
