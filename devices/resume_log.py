"""A log of finished steps, from which an interrupted session resumes: one JSON object a line."""

import json
import os
import threading
from pathlib import Path
from typing import Any

from devices.answers import contained, parse_json
from devices.engines.records import check_record
from devices.errors import DeviceError


class ResumeLog:
    """The results of finished steps, by key and step. Several threads may use it.

    Each is on disk (fsync) when `add` returns. Without a path they are kept in memory only.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._lock = path, threading.Lock()
        self._steps: dict[tuple[str, str], dict[str, Any]] = {}
        self._ends_with_newline = True
        if path is None or path.is_symlink() or not path.is_file():
            return
        text = path.read_text(encoding="utf-8", errors="replace")
        self._ends_with_newline = text.endswith("\n")
        for line in text.splitlines():
            if not line.startswith("{"):
                continue
            try:
                with contained(path, "a line"):
                    entry = parse_json(line, path)
                    content = dict(entry["content"])
                    content["records"] = [check_record(one) for one in content["records"]]
                    self._steps[entry["key"], entry["step"]] = content
            except DeviceError:
                continue  # a kill cut this line off, or it is of something else

    def find(self, key: str, step: str) -> dict[str, Any] | None:
        """The content of a step, or None where it is not finished."""
        with self._lock:
            return self._steps.get((key, step))

    def add(self, key: str, step: str, content: dict[str, Any]) -> None:
        """Store the content of a finished step."""
        line = json.dumps({"key": key, "step": step, "content": content}) + "\n"
        with self._lock:
            self._steps[key, step] = content
            if self._path is None:
                return
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # A link is not followed, and a pipe does not block.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            with os.fdopen(os.open(self._path, flags, 0o666), "a", encoding="utf-8") as file:
                file.write(line if self._ends_with_newline else "\n" + line)
                self._ends_with_newline = True
                file.flush()
                os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete the file: the result that it was kept for is written."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
