"""The recipe: a YAML file with all settings of an export, and ``key=value`` overrides.

    mobilellm export mobilellm-r1-int4 max_context=4096 --checkpoint facebook/MobileLLM-R1-140M ...

Unknown keys are errors. A target has deployment settings, no quantization settings. The file's
``max_context`` applies to every target that does not set its own.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationInfo, model_validator

from exporter.backends import Target, front, names
from exporter.backends._target import Context, target_from
from exporter.calibration.settings import Calibration
from exporter.errors import InputError, short
from exporter.foreign import read_bytes
from exporter.model.licence import LicenceTerms
from exporter.quantization.settings import Quantization
from exporter.settings import Section, list_of, overridden, parse_section, refusal, within
from exporter.yaml_reader import YAML_BYTES, parse_yaml

_Positive = Annotated[int, within(1)]
_Count = Annotated[int, within(0)]


class Profile(Section):
    """What `mobilellm profile` measures.

    `prompt_lengths` and `depths` (of the KV cache) are in tokens. A measurement is repeated until
    the confidence interval of its median is within ± `precision` (relative), or `max_repeats`
    times. The sustained run lasts until both `sustained_seconds` are over and `sustained_tokens`
    are decoded; the device rests for `cooldown_seconds` before it.
    """

    prompt_lengths: Annotated[tuple[_Positive, ...], list_of("whole numbers")] = (64, 512)
    depths: Annotated[tuple[_Count, ...], list_of("whole numbers")] = (0, 512, 2048)
    decode_steps: Annotated[int, within(1, 1_000_000)] = 32
    sustained_seconds: Annotated[int, within(0, 86_400)] = 20
    sustained_tokens: Annotated[int, within(0, 10_000_000)] = 0
    cooldown_seconds: Annotated[int, within(0, 86_400)] = 0
    precision: Annotated[float, within(1e-9)] = 0.05
    max_repeats: Annotated[int, within(1, 100_000)] = 20

    @model_validator(mode="after")
    def _measures_something(self) -> "Profile":
        if not self.prompt_lengths and not self.depths:
            raise refusal("is empty, and so is prompt_lengths", key="depths")
        return self


def _targets(value: object, info: ValidationInfo) -> object:
    """Parse each target as the type of its format; `info.context` has the subject of errors."""
    if not isinstance(value, (list, tuple)):
        raise refusal(f"{short(value)} is not a list of targets")
    if not value:
        raise refusal("is empty", f"Name one of {', '.join(names())}")
    subject = (info.context or {}).get("subject", "recipe")
    targets = tuple(
        target if isinstance(target, Target) else target_from(target, subject, f"targets.{index}")
        for index, target in enumerate(value)
    )
    kinds = [target.target for target in targets]
    if len(set(kinds)) != len(kinds):
        raise refusal(f"names a target twice: {kinds}")
    return targets


def _default_targets() -> tuple[Target, ...]:
    kinds = [front(name).Target for name in names()]
    return tuple(kind() for kind in kinds if kind.by_default)


class Recipe(Section):
    """All settings of an export.

    `model` names the checkpoints that the recipe is for; it may be a pattern. `license` is their
    licence, for a checkpoint whose folder names none.
    """

    name: str
    model: str = ""
    license: LicenceTerms | None = None
    quantization: Quantization = Quantization()
    calibration: Calibration = Calibration()
    targets: Annotated[tuple[SerializeAsAny[Target], ...], BeforeValidator(_targets)] = Field(
        default_factory=_default_targets
    )
    profile: Profile = Profile()

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON-compatible data."""
        return self.model_dump(mode="json")

    def is_for(self, model: str) -> bool:
        """Whether the recipe is for a checkpoint whose folder has the name `model`."""
        return fnmatchcase(model.lower(), Path(self.model).name.lower())


class _Shared(Section):
    """Settings of a recipe file that apply to all targets."""

    max_context: Context = 2048


def recipe_folder() -> Path:
    """The folder of the built-in recipes: in an installed package, or next to it in a checkout."""
    package = Path(__file__).parent
    return next(f for f in (package / "recipes", package.parent / "recipes") if f.is_dir())


def all_recipes() -> list[Recipe]:
    """All built-in recipes, sorted by name."""
    paths = sorted(recipe_folder().glob("*.yaml"), key=lambda path: path.stem)
    return [load_recipe(path) for path in paths]


def recipes_for(model: str) -> list[Recipe]:
    """The built-in recipes for a checkpoint whose folder has the name `model`; if there are none,
    one recipe for each combination of quantization and contexts."""
    recipes = all_recipes()
    matching = [recipe for recipe in recipes if recipe.is_for(model)]
    distinct = dict[str, Recipe]()
    for recipe in recipes:
        contexts = [(target.target, target.max_context) for target in recipe.targets]
        distinct.setdefault(repr((recipe.quantization, contexts)), recipe)
    return matching or list(distinct.values())


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, given as a file or as the name of a built-in one, and apply ``key=value``
    overrides. Raises InputError."""
    path = Path(source)
    if not path.is_file() and path.name == str(source):
        path = recipe_folder() / f"{source}.yaml"
    if not path.is_file():
        raise InputError(source, *_no_such_recipe(str(source)))
    raw = parse_yaml(read_bytes(path, YAML_BYTES), path, "Correct the file")
    if not isinstance(raw, dict):
        raise InputError(path, "does not hold a mapping of keys", "See recipes/ for examples")
    return parse_recipe(overridden({"name": path.stem, **raw}, overrides), str(path))


#: Earlier versions had the size of the model and the context in the names of recipes.
_SIZE, _LONG_CONTEXT = re.compile(r"(?<=-)\d+m-"), ("-8k", "max_context=8192")


def _no_such_recipe(name: str) -> tuple[str, str]:
    """The problem and the remedy, with the name of a similar recipe if there is one."""
    known = [path.stem for path in recipe_folder().glob("*.yaml")]
    suffix, override = _LONG_CONTEXT
    current = _SIZE.sub("", name.removesuffix(suffix))
    if current != name and current in known:
        new = f"{current} {override}" if name.endswith(suffix) else current
        return (
            "no such recipe: recipe names no longer contain the model size and the context",
            f"Write {new}; to list all recipes, run: mobilellm recipes",
        )
    remedy = "To list all recipes, run: mobilellm recipes"
    similar = difflib.get_close_matches(name, known, 1)
    return "no such recipe", f"Did you mean {similar[0]}? {remedy}" if similar else remedy


def parse_recipe(raw: Mapping[str, Any], subject: str) -> Recipe:
    """Validate plain data as a recipe. Raises InputError; `subject` starts its message."""
    values = dict(raw)
    shared = {key: values.pop(key) for key in _Shared.model_fields if key in values}
    if shared:
        parse_section(_Shared, shared, subject)
        default = [{"target": target.target} for target in _default_targets()]
        values["targets"] = _each_with(shared, values.get("targets", default))
    recipe = parse_section(Recipe, values, subject, more_keys=tuple(_Shared.model_fields))
    recipe.quantization.schemes()
    return recipe


def _each_with(shared: Mapping[str, Any], targets: object) -> object:
    """The targets with the `shared` settings that they do not set; invalid data is unchanged and
    is refused later."""
    if not isinstance(targets, list):
        return targets
    return [{**shared, **target} if isinstance(target, dict) else target for target in targets]


def parse_profile(raw: object, subject: str, overrides: Sequence[str] = ()) -> Profile:
    """Validate plain data as a profile section, with overrides such as ``depths=[0,512]``. Raises
    InputError."""
    if not isinstance(raw, Mapping):  # a section of a bundle's manifest may hold anything
        raise InputError(subject, f"{short(raw)} is not a mapping of keys")
    return parse_section(Profile, overridden(raw, overrides), subject)
