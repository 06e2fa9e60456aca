"""Write the folder that mlx-lm and MLX Swift open."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from exporter.backends import Artifact
from exporter.backends.mlx import CONFIG, FILE_NAME, TOKENIZER, Target
from exporter.backends.mlx.layout import TYPES, Affine, Entries, affine_of, entries_of, exact, pack
from exporter.files import sha256, write_json
from exporter.model.equivalent import client_config
from exporter.quantization.equivalent_checkpoint import EquivalentCheckpoint, as_equivalent
from exporter.quantization.quantized_checkpoint import MANIFEST, QuantizedCheckpoint
from exporter.quantization.schemes import QuantizedTensor
from exporter.tensors import write_safetensors
from exporter.text.client_files import tokenizer_config

#: What the runtimes ask of the file's metadata.
METADATA = {"format": "mlx"}
#: The key of config.json that tells where the folder comes from. No runtime reads it.
ORIGIN = "mobilellm_exporter"


def lower(quantized: QuantizedCheckpoint, target: Target, out: Path) -> Artifact:
    """Write the weights tensor by tensor, then config.json and tokenizer_config.json."""
    model, kind = as_equivalent(quantized), TYPES[target.activations]
    stored = affine_weights(model)
    owner, layout = dict[str, str](), Entries()
    for name, shape in model.config.parameter_shapes().items():
        entries = entries_of(name, shape, stored[name], kind)
        layout |= entries
        owner |= dict.fromkeys(entries, name)
    packed = dict[str, Tensor]()

    def tensor(entry: str) -> Tensor:
        """The tensors of a weight follow one another, so the last weight is kept."""
        nonlocal packed
        if entry not in packed:
            name = owner[entry]
            weight, affine = model.read(name), stored[name]
            if isinstance(weight, QuantizedTensor):
                assert affine is not None
                packed = pack(name, weight, affine, kind)
            else:
                packed = {name: exact(name, weight, kind)}
        return packed[entry]

    write_safetensors(out / FILE_NAME, layout, tensor, METADATA)
    write_json(out / CONFIG, _config(quantized, model, stored, target))
    files = [FILE_NAME, CONFIG]
    tokenizer = tokenizer_config(quantized.path, quantized.bos_token_id, quantized.eos_token_ids)
    if tokenizer is not None:
        write_json(out / TOKENIZER, tokenizer)
        files.append(TOKENIZER)
    return Artifact(out, target, tuple(files))


def affine_weights(model: EquivalentCheckpoint) -> dict[str, Affine | None]:
    """How each weight is stored, None for those in float."""
    shapes = model.config.parameter_shapes()
    return {name: affine_of(scheme, shapes[name]) for name, scheme in model.schemes.items()}


def _config(
    quantized: QuantizedCheckpoint,
    model: EquivalentCheckpoint,
    stored: Mapping[str, Affine | None],
    target: Target,
) -> dict[str, Any]:
    """config.json: the equivalent model, how its weights are stored, and where it comes from."""
    origin = {"quantized_sha256": sha256(quantized.path / MANIFEST)}
    if quantized.licence:
        origin["license"] = quantized.licence.id
    return {
        **client_config(
            model.config, quantized.bos_token_id, quantized.eos_token_ids, target.activations
        ),
        **quantization(stored, model.config.parameter_shapes()),
        ORIGIN: origin,
    }


def quantization(
    stored: Mapping[str, Affine | None], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """The keys of config.json that say how weights are stored: the most frequent way, and every
    matrix that is stored in another one; false for one in float. Nothing if all are in float."""
    ways = Counter(affine for affine in stored.values() if affine)
    if not ways:
        return {}
    usual = ways.most_common(1)[0][0]
    others = {
        name.removesuffix(".weight"): options(affine) if affine else False
        for name, affine in stored.items()
        if affine != usual and len(shapes[name]) == 2
    }
    content = {**options(usual), **others}
    return {"quantization": content, "quantization_config": content}


def options(affine: Affine) -> dict[str, int]:
    """One way to store weights, as MLX names it."""
    return {"group_size": affine.group, "bits": affine.bits}
