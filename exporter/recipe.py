"""The recipe: one YAML file that says what to make, with ``key=value`` overrides.

    mobilellm export mobilellm-r1-int4 max_context=4096 --checkpoint facebook/MobileLLM-R1-140M ...

Unknown keys are errors. A target holds facts of deployment, never bits. ``max_context`` of the
file is that of every target that has none of its own.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationInfo, model_validator

from exporter.backends import Target, front, names
from exporter.backends._target import Context, target_from
from exporter.calibration.settings import Calibration
from exporter.errors import InputError
from exporter.quantization.settings import Quantization
from exporter.settings import Section, list_of, overridden, parse_section, refusal, within

_Positive = Annotated[int, within(1)]
_Count = Annotated[int, within(0)]


class Profile(Section):
    """What `mobilellm profile` measures: prompts and depths of the cache in tokens, and until when
    it repeats: each median within `precision` of itself to either side, or `max_repeats`."""

    prompt_lengths: Annotated[tuple[_Positive, ...], list_of("whole numbers")] = (64, 512)
    depths: Annotated[tuple[_Count, ...], list_of("whole numbers")] = (0, 512, 2048)
    decode_steps: _Positive = 32
    sustained_seconds: _Count = 20
    precision: Annotated[float, within(1e-9)] = 0.05
    max_repeats: _Positive = 20

    @model_validator(mode="after")
    def _measures_something(self) -> "Profile":
        if not self.prompt_lengths and not self.depths:
            raise refusal("is empty, and so is prompt_lengths", key="depths")
        return self


def _targets(value: object, info: ValidationInfo) -> object:
    """Each target as the kind that it names; `info.context` has the subject of a refusal."""
    if not isinstance(value, (list, tuple)):
        raise refusal(f"{value!r} is not a list of targets")
    if not value:
        raise refusal("is empty", f"Name one of {', '.join(names())}")
    subject = (info.context or {}).get("subject", "recipe")
    targets = tuple(
        one if isinstance(one, Target) else target_from(one, subject, f"targets.{index}")
        for index, one in enumerate(value)
    )
    kinds = [target.target for target in targets]
    if len(set(kinds)) != len(kinds):
        raise refusal(f"names a target twice: {kinds}")
    return targets


def _default_targets() -> tuple[Target, ...]:
    kinds = [front(name).Target for name in names()]
    return tuple(kind() for kind in kinds if kind.by_default)


class Recipe(Section):
    """Everything that decides an export, apart from the checkpoint's own bytes.

    `model` names the checkpoints that it is for; it may be a pattern.
    """

    name: str
    model: str = ""
    quantization: Quantization = Quantization()
    calibration: Calibration = Calibration()
    targets: Annotated[tuple[SerializeAsAny[Target], ...], BeforeValidator(_targets)] = Field(
        default_factory=_default_targets
    )
    profile: Profile = Profile()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it comes back from JSON."""
        return self.model_dump(mode="json")

    def is_for(self, model: str) -> bool:
        """Whether it is for a checkpoint whose folder has this name."""
        return fnmatchcase(model.lower(), Path(self.model).name.lower())


class _Shared(Section):
    """What a recipe's file says once for all its targets."""

    max_context: Context = 2048


def recipe_folder() -> Path:
    """The recipes that come with the tool: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent
    return next(f for f in (package / "recipes", package.parent / "recipes") if f.is_dir())


def all_recipes() -> list[Recipe]:
    """Every recipe that comes with the tool, by name."""
    paths = sorted(recipe_folder().glob("*.yaml"), key=lambda path: path.stem)
    return [load_recipe(path) for path in paths]


def recipes_for(model: str) -> list[Recipe]:
    """The recipes for a checkpoint whose folder has this name; where there are none, one for each
    combination of quantization and context."""
    found = all_recipes()
    own = [recipe for recipe in found if recipe.is_for(model)]
    kinds = dict[str, Recipe]()
    for recipe in found:
        contexts = [(target.target, target.max_context) for target in recipe.targets]
        kinds.setdefault(repr((recipe.quantization, contexts)), recipe)
    return own or list(kinds.values())


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, given as a file or by the name of one that comes with the tool, and apply
    ``key=value`` overrides. Raises InputError."""
    path = Path(source)
    if not path.is_file() and path.name == str(source):
        path = recipe_folder() / f"{source}.yaml"
    if not path.is_file():
        raise InputError(source, *_no_such_recipe(str(source)))
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, an impossible date
        reason = " ".join(str(error).split())
        raise InputError(path, f"is not valid YAML ({reason})", "Correct the file") from error
    if not isinstance(raw, dict):
        raise InputError(path, "does not hold a mapping of keys", "See recipes/ for examples")
    return parse_recipe(overridden({"name": path.stem, **raw}, overrides), str(path))


#: Names of recipes once had the size of the model and the length of the context.
_SIZE, _LONG = re.compile(r"(?<=-)\d+m-"), ("-8k", "max_context=8192")


def _no_such_recipe(name: str) -> tuple[str, str]:
    """The problem, and the recipe that may be meant."""
    known = [path.stem for path in recipe_folder().glob("*.yaml")]
    suffix, override = _LONG
    general = _SIZE.sub("", name.removesuffix(suffix))
    if general != name and general in known:
        new = f"{general} {override}" if name.endswith(suffix) else general
        return (
            "no such recipe: the size of the model and the context are not in its name any more",
            f"Write {new}; mobilellm recipes lists them all",
        )
    remedy = "List the recipes with: mobilellm recipes"
    near = difflib.get_close_matches(name, known, 1)
    return "no such recipe", f"Is it {near[0]}? {remedy}" if near else remedy


def parse_recipe(raw: Mapping[str, Any], subject: str) -> Recipe:
    """A recipe from plain data, every value checked."""
    values = dict(raw)
    shared = {key: values.pop(key) for key in _Shared.model_fields if key in values}
    if shared:
        parse_section(_Shared, shared, subject)
        given = values.get("targets", [{"target": one.target} for one in _default_targets()])
        values["targets"] = _each_with(shared, given)
    recipe = parse_section(Recipe, values, subject, more_keys=tuple(_Shared.model_fields))
    recipe.quantization.schemes()
    return recipe


def _each_with(shared: Mapping[str, Any], targets: object) -> object:
    """Targets with what they leave out; what is no target is left to its refusal."""
    if not isinstance(targets, list):
        return targets
    return [{**shared, **one} if isinstance(one, dict) else one for one in targets]


def parse_profile(raw: Mapping[str, Any], subject: str, overrides: Sequence[str] = ()) -> Profile:
    """The profile section from plain data, with overrides as ``depths=[0,512]``."""
    return parse_section(Profile, overridden(raw, overrides), subject)
