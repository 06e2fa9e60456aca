"""Run one command of the tool in this process, since importing the toolkits takes seconds."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from exporter.cli import main


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output as one JSON object; anything else there is a failure, and so are NaN
        and infinity, which only Python reads."""
        content = json.loads(self.out, parse_constant=pytest.fail)
        assert isinstance(content, dict)
        return content


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    capsys.readouterr()
    with pytest.raises(SystemExit) as raised:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert isinstance(raised.value.code, int)
    return Outcome(raised.value.code, captured.out, captured.err)


def contents(folder: Path) -> dict[str, str]:
    """Every path below `folder`, with the sha256 of files: what "nothing was changed" means."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))
