"""The mobile formats. Each module or package in this folder is one, found by its name.

A name that begins with an underscore is not a format. Importing a format loads neither its toolkit
nor torch; its functions import them when they are called. All formats have the same names:

- ``Target``: its options, a subclass of `Target` here whose ``target`` is the module's own name.
  One that sets ``by_default`` is a target of every recipe that names none.
- ``EXTRA``, ``TOOLKIT``: the extra of the packaging metadata, and the modules that it installs.
- ``FILE_NAME``, ``FILES``: what a runtime opens, a file or a folder; and every file that `lower`
  may write. The first one is always written.
- ``SUFFIX``: that of files, also of other origin, which ``inspect(path) -> Inspection`` reads; ''
  where there is no such function.

- ``check(config, schemes, target)``: refuse what the format cannot hold, before any work.
- ``predict(config, schemes, target) -> Prediction``: the size of the artifact. Needs no toolkit.
- ``lower(quantized, target, out) -> Artifact``: repack codes and scales; choose nothing again.
- ``load(artifact) -> Runner``: the artifact in its own runtime on this machine.
- ``cross_check(artifact) -> Runner | None``: our own interpreter of the format, where `load` runs
  a toolkit's runtime and there is one.
- ``weights(artifact, quantized)``: (name, place, codes and scales) decoded out of the artifact,
  tensor by tensor.

- ``rounding(schemes, target, prompt)``: how its runtime rounds activations where the first
  `prompt` tokens are read at once, or None.
- ``largest_activation(target, which)``: beyond it activations overflow; None in float32. `which`
  is input, output, keys, values or scores.
- ``portable(target)``: whether a runner with the runtime's core operators alone can run it.
- ``integers(config, schemes, target)``: whether all products of weights work on integers.
- ``packages(target)``: the distributions whose versions decide the bytes.
"""

import importlib
import importlib.util
import pkgutil
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
    """Targets need pydantic, for which ``mobilellm --help`` should not wait."""
    if name in ("Target", "parse_target"):
        return getattr(importlib.import_module(f"{__name__}._target"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True)
class Artifact:
    """One lowered model: `files` in the folder `path`, and what it was lowered for."""

    path: Path
    target: "Target"
    files: tuple[str, ...]


class Runner(Protocol):
    """A model with its cache. Logits are float32 [vocab_size], of the last token."""

    @property
    def context(self) -> int:
        """How many positions the cache holds."""

    @property
    def vocab_size(self) -> int:
        """How many tokens the model knows."""

    def prefill(self, tokens: list[int]) -> "Tensor":
        """Start a new text with these tokens."""

    def decode(self, token: int) -> "Tensor":
        """Continue the text by one token."""


@dataclass(frozen=True)
class Prediction:
    """Bytes of the file, of the whole KV cache, and of memory: what loading and running add to a
    process, with prompts of up to some hundred tokens."""

    file: int
    kv_cache: int
    memory: int


@dataclass(frozen=True)
class InspectedTable:
    """A table of an `Inspection`. With `numbers`, all columns but the first are right-justified."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str | None = None
    numbers: bool = False


@dataclass(frozen=True)
class Inspection:
    """What is in a file of a format: `content` as JSON, the rest for people."""

    content: Mapping[str, Any]
    title: str
    facts: Mapping[str, str]
    tables: Sequence[InspectedTable] = ()
    notes: Sequence[str] = ()


def names() -> tuple[str, ...]:
    """The formats in alphabetical order."""
    found = {module.name for module in pkgutil.iter_modules(__path__)}
    return tuple(sorted(name for name in found if not name.startswith("_")))


def front(name: str) -> ModuleType:
    """The module of a format, whether its toolkit is installed or not."""
    return importlib.import_module(f"{__name__}.{name}")


def backend(name: str) -> ModuleType:
    """The module of a format, to lower or to run. Raises MissingExtraError where a part of its
    toolkit is absent."""
    module = front(name)
    for package in module.TOOLKIT:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, module.EXTRA)
    return module


def inspector_of(path: Path) -> str | None:
    """The format that inspects files of this suffix, or None."""
    suffixes = {front(name).SUFFIX: name for name in names()}
    return suffixes.get(path.suffix) if path.suffix else None


def check_context(config: "ModelConfig", target: "Target") -> None:
    """Refuse a context longer than the model was made for. Raises InputError."""
    if target.max_context > config.max_position_embeddings:
        raise InputError(
            "max_context",
            f"{target.max_context} is more than the model's {config.max_position_embeddings}",
            "Lower max_context",
        )
