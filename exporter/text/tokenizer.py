"""Convert text to token ids and back, with the checkpoint's own tokenizer and chat template."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from exporter.errors import InputError
from exporter.files import read_json
from exporter.text.documents import Document, Message

#: The files of a model folder that its tokenizer consists of; all but the first may be missing.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class TextTokenizer:
    """The tokenizer of the model folder `path`, made by `load_tokenizer`.

    `special_tokens` are the variables of the chat template, such as `bos_token`.
    """

    path: Path
    tokenizer: Tokenizer
    chat_template: str | None
    special_tokens: Mapping[str, str]

    def encode(self, text: str) -> list[int]:
        """The token ids of the text; no special tokens are added. Raises InputError."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError("prompt", f"is not Unicode ({error.reason})", "Give UTF-8") from error
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids without special tokens."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def decode_whole(self, ids: Sequence[int]) -> str:
        """The text of these ids with special tokens, which `encode` turns into the same ids."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def stream(self, ids: Iterable[int]) -> Iterator[tuple[int, str]]:
        """Each id with the text that it adds: '' while a character is incomplete."""
        stream = DecodeStream(skip_special_tokens=True)
        for token in ids:
            yield token, stream.step(self.tokenizer, token) or ""

    def chat_text(self, prompt: str, system: str | None = None) -> str:
        """The prompt as a conversation that the model is to answer. Raises InputError."""
        messages = [Message("system", system)] if system else []
        return self.conversation_text([*messages, Message("user", prompt)], to_be_answered=True)

    def document_text(self, document: Document) -> str:
        """Plain text unchanged; a conversation as the chat template writes it, or as paragraphs
        where the model has no template."""
        if isinstance(document, str):
            return document
        if self.chat_template is None:
            return "\n\n".join(message.content for message in document)
        return self.conversation_text(document, to_be_answered=False)

    def conversation_text(self, messages: Sequence[Message], *, to_be_answered: bool) -> str:
        """A conversation as the chat template writes it. Raises InputError.

        With `to_be_answered` it ends where the model's turn begins.
        """
        if self.chat_template is None:
            raise InputError(self.path, "has no chat template", "Use --raw to give plain text")
        variables = {"tools": None, "documents": None, **self.special_tokens}
        try:
            return _ENVIRONMENT.from_string(self.chat_template).render(
                messages=[asdict(message) for message in messages],
                add_generation_prompt=to_be_answered,
                **variables,
            )
        except Exception as error:  # a template is a program and may raise anything
            raise InputError(
                f"{self.path}: chat template",
                f"cannot be rendered ({error})",
                "Correct it, or use --raw to give plain text",
            ) from error

    def prompt_text(self, prompt: str, *, raw: bool, system: str | None = None) -> str:
        """The text that the model reads: the prompt itself with `raw` or without a chat template,
        else a conversation."""
        if raw or (self.chat_template is None and system is None):
            return prompt
        return self.chat_text(prompt, system)


def load_tokenizer(folder: Path) -> TextTokenizer:
    """Read ``tokenizer.json`` and the chat template of a folder. Raises InputError."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(path, "no such file", "Text needs the model's tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(path, f"is not a tokenizer ({error})", "Get the file again") from error
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    template_path = folder / "chat_template.jinja"
    if template_path.is_file():
        template: str | None = template_path.read_text(encoding="utf-8")
    else:
        template = _default_template(config.get("chat_template"), config_path)
    tokens = {key: _token_text(value) for key, value in config.items() if key.endswith("_token")}
    special = {key: text for key, text in tokens.items() if text is not None}
    return TextTokenizer(folder, tokenizer, template, special)


def _token_text(value: object) -> str | None:
    """The text of a special token, which is given as text or as an object with ``content``."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _default_template(value: object, path: Path) -> str | None:
    """The chat template: text, or the one named "default" in a list of named templates."""
    if value is None or isinstance(value, str):
        return value
    templates = dict[str, str]()
    for entry in value if isinstance(value, list) else [value]:
        if not isinstance(entry, dict) or not {"name", "template"} <= entry.keys():
            raise InputError(f"{path}: chat_template", f"{value!r} is no template", "Give text")
        templates[str(entry["name"])] = str(entry["template"])
    return templates.get("default")


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


_ENVIRONMENT = _environment()
