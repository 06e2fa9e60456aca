"""A Hugging Face folder in: validated whole before any work starts, read tensor by tensor.

python -m exporter inspect examples/mobilellm-r1-nano
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open

from exporter.errors import InputError
from exporter.files import read_json
from exporter.model.decoder import ModelConfig

#: Files that travel with the model, byte for byte, whenever they are present.
COMPANION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

_ONLY = "This tool supports"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what its file's header says of it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A float model on disk. Tensors are memory-mapped and read one at a time."""

    path: Path
    config: ModelConfig
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    tensors: Mapping[str, StoredTensor]

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored. Raises InputError where it holds NaN or infinity."""
        stored = self.tensors[name]
        with safe_open(stored.file, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                f"{stored.file.name}: {name}",
                f"{bad} of {tensor.numel()} values are NaN or infinite",
                "The checkpoint is damaged or its training diverged; get it again",
            )
        return tensor

    def float_weight(self, name: str) -> torch.Tensor:
        """The tensor as float32."""
        return self.read(name).to(torch.float32)

    def check_weights(self) -> None:
        """Read every tensor once, so that a bad value is found before long work starts."""
        for name in self.tensors:
            self.read(name)

    @property
    def parameter_count(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a folder, or fetch a hub id such as ``facebook/MobileLLM-R1-140M``.

    Reads the configuration and the headers of the weight files, not the weights.
    Raises InputError with the key or tensor, its value, the reason and the remedy.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _fetch(str(source), folder)
    raw = read_json(folder / "config.json")
    config = parse_config(raw, folder / "config.json")
    bos, eos = special_tokens(folder, config.vocab_size)
    stored = dict(_stored_tensors(folder))
    if config.tie_word_embeddings:
        _drop_tied_copy(stored, folder)
    return Checkpoint(
        path=folder,
        config=config,
        bos_token_id=bos,
        eos_token_ids=eos,
        tensors=_check_tensors(stored, config, folder),
    )


def parse_config(raw: Mapping[str, Any], path: Path) -> ModelConfig:
    """The part of a ``config.json`` that decides the arithmetic, or InputError.

    Whatever the decoder does not compute is refused by name: exporting it anyway would give an
    artifact that is silently wrong.
    """

    def refuse(key: str, value: object, supported: str) -> InputError:
        return InputError(f"{path}: {key}", f"{value!r} is not supported", f"{_ONLY} {supported}")

    def positive(key: str, default: object = None) -> Any:
        value = raw.get(key, default)
        if not _is_number(value) or value <= 0:
            raise refuse(key, value, "a number greater than zero here")
        return value

    def size(key: str, default: object = None) -> int:
        value = positive(key, default)
        if int(value) != value:
            raise refuse(key, value, "a whole number here")
        return int(value)

    model_type = raw.get("model_type")
    if model_type not in ("llama4_text", "llama"):
        raise refuse("model_type", model_type, "'llama4_text' (MobileLLM-R1) and 'llama'")
    layers = size("num_hidden_layers")
    heads, hidden = size("num_attention_heads"), size("hidden_size")
    kv_heads = size("num_key_value_heads", heads)
    context = size("max_position_embeddings")
    if heads % kv_heads:
        raise refuse("num_key_value_heads", kv_heads, f"a divisor of {heads} attention heads")
    head_dim = size("head_dim", hidden // heads)
    if head_dim % 2:
        raise refuse("head_dim", head_dim, "an even head_dim (RoPE rotates pairs)")
    tied = raw.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise refuse("tie_word_embeddings", tied, "true or false")

    activation = raw.get("hidden_act", raw.get("hidden_activation"))
    if activation != "silu":
        raise refuse("hidden_act", activation, "'silu'")
    for key in ("attention_bias", "mlp_bias", "attn_temperature_tuning", "for_llm_compressor"):
        if raw.get(key):
            raise refuse(key, raw[key], "false")
    for key in ("quantization_config", "sliding_window"):
        if raw.get(key) is not None:
            raise refuse(key, raw[key], "float checkpoints with full attention (key absent)")
    # A key that is left out means what it means in transformers.
    llama4 = model_type == "llama4_text"
    theta = _rope_theta(raw, 500000.0 if llama4 else 10000.0, refuse)
    use_qk_norm = False
    if llama4:
        _refuse_unsupported_llama4(raw, layers, context, refuse)
        use_qk_norm = bool(raw.get("use_qk_norm", True))
    return ModelConfig(
        model_type=model_type,
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=size(
            "intermediate_size_mlp" if "intermediate_size_mlp" in raw else "intermediate_size"
        ),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=float(positive("rms_norm_eps", 1e-5 if llama4 else 1e-6)),
        rope_theta=theta,
        use_qk_norm=use_qk_norm,
        tie_word_embeddings=tied,
    )


def _is_number(value: object) -> TypeGuard[int | float]:
    """A finite number; true and false are none, though Python counts with them."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _rope_theta(raw: Mapping[str, Any], default: float, refuse: Any) -> float:
    """RoPE base in either spelling: transformers 5 moves it into ``rope_parameters``."""
    if raw.get("rope_scaling") is not None:
        kind = raw["rope_scaling"]
        if not isinstance(kind, dict) or kind.get("rope_type", kind.get("type")) != "default":
            raise refuse("rope_scaling", kind, "null")
    parameters = raw.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise refuse("rope_parameters", parameters, "an object with rope_theta")
    if parameters.get("rope_type", "default") != "default":
        raise refuse("rope_parameters.rope_type", parameters["rope_type"], "'default'")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise refuse(
            "rope_parameters.partial_rotary_factor", parameters["partial_rotary_factor"], "1.0"
        )
    theta = raw.get("rope_theta", parameters.get("rope_theta", default))
    if not _is_number(theta) or theta <= 1:
        raise refuse("rope_theta", theta, "a number greater than one")
    return float(theta)


def _refuse_unsupported_llama4(
    raw: Mapping[str, Any], layers: int, context: int, refuse: Any
) -> None:
    if raw.get("moe_layers") or raw.get("interleave_moe_layer_step"):
        key = "moe_layers" if raw.get("moe_layers") else "interleave_moe_layer_step"
        raise refuse(key, raw[key], "dense layers only (empty list, step 0)")
    for key in ("num_local_experts", "num_experts_per_tok"):
        if raw.get(key):
            raise refuse(key, raw[key], "dense layers only (0)")
    uses_rope = raw.get("no_rope_layers")
    # Despite the key's name, 1 means that the layer uses RoPE; without the list transformers
    # leaves RoPE out of every fourth layer.
    listed = uses_rope[:layers] if isinstance(uses_rope, list) else []
    if len(listed) < layers or any(flag != 1 for flag in listed):
        raise refuse("no_rope_layers", uses_rope, f"RoPE in every layer ({layers} times 1)")
    chunk = raw.get("attention_chunk_size", 8192)
    if chunk is not None and not (_is_number(chunk) and chunk >= context):
        raise refuse(
            "attention_chunk_size", chunk, f"chunks of at least max_position_embeddings ({context})"
        )


def special_tokens(folder: Path, vocab_size: int) -> tuple[int | None, tuple[int, ...]]:
    """The begin-of-text id, and the ids that end a text; generation_config.json goes first."""
    ids: dict[str, tuple[int, ...]] = {"bos_token_id": (), "eos_token_id": ()}
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            raw = read_json(folder / name)
            ids |= {
                key: _token_ids(key, raw[key], folder / name, vocab_size)
                for key in ids
                if raw.get(key) is not None
            }
    return next(iter(ids["bos_token_id"]), None), ids["eos_token_id"]


def _token_ids(key: str, value: object, path: Path, vocab_size: int) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise InputError(
                f"{path}: {key}",
                f"{token!r} is not a token of a vocabulary of {vocab_size}",
                "Give ids between 0 and vocab_size - 1",
            )
    return tuple(ids)


def _stored_tensors(folder: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Every tensor of every weight file of the folder, from the headers."""
    index_path, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index_path.is_file():
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index_path}: weight_map", "is missing or empty")
        shards = {name: _inside(folder, file, index_path) for name, file in weight_map.items()}
        for shard in sorted(set(shards.values())):
            yield from _read_header(shard, [name for name in shards if shards[name] == shard])
    elif single.is_file():
        yield from _read_header(single, None)
    else:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED_SUFFIXES)
        if pickled:
            raise InputError(
                folder / pickled[0],
                "is a pickle, which can run code when it is read",
                "Convert it to safetensors in a place you trust (save_pretrained does it)",
            )
        raise InputError(folder, "holds no model.safetensors", "Give a complete model folder")


def _inside(folder: Path, name: object, index: Path) -> Path:
    """The shard's path, refused where it would leave the folder."""
    if not isinstance(name, str) or Path(name).name != name:
        raise InputError(
            f"{index}: weight_map",
            f"{name!r} is not the plain name of a file beside it",
            "Shards must lie in the checkpoint's own folder",
        )
    path = folder / name
    if not path.is_file():
        raise InputError(path, "the index names this shard, but it is missing", "Get it again")
    return path


def _read_header(file: Path, names: list[str] | None) -> Iterator[tuple[str, StoredTensor]]:
    try:
        with safe_open(file, framework="pt") as handle:
            present = set(handle.keys())
            for name in sorted(present) if names is None else names:
                if name not in present:
                    raise InputError(
                        f"{file.name}: {name}", "the index names this tensor, but it is missing"
                    )
                view = handle.get_slice(name)
                kind = view.get_dtype()
                if kind not in WEIGHT_DTYPES:
                    raise InputError(
                        f"{file.name}: {name}",
                        f"has dtype {kind}",
                        f"{_ONLY} float checkpoints ({', '.join(WEIGHT_DTYPES)})",
                    )
                yield name, StoredTensor(file, WEIGHT_DTYPES[kind], tuple(view.get_shape()))
    except (SafetensorError, OSError) as error:
        raise InputError(
            file, f"is not a whole safetensors file ({error})", "Get the file again"
        ) from error


def _drop_tied_copy(stored: dict[str, StoredTensor], folder: Path) -> None:
    """Some writers store the tied output layer as well: leave it out if it is the embedding."""
    copy, embedding = stored.pop("lm_head.weight", None), stored.get("model.embed_tokens.weight")
    if copy is None or embedding is None:
        return
    pair = []
    for name, place in (("lm_head.weight", copy), ("model.embed_tokens.weight", embedding)):
        with safe_open(place.file, framework="pt") as file:
            pair.append(file.get_tensor(name))
    if not torch.equal(*pair):
        raise InputError(
            f"{folder}: lm_head.weight",
            "differs from the embedding although tie_word_embeddings is true",
            "Set tie_word_embeddings to false to use both, or remove this tensor",
        )


def _check_tensors(
    stored: dict[str, StoredTensor], config: ModelConfig, folder: Path
) -> dict[str, StoredTensor]:
    """Exactly the tensors that the configuration calls for, in the order of computation."""
    expected = config.parameter_shapes()
    for name, shape in expected.items():
        if name not in stored:
            raise InputError(
                f"{folder}: {name}",
                "the configuration calls for this tensor, but no weight file holds it",
                "Check that config.json belongs to these weights",
            )
        if stored[name].shape != shape:
            raise InputError(
                f"{folder}: {name}",
                f"has shape {list(stored[name].shape)}, the configuration calls for {list(shape)}",
                "Check that config.json belongs to these weights",
            )
    extra = sorted(set(stored) - set(expected))
    if extra:
        raise InputError(
            f"{folder}: {extra[0]}",
            f"the model has no such tensor ({len(extra)} extra in all)",
            "Remove it, or correct config.json: nothing is left out silently",
        )
    return {name: stored[name] for name in expected}


def _fetch(source: str, folder: Path) -> Path:
    """Download a hub id; a path that does not exist is reported as such."""
    looks_like_id = source.count("/") == 1 and not source.startswith((".", "/", "~"))
    if folder.exists() or not looks_like_id:
        raise InputError(
            source, "is not a folder", "Give a Hugging Face model folder or a hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=[*COMPANION_FILES, "*.safetensors*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            source,
            f"no such folder, and the hub could not be reached or has no such model ({reason})",
            "Check the name and the network, or download the folder and give its path",
        ) from error
