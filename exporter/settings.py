"""Settings: data from YAML, JSON and ``key=value`` overrides is validated by pydantic models.

A section is a frozen pydantic model. An unknown key, a wrong type or a number out of range raises
an InputError with the dotted key and the value.
"""

import copy
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import UnionType
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from exporter.errors import InputError, short
from exporter.foreign import DEPTH, is_plain_name
from exporter.yaml_reader import parse_yaml

#: The error type of the validators of this project.
_REFUSED = "refused"
_UNKNOWN_KEY = ("extra_forbidden", "invalid_key")
_NOT_A_MAPPING = ("model_type", "dict_type", "mapping_type")
_TYPES = {"string_type": "str", "int_type": "int", "float_type": "float", "bool_type": "bool"}


class Section(BaseModel):
    """The base of all sections. Types are strict: ``1`` is not a bool."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


AnySection = TypeVar("AnySection", bound=Section)

#: The longest index of a list in an override.
_DIGITS_OF_INDEX = 9
_SHA256 = re.compile(r"[0-9a-f]{64}")


def _check_hashes(hashes: dict[str, str]) -> dict[str, str]:
    for name, value in hashes.items():
        if not is_plain_name(name):
            raise refusal(f"{short(name)} is not the plain name of a file inside this folder")
        if not _SHA256.fullmatch(value):
            raise refusal(f"{short(value)} is not a SHA-256", key=name)
    return hashes


def _check_hash(value: str) -> str:
    if not _SHA256.fullmatch(value):
        raise refusal(f"{short(value)} is not a SHA-256")
    return value


#: The hashes of files of a folder in its manifest: plain name → SHA-256.
FileHashes = Annotated[dict[str, str], AfterValidator(_check_hashes)]
Sha256 = Annotated[str, AfterValidator(_check_hash)]


def refusal(problem: str, remedy: str = "", key: str = "") -> PydanticCustomError:
    """The error for a validator to raise; `key` is the dotted key of the value, relative to the
    validated section or field."""
    context = {"problem": problem, "remedy": remedy, "key": key}
    return PydanticCustomError(_REFUSED, "{problem}", context)


def within(lowest: float, highest: float = math.inf) -> AfterValidator:
    """A validator for finite numbers from `lowest` to `highest`, both included."""
    bounded = highest < math.inf
    limits = f"between {lowest:g} and {highest:g}" if bounded else f"{lowest:g} or more"

    def check(value: float) -> float:
        if not lowest <= value <= highest or value == math.inf:
            raise refusal(f"{value} is out of range", f"Give a value {limits}")
        return value

    return AfterValidator(check)


def list_of(what: str) -> BeforeValidator:
    """A validator that converts a list to a tuple; `what` names its items in the error message."""

    def check(value: object) -> object:
        if not isinstance(value, (list, tuple)):
            raise refusal(f"{short(value)} is not a list of {what}")
        return tuple(value)

    return BeforeValidator(check)


def parse_section(
    model: type[AnySection],
    raw: object,
    subject: str,
    key: str = "",
    more_keys: Sequence[str] = (),
    remedy: str = "",
) -> AnySection:
    """Validate plain data as a section. Raises InputError.

    The error message starts with `subject` and the section's dotted `key`. `more_keys` are allowed
    keys that the caller has removed from `raw`; the remedy for an unknown key lists them too.
    `remedy` is that of errors that have none of their own.
    """
    try:
        return model.model_validate(raw, context={"subject": subject})
    except ValidationError as error:
        details = error.errors(include_url=False)
        # An unknown key first: a misspelt key causes other errors, such as a missing one.
        first = next((d for d in details if d["type"] in _UNKNOWN_KEY), details[0])
        found = _input_error(model, first, subject, key, more_keys)
        raise InputError(found.subject, found.problem, found.remedy or remedy) from error


def _input_error(
    model: type[Section], detail: ErrorDetails, subject: str, key: str, more_keys: Sequence[str]
) -> InputError:
    """The InputError for one error of pydantic."""
    place, value, kind = list(detail["loc"]), detail["input"], detail["type"]
    context, remedy = detail.get("ctx", {}), ""
    if kind in _UNKNOWN_KEY:
        name = place.pop()
        known = _section_at(model, place).model_fields
        problem = f"unknown key {short(name)}"
        remedy = f"Keys: {', '.join([*known, *(() if place else more_keys)])}"
    elif kind == _REFUSED:
        problem, remedy = context["problem"], context["remedy"]
        place += [context["key"]] if context["key"] else []
    elif kind == "literal_error":
        problem = f"{short(value)} is not one of {', '.join(context['expected'].rsplit(' or ', 1))}"
    elif kind in _NOT_A_MAPPING:
        problem = f"{short(value)} is not a mapping of keys"
    elif kind in _TYPES:
        problem = f"{short(value)} is not of type {_TYPES[kind]}"
    elif kind == "missing":
        problem = "is missing"
    else:
        problem = f"{short(value)}: {detail['msg']}"
    where = ".".join([*([key] if key else []), *map(str, place)])
    return InputError(f"{subject}: {where}" if where else subject, problem, remedy)


def _section_at(model: type[Section], place: Sequence[int | str]) -> type[Section]:
    """The type of the section at `place`, a path of field names, keys and indices in `model`."""
    kind: Any = model
    for part in place:
        if isinstance(kind, type) and issubclass(kind, Section):
            kind = kind.model_fields[str(part)].annotation
        else:
            kind = get_args(kind)[1 if get_origin(kind) is dict else 0]
        if get_origin(kind) is UnionType:  # a section that may be null
            kind = get_args(kind)[0]
    section: type[Section] = kind
    return section


def overridden(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A deep copy of `raw` with ``dotted.key=value`` overrides applied. Raises InputError."""
    values = copy.deepcopy(dict(raw))
    for override in overrides:
        _override(values, override)
    return values


def _override(raw: dict[str, Any], text: str) -> None:
    """Apply one override to `raw`; a number in the key is an index of a list."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(text, "is not an override", "Write key=value, as max_context=4096")
    parts = key.split(".")
    if len(parts) > DEPTH:
        raise InputError(text, f"names {len(parts)} levels; the limit is {DEPTH}", "See the recipe")
    # The patterns of quantization.overrides contain dots.
    if parts[:2] == ["quantization", "overrides"]:
        parts = [*parts[:2], ".".join(parts[2:])]
    place: Any = raw
    for part, following in pairwise(parts):
        if isinstance(place, list):
            place = _list_item(place, part, text)
        elif isinstance(place, dict):
            # If the recipe has no such list, index 0 creates it.
            place = place.setdefault(part, [{}] if following == "0" else {})
        if not isinstance(place, (dict, list)):
            raise InputError(text, f"{part!r} holds no keys", "See the recipe for its keys")
    parsed = parse_yaml(value, text, "Quote it")
    if isinstance(place, list):
        _list_item(place, parts[-1], text)
        place[int(parts[-1])] = parsed
    else:
        place[parts[-1]] = parsed


def _list_item(items: list[Any], index: str, text: str) -> Any:
    if not index.isdecimal() or len(index) > _DIGITS_OF_INDEX or int(index) >= len(items):
        raise InputError(text, f"{index!r} is not one of 0..{len(items) - 1}", "Count from 0")
    return items[int(index)]
