"""What the options of every format have in common."""

from typing import Annotated, ClassVar

from pydantic import AfterValidator

from exporter.settings import Section, refusal


def _long_enough(value: int) -> int:
    if value < 2:
        raise refusal(f"{value} is too short", "Give 2 or more")
    return value


#: The length of a KV cache in tokens.
Context = Annotated[int, AfterValidator(_long_enough)]


class Target(Section):
    """Facts of a deployment, never bits. `target` names the format."""

    #: Whether a recipe that names no targets is for this one.
    by_default: ClassVar[bool] = False

    target: str
    max_context: Context = 2048
