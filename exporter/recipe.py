"""The recipe: one YAML file that says what to make, with ``key=value`` overrides.

    mobilellm export recipes/mobilellm-r1-140m-int4.yaml targets.0.max_context=4096 ...

Unknown keys are errors. A target holds facts of deployment, never bits.
"""

import json
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from exporter.errors import InputError
from exporter.model.config import ModelConfig
from exporter.quantization.schemes import Scheme, parse_scheme


@dataclass(frozen=True)
class Quantization:
    """Schemes as text (``int4-g32``, ``int8``, ``float``); overrides map patterns to schemes.

    With a `budget` (``5.3 bits`` a weight, or ``90 MB``, scales included) the most sensitive
    weights become int8 until it is used up.
    """

    linear: str = "int4-g32"
    embedding: str = "int4-g32"
    method: Literal["absmax", "mse", "gptq", "distill"] = "mse"
    overrides: Mapping[str, str] = field(default_factory=dict)
    budget: str = ""

    @property
    def calibrated(self) -> bool:
        """Whether text is needed."""
        return self.method in ("gptq", "distill") or bool(self.budget)

    def schemes(self) -> tuple[Scheme, Scheme, dict[str, Scheme]]:
        """The schemes of linear layers, of the embedding, and of each override's pattern."""
        return (
            parse_scheme(self.linear, "quantization.linear"),
            parse_scheme(self.embedding, "quantization.embedding"),
            {p: parse_scheme(s, f"quantization.overrides.{p}") for p, s in self.overrides.items()},
        )


@dataclass(frozen=True)
class Source:
    """A file of text, JSONL or parquet (`field` names what to read of a row), or, without a
    `path`, `tokens` tokens that the checkpoint writes itself: from nothing, or answers to the
    `prompts` of a file, or, with `continue_after`, how it goes on after so many tokens of each of
    them. Sources are mixed by `weight`."""

    path: str = ""
    field: str = ""
    weight: float = 1.0
    prompts: str = ""
    continue_after: int = 0
    tokens: int = 65536
    temperature: float = 1.0
    top_p: float = 1.0

    @property
    def self_generated(self) -> bool:
        return not self.path


@dataclass(frozen=True)
class Calibration:
    """The text that GPTQ, distillation and the sensitivity search learn from, and how they do.

    `held_out` is the share of every source that nothing is learned from: it decides which step of
    a distillation is kept. `start` is what distillation starts from. Steps of `batch_size`
    sequences (times `accumulate`) minimize KL(teacher || student) at `temperature`, over the
    `top_k` likeliest tokens and all others as one (0: over all), plus `hidden_weight` times the
    squared error of the last hidden states. `activations: int8` rounds them as ExecuTorch does.
    `learning_rate` is that of real codes, in codes a step; `scale_learning_rate` is that of the
    logarithms of int4 scales, of which int8 has a sixteenth.
    The teacher is the checkpoint itself, or another one of the same tokenizer.
    """

    data: tuple[Source, ...] = (Source(),)
    sequence_length: int = 512
    held_out: float = 0.05
    gptq_sequences: int = 32
    sensitivity_sequences: int = 2
    start: Literal["mse", "gptq"] = "gptq"
    teacher: str = ""
    steps: int = 400
    batch_size: int = 2
    accumulate: int = 1
    learning_rate: float = 2e-3
    scale_learning_rate: float = 5e-4
    warm_up: int = 10
    temperature: float = 1.0
    top_k: int = 0
    hidden_weight: float = 0.0
    activations: Literal["float", "int8"] = "float"
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    cache_teacher: bool = False
    evaluate_every: int = 50
    held_out_sequences: int = 16
    patience: int = 4
    parallel: Literal["ddp", "fsdp"] = "ddp"
    seed: int = 0


@dataclass(frozen=True)
class ExecuTorchTarget:
    """A .pte for XNNPACK, or with a Core ML package inside for iOS 18 and macOS 15.

    XNNPACK: ``custom_sdpa`` is for the official runners, ``portable`` for any. Core ML: attention
    is its own, `activations: float16` is what the Neural Engine runs, and a prompt is read token
    by token (`coreml` as a target of its own reads it in chunks).
    """

    target: Literal["executorch"] = "executorch"
    max_context: int = 2048
    delegate: Literal["xnnpack", "coreml"] = "xnnpack"
    attention: Literal["custom_sdpa", "portable"] = "custom_sdpa"
    activations: Literal["float32", "float16"] = "float32"


@dataclass(frozen=True)
class OnnxTarget:
    """An .onnx for ONNX Runtime (``contrib``), or of standard operators only (``portable``).

    `products` says whether matrix products may round activations to int8, which is faster.
    `ort` adds the .ort file and operator list of a reduced mobile build.
    """

    target: Literal["onnx"] = "onnx"
    max_context: int = 2048
    form: Literal["contrib", "portable"] = "contrib"
    activations: Literal["float32", "float16"] = "float32"
    products: Literal["int8", "float"] = "int8"
    ort: bool = False


@dataclass(frozen=True)
class CoreMLTarget:
    """An .mlpackage for iOS 18 and macOS 15; prompts are read in chunks of `prefill` tokens.

    `activations: float32` is for models whose activations float16 cannot hold; the Neural Engine
    does not run it. `output: token` finds the likeliest token inside the program. `author` and
    `license` are shown in Xcode.
    """

    target: Literal["coreml"] = "coreml"
    max_context: int = 2048
    prefill: int = 128
    activations: Literal["float16", "float32"] = "float16"
    output: Literal["logits", "token"] = "logits"
    author: str = ""
    license: str = ""


Target = ExecuTorchTarget | OnnxTarget | CoreMLTarget
TARGETS: dict[str, type[Target]] = {
    "executorch": ExecuTorchTarget,
    "onnx": OnnxTarget,
    "coreml": CoreMLTarget,
}


@dataclass(frozen=True)
class Profile:
    """What `mobilellm profile` measures: prompts and depths of the cache in tokens, and until when
    it repeats: each median within `precision` of itself to either side, or `max_repeats`."""

    prompt_lengths: tuple[int, ...] = (64, 512)
    depths: tuple[int, ...] = (0, 512, 2048)
    decode_steps: int = 32
    sustained_seconds: int = 20
    precision: float = 0.05
    max_repeats: int = 20


@dataclass(frozen=True)
class Recipe:
    """Everything that decides an export, apart from the checkpoint's own bytes."""

    name: str
    model: str = ""
    quantization: Quantization = field(default_factory=Quantization)
    calibration: Calibration = field(default_factory=Calibration)
    targets: tuple[Target, ...] = (ExecuTorchTarget(),)
    profile: Profile = field(default_factory=Profile)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it comes back from JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


def recipe_folder() -> Path:
    """The recipes that come with the tool: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent
    return next(f for f in (package / "recipes", package.parent / "recipes") if f.is_dir())


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, given as a file or by the name of one that comes with the tool, and apply
    ``key=value`` overrides. Raises InputError."""
    path = Path(source)
    if not path.is_file() and path.name == str(source):
        path = recipe_folder() / f"{source}.yaml"
    if not path.is_file():
        raise InputError(source, "no such recipe", "List the recipes with: mobilellm recipes")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, an impossible date
        reason = " ".join(str(error).split())
        raise InputError(path, f"is not valid YAML ({reason})", "Correct the file") from error
    if not isinstance(raw, dict):
        raise InputError(path, "does not hold a mapping of keys", "See recipes/ for examples")
    raw = {"name": path.stem, **raw}
    for override in overrides:
        _override(raw, override)
    return parse_recipe(raw, str(path))


def parse_recipe(raw: Mapping[str, Any], subject: str) -> Recipe:
    """A recipe from plain data, every value checked."""
    recipe: Recipe = _build(Recipe, raw, "", subject)
    recipe.quantization.schemes()
    _check_calibration(recipe.calibration, f"{subject}: calibration")
    _check_profile(recipe.profile, subject)
    if not recipe.targets:
        raise InputError(f"{subject}: targets", "is empty", f"Name one of {', '.join(TARGETS)}")
    kinds = [target.target for target in recipe.targets]
    if len(set(kinds)) != len(kinds):
        raise InputError(f"{subject}: targets", f"names a target twice: {kinds}")
    return recipe


def _check_calibration(calibration: Calibration, subject: str) -> None:
    """Every number within its range. Raises InputError."""
    low = 1e-12
    limits: dict[str, tuple[float, float]] = {
        "sequence_length": (8, math.inf),
        "held_out": (low, 0.5),
        "gptq_sequences": (1, math.inf),
        "sensitivity_sequences": (1, math.inf),
        "steps": (1, math.inf),
        "batch_size": (1, math.inf),
        "accumulate": (1, math.inf),
        "learning_rate": (low, 1.0),
        "scale_learning_rate": (0.0, 1.0),
        "warm_up": (0, math.inf),
        "temperature": (0.01, 100.0),
        "top_k": (0, math.inf),
        "hidden_weight": (0.0, math.inf),
        "evaluate_every": (1, math.inf),
        "held_out_sequences": (1, math.inf),
        "patience": (1, math.inf),
        "seed": (0, 2**63 - 1),
    }
    for name, (least, most) in limits.items():
        _check_range(getattr(calibration, name), least, most, f"{subject}.{name}")
    for index, source in enumerate(calibration.data):
        where = f"{subject}.data.{index}"
        for name in ("weight", "temperature", "top_p", "tokens"):
            least, most = (1 if name == "tokens" else low), (1.0 if name == "top_p" else math.inf)
            _check_range(getattr(source, name), least, most, f"{where}.{name}")
        if source.path and source.prompts:
            raise InputError(
                f"{where}.prompts",
                "has no use for a source with a path",
                "Leave the path out, and the checkpoint answers the prompts",
            )
        if source.continue_after:
            where = f"{where}.continue_after"
            _check_range(source.continue_after, 1, calibration.sequence_length - 2, where)
            if not source.prompts:
                raise InputError(where, "needs texts to go on with", "Name a file with prompts")
    if calibration.cache_teacher and not (calibration.top_k and not calibration.hidden_weight):
        raise InputError(
            f"{subject}.cache_teacher",
            "needs a top_k, and no hidden_weight",
            "Set top_k to some hundred: all logits of all tokens do not fit a disk",
        )


def _check_range(value: float, least: float, most: float, subject: str) -> None:
    if not least <= value <= most or value == math.inf:
        span = f"between {least:g} and {most:g}" if most < math.inf else f"{least:g} or more"
        raise InputError(subject, f"{value} is out of range", f"Give a value {span}")


def parse_target(raw: Mapping[str, Any], subject: str, overrides: Sequence[str] = ()) -> Target:
    """A target from plain data, with overrides as ``max_context=4096``."""
    values = dict(raw)
    for override in overrides:
        _override(values, override)
    target: Target = _build_target(values, "", subject)
    return target


def parse_profile(raw: Mapping[str, Any], subject: str, overrides: Sequence[str] = ()) -> Profile:
    """The profile section from plain data, with overrides as ``depths=[0,512]``."""
    values = dict(raw)
    for override in overrides:
        _override(values, override)
    profile: Profile = _build(Profile, values, "", subject)
    _check_profile(profile, subject)
    return profile


def _check_profile(profile: Profile, subject: str) -> None:
    positive: dict[str, Sequence[float]] = {
        "decode_steps": [profile.decode_steps],
        "max_repeats": [profile.max_repeats],
        "precision": [profile.precision],
        "prompt_lengths": profile.prompt_lengths,
    }
    counts: dict[str, Sequence[float]] = {
        "depths": profile.depths,
        "sustained_seconds": [profile.sustained_seconds],
    }
    for least, numbers in ((1e-9, positive), (0, counts)):
        for name, values in numbers.items():
            for value in values:
                if value < least:
                    raise InputError(f"{subject}: {name}", f"{value} is too small")
    if not profile.prompt_lengths and not profile.depths:
        raise InputError(f"{subject}: depths", "is empty, and so is prompt_lengths")


def check_context(config: ModelConfig, target: Target) -> None:
    """Refuse a context longer than the model was made for. Raises InputError."""
    if target.max_context > config.max_position_embeddings:
        raise InputError(
            "max_context",
            f"{target.max_context} is more than the model's {config.max_position_embeddings}",
            "Lower max_context",
        )


def _override(raw: dict[str, Any], text: str) -> None:
    """Set one value, given as ``dotted.key=value``; numbers in the key index lists."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(
            text, "is not an override", "Write key=value, as targets.0.max_context=4096"
        )
    parts = key.split(".")
    # A pattern of quantization.overrides has dots of its own.
    if parts[:2] == ["quantization", "overrides"]:
        parts = [*parts[:2], ".".join(parts[2:])]
    place: Any = raw
    for part, following in pairwise(parts):
        if isinstance(place, list):
            place = _list_item(place, part, text)
        elif isinstance(place, dict):
            # The recipe may leave out a list that the override begins.
            place = place.setdefault(part, [{}] if following == "0" else {})
        if not isinstance(place, (dict, list)):
            raise InputError(text, f"{part!r} holds no keys", "See the recipe for its keys")
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(text, f"{value!r} is not a YAML value ({reason})", "Quote it") from error
    if isinstance(place, list):
        _list_item(place, parts[-1], text)
        place[int(parts[-1])] = parsed
    else:
        place[parts[-1]] = parsed


def _list_item(items: list[Any], index: str, text: str) -> Any:
    if not index.isdecimal() or int(index) >= len(items):
        raise InputError(text, f"{index!r} is not one of 0..{len(items) - 1}", "Count from 0")
    return items[int(index)]


def _build(cls: type, raw: object, key: str, subject: str) -> Any:
    """A dataclass from plain data; `key` is the dotted path for messages."""
    where = f"{subject}: {key}" if key else subject
    if not isinstance(raw, Mapping):
        raise InputError(where, f"{raw!r} is not a mapping of keys")
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    for name in raw:
        if name not in known:
            raise InputError(f"{where}", f"unknown key {name!r}", f"Keys: {', '.join(known)}")
    values = {
        name: _value(hints[name], value, f"{key}.{name}" if key else str(name), subject)
        for name, value in raw.items()
    }
    return cls(**values)


def _build_target(raw: object, key: str, subject: str) -> Any:
    kind = raw.get("target") if isinstance(raw, Mapping) else None
    if not isinstance(kind, str) or kind not in TARGETS:
        raise InputError(
            f"{subject}: {key + '.' if key else ''}target",
            f"{kind!r} is not a target",
            f"Known: {', '.join(TARGETS)}",
        )
    target = _build(TARGETS[kind], raw, key, subject)
    if target.max_context < 2:
        raise InputError(
            f"{subject}: {key + '.' if key else ''}max_context",
            f"{target.max_context} is too short",
            "Give 2 or more",
        )
    return target


def _value(hint: Any, value: object, key: str, subject: str) -> Any:
    """`value` as the annotation `hint` wants it, or InputError."""
    where, origin = f"{subject}: {key}", get_origin(hint)
    if hint == tuple[Target, ...]:
        if not isinstance(value, list):
            raise InputError(where, f"{value!r} is not a list of targets")
        return tuple(_build_target(v, f"{key}.{i}", subject) for i, v in enumerate(value))
    if hint == tuple[Source, ...]:
        if not isinstance(value, list) or not value:
            raise InputError(where, f"{value!r} is not a list of sources")
        return tuple(_build(Source, v, f"{key}.{i}", subject) for i, v in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint == tuple[int, ...]:
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise InputError(where, f"{value!r} is not a list of whole numbers")
        return tuple(value)
    if is_dataclass(hint):
        return _build(hint, value, key, subject)  # type: ignore[arg-type]  # is a class here
    if origin is Literal:
        if value not in get_args(hint):
            options = ", ".join(map(repr, get_args(hint)))
            raise InputError(where, f"{value!r} is not one of {options}")
        return value
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping) or not all(
            isinstance(k, str) and isinstance(v, str) for k, v in value.items()
        ):
            raise InputError(where, f"{value!r} does not map names to texts")
        return dict(value)
    if hint is float and type(value) is int:
        value = float(value)
    wanted = get_args(hint) if origin in (Union, types.UnionType) else (hint,)
    if (isinstance(value, bool) and bool not in wanted) or not isinstance(value, wanted):
        names = " or ".join(t.__name__ for t in wanted)
        raise InputError(where, f"{value!r} is not of type {names}")
    return value
