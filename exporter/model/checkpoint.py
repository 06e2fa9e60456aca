"""Open a Hugging Face folder: check it completely, then read it tensor by tensor.

python -m exporter inspect examples/mobilellm-r1-nano
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from exporter.errors import InputError, short
from exporter.foreign import COMPANION_BYTES, is_plain_name, present, read_json
from exporter.model.config import EMBEDDING, OUTPUT, ModelConfig, parse_config
from exporter.model.licence import CARD, LICENCE_FILES, LicenceTerms, read_licence
from exporter.tensors import read_header

#: Files that are copied unchanged with the model, if they are present.
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
    *LICENCE_FILES,
)
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class StoredTensor:
    """The file, dtype and shape of a tensor."""

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
    licence: LicenceTerms | None

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored. Raises InputError if it has NaN or infinity."""
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
        """Read every tensor once, before long work. Raises InputError for NaN or infinity."""
        for name in self.tensors:
            self.read(name)

    @property
    def parameter_count(self) -> int:
        """The number of parameters. A tied embedding counts once."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a folder, or download a hub id such as ``facebook/MobileLLM-R1-140M``.

    Reads the configuration and the headers of the weight files, not the weights. A link is followed
    inside the folder, and from a snapshot of the hub cache to its blobs; nowhere else.
    Raises InputError with the key or tensor, its value, the reason and the remedy.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _fetch(str(source), folder)
    raw = read_json(folder / "config.json")
    config = parse_config(raw, folder / "config.json")
    bos, eos = special_tokens(folder, config.vocab_size)
    companions(folder)
    stored = dict(_stored_tensors(folder))
    if config.tie_word_embeddings:
        _drop_tied_copy(stored, folder)
    return Checkpoint(
        path=folder,
        config=config,
        bos_token_id=bos,
        eos_token_ids=eos,
        tensors=_check_tensors(stored, config, folder),
        licence=read_licence(folder),
    )


def companions(folder: Path) -> tuple[str, ...]:
    """The companion files that a model folder has. Raises InputError for one that may not be read:
    a link out of the folder, a special file, or more than `COMPANION_BYTES`."""
    return tuple(name for name in COMPANION_FILES if present(folder / name, COMPANION_BYTES))


def special_tokens(folder: Path, vocab_size: int) -> tuple[int | None, tuple[int, ...]]:
    """The id that begins a text (or None), and the ids that end one.

    generation_config.json takes precedence over config.json.
    """
    ids: dict[str, tuple[int, ...]] = {"bos_token_id": (), "eos_token_id": ()}
    for name in ("config.json", "generation_config.json"):
        if present(folder / name):
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
                f"{short(token)} is not a token of a vocabulary of {vocab_size}",
                "Give ids between 0 and vocab_size - 1",
            )
    return tuple(ids)


def _stored_tensors(folder: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Every tensor in the weight files of the folder, from their headers."""
    index_path, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if present(index_path):
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index_path}: weight_map", "is missing or empty")
        held = dict[Path, list[str]]()
        for name, file in weight_map.items():
            held.setdefault(_shard(folder, file, index_path), []).append(name)
        for shard in sorted(held):
            yield from _stored_in(shard, held[shard])
    elif present(single):
        yield from _stored_in(single, None)
    else:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED_SUFFIXES)
        if pickled:
            raise InputError(
                folder / pickled[0],
                "is a pickle, which can run code when it is read",
                "Convert it to safetensors in a place you trust (save_pretrained does it)",
            )
        raise InputError(folder, "holds no model.safetensors", "Give a complete model folder")


def _shard(folder: Path, name: object, index: Path) -> Path:
    """The path of a shard, which the index names."""
    if not is_plain_name(name) or "/" in str(name):
        raise InputError(
            f"{index}: weight_map",
            f"{short(name)} is not the plain name of a file beside it",
            "Shards must lie in the checkpoint's own folder",
        )
    return folder / str(name)


def _stored_in(file: Path, names: list[str] | None) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of a weight file, all or those with the `names` of the index."""
    if not present(file):
        raise InputError(file, "the index names this shard, but it is missing", "Get it again")
    header = read_header(file)
    for name in header if names is None else names:
        if name not in header:
            raise InputError(
                f"{file.name}: {name}", "the index names this tensor, but it is missing"
            )
        kind, shape = header[name]
        if kind not in WEIGHT_DTYPES:
            raise InputError(
                f"{file.name}: {name}",
                f"has dtype {kind}",
                f"This tool supports float checkpoints ({', '.join(WEIGHT_DTYPES)})",
            )
        yield name, StoredTensor(file, WEIGHT_DTYPES[kind], shape)


def _drop_tied_copy(stored: dict[str, StoredTensor], folder: Path) -> None:
    """Drop a stored copy of a tied embedding. Raises InputError if the two differ."""
    copy, embedding = stored.pop(OUTPUT, None), stored.get(EMBEDDING)
    if copy is None or embedding is None:
        return
    pair = []
    for name, place in ((OUTPUT, copy), (EMBEDDING, embedding)):
        with safe_open(place.file, framework="pt") as file:
            pair.append(file.get_tensor(name))
    if not torch.equal(*pair):
        raise InputError(
            f"{folder}: {OUTPUT}",
            "differs from the embedding although tie_word_embeddings is true",
            "Set tie_word_embeddings to false to use both, or remove this tensor",
        )


def _check_tensors(
    stored: dict[str, StoredTensor], config: ModelConfig, folder: Path
) -> dict[str, StoredTensor]:
    """The tensors in the order of computation. Raises InputError unless they match the config."""
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
                f"has shape {short(list(stored[name].shape))}, "
                f"the configuration calls for {list(shape)}",
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
    """Download a hub id. Raises InputError, also for a path that does not exist."""
    looks_like_id = source.count("/") == 1 and not source.startswith((".", "/", "~"))
    if folder.exists() or not looks_like_id:
        raise InputError(
            source, "is not a folder", "Give a Hugging Face model folder or a hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [*COMPANION_FILES, CARD, "*.safetensors*"]
    try:
        return Path(snapshot_download(source, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            source,
            f"no such folder, and the hub could not be reached or has no such model ({reason})",
            "Check the name and the network, or download the folder and give its path",
        ) from error
