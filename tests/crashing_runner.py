"""A service for tests: an artifact whose runtime crashes when it reads a prompt."""

import ctypes

from exporter.inference.artifact_runner import Service


class Crashing(Service):
    def prefill(self, _: bytes, tokens: list[int]) -> tuple[None, bytes]:
        ctypes.string_at(0)
        return None, b""
