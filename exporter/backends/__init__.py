"""The mobile formats. Each module or package in this folder is a format of the same name.

Names that begin with an underscore are not formats. Importing a format loads neither its toolkit
nor torch; its functions import them when they are called. Every format has these names:

- ``Target``: its options, a subclass of `Target` here. The field ``target`` is the module's name.
  With ``by_default``, it is a target of every recipe that names no targets.
- ``EXTRA``, ``TOOLKIT``: the extra to install for lowering, and the modules that it installs.
- ``RUNTIME_EXTRA``, ``RUNTIME``: the same for `load`. Without them the format can be lowered and
  its integers verified; `verify` then says that the artifact was not run.
- ``FILES``: every file that `lower` may write. The first one is always written, or the folder that
  its path begins with.
- ``main_file(files)``: which of an artifact's `files`, or which folder of them, a runtime opens.
- ``SUFFIX``: the suffix of the files that ``inspect(path) -> Inspection`` reads, including files
  that other tools made; '' for a format without `inspect`.

- ``check(config, schemes, target)``: raise InputError for what the format cannot hold.
- ``check_folder(folder, target)``: raise InputError for files of the model folder that the format
  cannot hold, such as a tokenizer.
- ``predict(config, schemes, target) -> Prediction``: the size of the artifact. Needs no toolkit.
- ``lower(quantized, target, out) -> Artifact``: write the files. Codes and scales are repacked,
  never chosen again.
- ``load(artifact, variant="") -> Runner``: the artifact in its own runtime on this machine, or in
  another way, if `variant` is one of `cross_checks`.
- ``cross_checks(artifact) -> tuple[str, ...]``: the names of the other ways to run the artifact
  here, such as our reference interpreter. `verify` compares the logits of each with the runtime's.
- ``weights(artifact, quantized)``: every weight decoded from the files of the artifact, as
  (name, place, codes and scales or floats). It is found where the model reads it, and decoded as
  the model describes it. `quantized` gives the names, and tells apart what the files cannot: one
  scale per row, or per group of the length of a row.
- ``differences(found, expected)``: how the model in the files of the artifact `found` differs from
  that of `expected`, as (place, what differs). `expected` was just lowered, by this version, for
  the same target; `found` is foreign and may be damaged or hostile. If nothing is given, the
  runtime computes the same from both. Left out is only what has no effect: the places of data in a
  file, recorded versions, and what the format's own docstring names. No runtime is used. Raises
  InputError for what cannot be parsed.

- ``rounding(schemes, target, prompt)``: how the runtime rounds activations if the prefill reads
  `prompt` tokens at once; None if it does not round them.
- ``cache_rounding(target)``: how the runtime rounds queries, keys and values before attention; None
  if it keeps them in float.
- ``largest_activation(target, which)``: the largest value before activations overflow; None in
  float32. `which` is input, output, keys, values or scores.
- ``native(target)``: whether the native runner (`devices/runner`) runs it.
- ``integers(config, schemes, target)``: whether every product with a weight is an integer product.
- ``usage(target)``: how the runtime's own clients run the artifact, in Markdown. Code runs in the
  folder of the artifact. It says what was not run. Needs no toolkit.
- ``interpreted(target)``: whether `load` runs the artifact in our reference interpreter on this
  machine, in place of the format's own runtime.
- ``packages(target)``: the distributions whose versions determine the bytes of the artifact. With
  the same versions, two lowerings of one quantized checkpoint give the same bytes.
"""

import importlib
import importlib.util
import pkgutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from exporter.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from torch import Tensor

    from exporter.backends._target import Target as Target
    from exporter.backends._target import parse_target as parse_target
    from exporter.model.config import ModelConfig


def __getattr__(name: str) -> Any:
    """Import targets on first use: they need pydantic, which would slow ``mobilellm --help``."""
    if name in ("Target", "parse_target"):
        return getattr(importlib.import_module(f"{__name__}._target"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True)
class Artifact:
    """One lowered model: `files` in the folder `path`, and the target it was lowered for."""

    path: Path
    target: "Target"
    files: tuple[str, ...]


class Runner(Protocol):
    """A model with a KV cache. Logits are float32 [vocab_size], for the last token read."""

    @property
    def context(self) -> int:
        """The number of positions in the cache."""

    @property
    def vocab_size(self) -> int:
        """The number of tokens in the vocabulary."""

    def prefill(self, tokens: list[int]) -> "Tensor":
        """Empty the cache and read these tokens."""

    def decode(self, token: int) -> "Tensor":
        """Read one more token."""


@dataclass(frozen=True)
class Prediction:
    """Predicted bytes of the file, of the full KV cache, and of memory.

    Memory is what loading and running add to a process, with prompts of up to a few hundred tokens.
    """

    file: int
    kv_cache: int
    memory: int


@dataclass(frozen=True)
class InspectedTable:
    """A table of an `Inspection`. With `numbers`, all columns except the first align right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str | None = None
    numbers: bool = False


@dataclass(frozen=True)
class Inspection:
    """The content of a file: `content` for JSON output, the other fields for the terminal."""

    content: Mapping[str, Any]
    title: str
    facts: Mapping[str, str]
    tables: Sequence[InspectedTable] = ()
    notes: Sequence[str] = ()


#: Held while a toolkit is imported that hides the packages of others meanwhile, and while packages
#: are looked for.
TOOLKIT_IMPORTS = threading.RLock()


def names() -> tuple[str, ...]:
    """The formats in alphabetical order."""
    modules = {module.name for module in pkgutil.iter_modules(__path__)}
    return tuple(sorted(name for name in modules if not name.startswith("_")))


def front(name: str) -> ModuleType:
    """The module of a format. Its toolkit need not be installed."""
    return importlib.import_module(f"{__name__}.{name}")


def backend(name: str) -> ModuleType:
    """The module of a format whose toolkit is installed, ready to lower and to run.

    Raises MissingExtraError if a part of the toolkit is missing.
    """
    module = front(name)
    with TOOLKIT_IMPORTS:
        _check_toolkit(module)
    return module


def _check_toolkit(module: ModuleType) -> None:
    for package in module.TOOLKIT:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, module.EXTRA)


def check_runtime(name: str) -> None:
    """Raise MissingExtraError if a part of what the format needs to run is missing."""
    module = backend(name)
    with TOOLKIT_IMPORTS:
        for package in module.RUNTIME:
            if importlib.util.find_spec(package) is None:
                raise MissingExtraError(package, module.RUNTIME_EXTRA)


def inspector_of(path: Path) -> str | None:
    """The format that inspects files with this suffix, or None."""
    suffixes = {front(name).SUFFIX: name for name in names()}
    return suffixes.get(path.suffix) if path.suffix else None


def check_context(config: "ModelConfig", target: "Target") -> None:
    """Raise InputError if the context is longer than the model supports."""
    if target.max_context > config.max_position_embeddings:
        raise InputError(
            "max_context",
            f"{target.max_context} is more than the model's {config.max_position_embeddings}",
            "Lower max_context",
        )


def check_fits(tokens: int, context: int) -> None:
    """Raise InputError if a text of so many tokens is longer than the KV cache of a runner."""
    if tokens > context:
        raise InputError(
            "context",
            f"{tokens} tokens do not fit into {context}",
            "Lower with a larger max_context",
        )
