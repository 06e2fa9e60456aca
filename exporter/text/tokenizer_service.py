"""The child process of a tokenizer: turns text into token ids and back, with `tokenizers`."""

from array import array
from collections import OrderedDict
from hashlib import sha256

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from exporter.errors import InputError

#: Streams that are open at once; older ones are forgotten.
_STREAMS = 16
#: Token ids that a byte of text may give, and any text. Normalizers may turn a character into 18.
_IDS_PER_BYTE, _IDS = 8, 1024


class TokenizerService:
    """One tokenizer. Token ids are bytes, 4 each; text is bytes in UTF-8."""

    _path: str
    _tokenizer: Tokenizer

    def __init__(self) -> None:
        self._streams = OrderedDict[int, DecodeStream]()

    def load(self, data: bytes, path: str) -> tuple[None, bytes]:
        """Read ``tokenizer.json``, whose content is `data`. Raises InputError."""
        try:
            self._tokenizer = Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises bare Exception
            raise InputError(path, f"is not a tokenizer ({error})", "Get the file again") from error
        self._path = path
        return None, b""

    def encode(self, data: bytes, special_tokens: bool) -> tuple[None, bytes]:
        """The ids of a text, with the special tokens that the tokenizer adds if asked for."""
        encoding = self._tokenizer.encode(data.decode(), add_special_tokens=special_tokens)
        ids = encoding.ids
        if len(ids) > _IDS + _IDS_PER_BYTE * len(data):
            raise InputError(
                self._path,
                f"turns {len(data):,} bytes of text into {len(ids):,} tokens; the limit is "
                f"{_IDS_PER_BYTE} a byte",
                "Get the file again",
            )
        return None, array("I", ids).tobytes()

    def decode(self, data: bytes, special_tokens: bool) -> tuple[None, bytes]:
        """The text of ids, with special tokens or without."""
        ids = memoryview(data).cast("I").tolist()
        text = self._tokenizer.decode(ids, skip_special_tokens=not special_tokens)
        return None, text.encode()

    def step(self, _: bytes, stream: int, token: int) -> tuple[str, bytes]:
        """The text that one more token adds to the text of a stream."""
        if stream not in self._streams:
            self._streams[stream] = DecodeStream(skip_special_tokens=True)
            if len(self._streams) > _STREAMS:
                self._streams.popitem(last=False)
        return self._streams[stream].step(self._tokenizer, token) or "", b""

    def token_of(self, _: bytes, text: str) -> tuple[int | None, bytes]:
        """The id of a token, if there is such a token."""
        return self._tokenizer.token_to_id(text), b""

    def text_of(self, _: bytes, token: int) -> tuple[str | None, bytes]:
        """The text of a token as the vocabulary has it, if there is such a token."""
        return self._tokenizer.id_to_token(token), b""

    def vocabulary_hash(self, _: bytes) -> tuple[str, bytes]:
        """The SHA-256 of all tokens and their ids."""
        vocabulary = sorted(self._tokenizer.get_vocab().items())
        return sha256(repr(vocabulary).encode()).hexdigest(), b""
