"""What an interrupted session has measured already: one line for each finished step."""

import json
import os
import threading
from pathlib import Path
from typing import Any


class ResumeLog:
    """Steps by key, on disk as soon as they are done. Without a path it only remembers."""

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._lock = path, threading.Lock()
        self._steps: dict[tuple[str, str], dict[str, Any]] = {}
        self._whole = True
        if path is None or not path.is_file():
            return
        text = path.read_text(encoding="utf-8")
        self._whole = text.endswith("\n")
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self._steps[entry["key"], entry["step"]] = entry["content"]
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # the line that a kill cut off

    def find(self, key: str, step: str) -> dict[str, Any] | None:
        with self._lock:
            return self._steps.get((key, step))

    def add(self, key: str, step: str, content: dict[str, Any]) -> None:
        line = json.dumps({"key": key, "step": step, "content": content}) + "\n"
        with self._lock:
            self._steps[key, step] = content
            if self._path is None:
                return
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line if self._whole else "\n" + line)
                self._whole = True
                file.flush()
                os.fsync(file.fileno())

    def remove(self) -> None:
        """Everything is in the result now."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
