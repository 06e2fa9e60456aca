"""Convert text to token ids and back, with the checkpoint's own tokenizer and chat template.

Both may come from anywhere, so each runs in a child process with limits.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from itertools import count
from pathlib import Path

from exporter.child_process import ChildProcess, Limits
from exporter.errors import InputError, short
from exporter.foreign import present, read_bytes, read_json
from exporter.text.documents import Document, Message

#: The files of a model folder that its tokenizer consists of; all but the first may be missing.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
#: The largest tokenizer.json and chat template, in bytes; the largest of 2025 have 35 MB and 20 kB.
TOKENIZER_BYTES, TEMPLATE_BYTES = 64 << 20, 1 << 20
#: Seconds of any call, and for each MB that it reads; a busy machine takes 3 s for an MB of text.
_SECONDS, _SECONDS_PER_MB = 10.0, 20.0
#: Bytes that a child may allocate, also for each byte that a call reads: long texts take 220, and
#: a tokenizer.json 11.
_MEMORY, _MEMORY_PER_BYTE, _MEMORY_PER_TOKENIZER_BYTE = 512 << 20, 1024, 8
#: Bytes of any answer, and for each byte that a call reads.
_ANSWER, _ANSWER_PER_BYTE = 1 << 20, 32
#: Tokenizers that stay open, so that the next use of the same folder starts no process.
_OPEN_TOKENIZERS = 4

_streams = count()
_open = OrderedDict[str, "TextTokenizer"]()


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """The tokenizer of the model folder `path`, made by `load_tokenizer`.

    `special_tokens` are the variables of the chat template, such as `bos_token`. All methods raise
    InputError where the tokenizer or the template fails, or needs more than its limits allow.
    """

    path: Path
    chat_template: str | None
    special_tokens: Mapping[str, str]
    child: ChildProcess

    @property
    def failed(self) -> bool:
        """Whether one of its processes is gone."""
        return self.child.failed or ("_renderer" in vars(self) and self._renderer.failed)

    def encode(self, text: str, special_tokens: bool = False) -> list[int]:
        """The token ids of the text; `special_tokens` adds those that the tokenizer adds."""
        data = _unicode(text)
        arguments = {"special_tokens": special_tokens}
        _, ids = self.child.call("encode", _limits(len(data)), arguments, data)
        return memoryview(ids).cast("I").tolist()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids without special tokens."""
        return self._decode(ids, special_tokens=False)

    def decode_whole(self, ids: Sequence[int]) -> str:
        """The text of these ids with special tokens, which `encode` turns into the same ids."""
        return self._decode(ids, special_tokens=True)

    def stream(self, ids: Iterable[int]) -> Iterator[tuple[int, str]]:
        """Each id with the text that it adds: '' while a character is incomplete."""
        stream, limits = next(_streams), _limits(0)
        for token in ids:
            piece, _ = self.child.call("step", limits, {"stream": stream, "token": token})
            yield token, str(piece)

    def token_of(self, text: str) -> int | None:
        """The id of the token with exactly this text, or None."""
        token, _ = self.child.call("token_of", _limits(0), {"text": text})
        return None if token is None else int(token)

    def text_of(self, token: int) -> str | None:
        """The text of a token as the vocabulary has it, or None."""
        text, _ = self.child.call("text_of", _limits(0), {"token": token})
        return None if text is None else str(text)

    def has_vocabulary_of(self, other: "TextTokenizer") -> bool:
        """Whether both have the same tokens with the same ids."""
        one, two = (each.child.call("vocabulary_hash", _limits(0))[0] for each in (self, other))
        return bool(one == two)

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
        size = sum(len(_unicode(message.content)) for message in messages)
        arguments = {
            "messages": [asdict(message) for message in messages],
            "to_be_answered": to_be_answered,
        }
        _, text = self._renderer.call("render", _limits(size), arguments)
        return text.decode()

    def prompt_text(self, prompt: str, *, raw: bool, system: str | None = None) -> str:
        """The text that the model reads: the prompt itself with `raw` or without a chat template,
        else a conversation."""
        if raw or (self.chat_template is None and system is None):
            return prompt
        return self.chat_text(prompt, system)

    def _decode(self, ids: Sequence[int], *, special_tokens: bool) -> str:
        data = array("I", ids).tobytes()
        arguments = {"special_tokens": special_tokens}
        _, text = self.child.call("decode", _limits(len(data)), arguments, data)
        return text.decode()

    @cached_property
    def _renderer(self) -> ChildProcess:
        """The child of the chat template, which is started when it is first used."""
        if self.chat_template is None:
            raise InputError(self.path, "has no chat template", "Use --raw to give plain text")
        subject, remedy = f"{self.path}: chat template", "Use --raw to give plain text"
        service = "exporter.text.template_service:TemplateService"
        child = ChildProcess(service, subject, "the chat template", remedy)
        arguments = {"subject": subject, "special_tokens": dict(self.special_tokens)}
        child.call("load", _limits(0), arguments, self.chat_template.encode())
        return child


def load_tokenizer(folder: Path) -> TextTokenizer:
    """Read ``tokenizer.json`` and the chat template of a folder. Raises InputError."""
    path = folder / "tokenizer.json"
    if not present(path, TOKENIZER_BYTES):
        raise InputError(path, "no such file", "Text needs the model's tokenizer.json")
    content = read_bytes(path, TOKENIZER_BYTES)
    template, special = template_of(folder)
    key = sha256(content + repr((folder, template, sorted(special.items()))).encode()).hexdigest()
    tokenizer = _open.pop(key, None)
    if tokenizer is None or tokenizer.failed:
        service = "exporter.text.tokenizer_service:TokenizerService"
        child = ChildProcess(service, path, "the tokenizer", "Get the file again")
        limits = _limits(len(content), _MEMORY_PER_TOKENIZER_BYTE)
        child.call("load", limits, {"path": str(path)}, content)
        tokenizer = TextTokenizer(folder, template, special, child)
    _open[key] = tokenizer
    if len(_open) > _OPEN_TOKENIZERS:
        _open.popitem(last=False)
    return tokenizer


def _limits(size: int, memory_per_byte: int = _MEMORY_PER_BYTE) -> Limits:
    """The limits of a call that reads `size` bytes."""
    return Limits(
        seconds=_SECONDS + _SECONDS_PER_MB * size / 2**20,
        memory=_MEMORY + memory_per_byte * size,
        answer=_ANSWER + _ANSWER_PER_BYTE * size,
    )


def _unicode(text: str) -> bytes:
    """The text in UTF-8. Raises InputError for half of a surrogate pair."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError("prompt", f"is not Unicode ({error.reason})", "Give UTF-8") from error


def template_of(folder: Path) -> tuple[str | None, Mapping[str, str]]:
    """The chat template of a folder, if it has one, and its special tokens. Raises InputError."""
    config_path, template_path = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = read_json(config_path) if present(config_path) else {}
    if present(template_path, TEMPLATE_BYTES):
        try:
            template: str | None = read_bytes(template_path, TEMPLATE_BYTES).decode()
        except UnicodeDecodeError as error:
            raise InputError(
                template_path, f"is not UTF-8 ({error.reason})", "Correct it"
            ) from error
    else:
        template = _default_template(config.get("chat_template"), config_path)
    return template, token_texts(config)


def token_texts(config: Mapping[str, object]) -> Mapping[str, str]:
    """The special tokens of a configuration, such as ``bos_token``. Each is given as text or as an
    object with ``content``."""
    found = dict[str, str]()
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            found[key] = text
    return found


def _default_template(value: object, path: Path) -> str | None:
    """The chat template: text, or the one named "default" in a list of named templates."""
    if value is None or isinstance(value, str):
        return value
    templates = dict[str, str]()
    for entry in value if isinstance(value, list) else [value]:
        named = entry if isinstance(entry, dict) else {}
        name, template = named.get("name"), named.get("template")
        if not (isinstance(name, str) and isinstance(template, str)):
            raise InputError(
                f"{path}: chat_template", f"{short(value)} is no template", "Give text"
            )
        templates[name] = template
    return templates.get("default")
