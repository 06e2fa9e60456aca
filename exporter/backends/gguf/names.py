"""The names of weights and families in GGUF, from the tables of the gguf package."""

from collections.abc import Mapping

import gguf

from exporter.model.config import ModelConfig
from exporter.model.equivalent import known_family
from exporter.quantization.equivalent_checkpoint import EquivalentCheckpoint, as_equivalent
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint

#: The output layer of a model whose embedding is not tied.
OUTPUT_TENSOR = "output.weight"
#: The family whose RoPE rotates adjacent numbers in llama.cpp (``LLAMA_ROPE_TYPE_NORM``). The
#: others that we write rotate the halves of a head (``LLAMA_ROPE_TYPE_NEOX``).
_INTERLEAVED = "llama"
#: The family for which llama.cpp demands an output layer, tied or not.
_NEVER_TIED = "olmo2"


def as_written(quantized: QuantizedCheckpoint) -> EquivalentCheckpoint:
    """The checkpoint with the names and the order of rows that llama.cpp reads."""
    interleaved = known_family(quantized.config) == _INTERLEAVED
    return as_equivalent(quantized, rope_interleaved=interleaved)


def tensor_names(config: ModelConfig) -> Mapping[str, str]:
    """Weight of an equivalent model → tensor of the file, in the order of computation."""
    families = {name: family for family, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(families[config.model_type], config.num_hidden_layers)
    found = {}
    for name in config.parameter_shapes():
        tensor = table.get_name(name, try_suffixes=(".weight",))
        assert tensor is not None, name
        found[name] = tensor
    return found


def repeats_embedding(config: ModelConfig) -> bool:
    """Whether a tied embedding is in the file a second time, as the output layer."""
    return config.tie_word_embeddings and config.model_type == _NEVER_TIED
