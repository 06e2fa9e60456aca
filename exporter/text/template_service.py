"""The child process of a chat template: renders conversations, with `jinja2`.

A template is a program of the model's author. The sandbox of jinja2 keeps it from the objects of
Python, but it does not limit its time and memory, which the child process does.
"""

import json
from collections.abc import Mapping, Sequence

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from exporter.errors import InputError


class TemplateService:
    """One chat template with its variables, such as ``bos_token``."""

    _subject: str
    _text: str
    _variables: Mapping[str, object]

    def __init__(self) -> None:
        self._template: Template | None = None

    def load(
        self, data: bytes, subject: str, special_tokens: Mapping[str, str]
    ) -> tuple[None, bytes]:
        """Keep the template `data`; it is compiled when it is first used."""
        self._subject, self._text = subject, data.decode()
        self._variables = {"tools": None, "documents": None, **special_tokens}
        return None, b""

    def render(
        self, _: bytes, messages: Sequence[Mapping[str, str]], to_be_answered: bool
    ) -> tuple[None, bytes]:
        """A conversation as text in UTF-8. Raises InputError."""
        try:
            if self._template is None:
                self._template = _environment().from_string(self._text)
            text = self._template.render(
                messages=messages, add_generation_prompt=to_be_answered, **self._variables
            )
            return None, text.encode()
        except MemoryError:
            raise
        except Exception as error:  # a template is a program and may raise anything
            raise InputError(
                self._subject,
                f"cannot be rendered ({error})",
                "Correct it, or use --raw to give plain text",
            ) from error


class _GenerationBlock(Extension):
    """``{% generation %}`` marks an answer for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that transformers gives to chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    environment.globals["raise_exception"] = _raise_template_error
    environment.filters["tojson"] = _to_json
    return environment
