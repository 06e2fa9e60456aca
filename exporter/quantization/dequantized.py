"""A Hugging Face folder with the dequantized weights, for any other engine.

    mobilellm quantize mobilellm-r1-nano-int4 --checkpoint examples/mobilellm-r1-nano \\
        -o build/nano-int4 --dequantize build/nano-qwen3 --as qwen3
"""

from pathlib import Path

import torch

from exporter.errors import InputError
from exporter.files import Output, copy_file, read_json, write_json
from exporter.model.checkpoint import COMPANION_FILES, companions
from exporter.model.config import ModelConfig
from exporter.model.equivalent import client_config, known_family
from exporter.progress import OnTensor
from exporter.quantization.equivalent_checkpoint import EquivalentCheckpoint, as_equivalent
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.tensors import write_safetensors

_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
OUTPUT = Output(_WEIGHTS, _CONFIG, COMPANION_FILES)


def check_family(config: ModelConfig, family: str | None) -> None:
    """Raise InputError for a family in which this model cannot be written."""
    known = known_family(config)
    if family not in (None, config.model_type, known):
        same = known == config.model_type
        choice = "Leave it out" if same else f"Give {known}, or leave it out"
        raise InputError(
            f"--as {family}", f"a model of type {config.model_type} is not one of {family}", choice
        )


def write_dequantized(
    quantized: QuantizedCheckpoint,
    dtype: torch.dtype,
    out: Path,
    on_tensor: OnTensor,
    family: str | None = None,
) -> None:
    """Write the folder. Its ``config.json`` names `dtype`, so that an engine loads it unrounded.

    `family` is that of the equivalent model which is written, by default the model's own. Raises
    InputError for one that it has not.

    float32 is exact. float16 and bfloat16 round each product of code and scale to 11 and 8
    significant bits. An int4 code times a scale needs up to 11 bits, so float16 is exact for int4
    unless the product is below 2^-14.
    """
    check_family(quantized.config, family)
    kind = str(dtype).removeprefix("torch.")
    written: QuantizedCheckpoint | EquivalentCheckpoint = quantized
    config = {**read_json(quantized.path / _CONFIG), "dtype": kind, "torch_dtype": kind}
    if family not in (None, quantized.config.model_type):
        written = as_equivalent(quantized)
        ends = quantized.eos_token_ids
        config = client_config(written.config, quantized.bos_token_id, ends, kind)

    def produce(name: str) -> torch.Tensor:
        on_tensor(name)
        return written.float_weight(name).to(dtype)

    layout = {name: (dtype, shape) for name, shape in written.config.parameter_shapes().items()}
    write_safetensors(out / _WEIGHTS, layout, produce, {"format": "pt"})
    for name in companions(quantized.path):
        if name != _CONFIG:
            copy_file(quantized.path / name, out / name)
    write_json(out / _CONFIG, config)
