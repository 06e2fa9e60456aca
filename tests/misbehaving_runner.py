"""Services for tests: artifacts whose runtime crashes, or gives what no artifact has."""

import ctypes

from exporter.inference.artifact_runner import Service


class Crashing(Service):
    def prefill(self, _: bytes, tokens: list[int]) -> tuple[None, bytes]:
        ctypes.string_at(0)
        return None, b""


class Lying(Service):
    vocab_size = 512

    def load(self, _: bytes, **arguments: object) -> tuple[list[int], bytes]:
        return [1024, self.vocab_size], b""

    def prefill(self, _: bytes, tokens: list[int]) -> tuple[None, bytes]:
        return None, bytes(4 * 511)


class Boasting(Lying):
    vocab_size = 10**9
