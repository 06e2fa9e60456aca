"""The options that every format has, and how targets are parsed."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator

from exporter.backends import front, names
from exporter.errors import InputError
from exporter.settings import Section, overridden, parse_section, refusal


def _long_enough(value: int) -> int:
    if value < 2:
        raise refusal(f"{value} is too short", "Give 2 or more")
    return value


#: The length of a KV cache in tokens.
Context = Annotated[int, AfterValidator(_long_enough)]


class Target(Section):
    """The options of a deployment; quantization is not one of them. `target` names the format."""

    #: Whether recipes that name no targets use this one.
    by_default: ClassVar[bool] = False

    target: str
    max_context: Context = 2048


def parse_target(raw: Mapping[str, Any], subject: str, overrides: Sequence[str] = ()) -> Target:
    """A target from plain data, with overrides such as ``max_context=4096``. Raises InputError."""
    return target_from(overridden(raw, overrides), subject)


def target_from(raw: object, subject: str, key: str = "") -> Target:
    """A target from plain data of any shape; `key` is its place in a recipe. Raises InputError."""
    kind = raw.get("target") if isinstance(raw, Mapping) else None
    if not isinstance(kind, str) or kind not in names():
        raise InputError(
            f"{subject}: {key}.target" if key else f"{subject}: target",
            f"{kind!r} is not a target",
            f"Known: {', '.join(names())}",
        )
    target: Target = parse_section(front(kind).Target, raw, subject, key)
    return target
