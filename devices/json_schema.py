"""Checks of JSON content against a JSON schema."""

from collections.abc import Mapping
from typing import Any

from devices.errors import BadDeviceError


def check_schema(content: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise BadDeviceError, with the path in it, where JSON content does not follow a schema."""
    import jsonschema

    try:
        jsonschema.validate(content, wanted, format_checker=jsonschema.FormatChecker())
    except jsonschema.ValidationError as error:
        place = ".".join(map(str, error.absolute_path)) or "the report"
        raise BadDeviceError(place, f"does not follow the schema ({error.message})") from error
