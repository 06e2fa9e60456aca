"""The command line: its arguments, its commands, and the display of results.

mobilellm --help
"""

import argparse
import io
import json
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

from rich.markup import escape

from exporter.cli import arguments, display
from exporter.cli.commands import COMMANDS
from exporter.cli.exit_codes import BAD_INPUT, INTERRUPTED, SUCCESS
from exporter.errors import ExporterError, InputError


def _run(args: argparse.Namespace) -> int:
    """Run the command. What exhausts the memory or the stack is bad input, as a last resort."""
    try:
        code: int = args.run(args)
        return code
    except (MemoryError, RecursionError) as error:
        logging.getLogger("exporter").debug("%s", error, exc_info=True)
        what = "more memory than there is" if isinstance(error, MemoryError) else "too deep a stack"
        raise InputError(
            "this input", f"needs {what}", "Check its files; -v shows where"
        ) from error


def main(typed: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may be of another encoding
            stream.reconfigure(errors="backslashreplace")
    args = arguments.parse(typed, COMMANDS)
    logger = logging.getLogger("exporter")
    logger.handlers = [logging.StreamHandler()]
    logger.setLevel(logging.DEBUG if args.verbose else logging.WARNING)
    try:
        code = _run(args)
    except BrokenPipeError:  # the reader closed the pipe, as `| head` does
        sys.stderr.close()
        code = SUCCESS
    except (ExporterError, OSError) as error:  # OSError: for example a full disk
        if args.json:
            print(json.dumps({"error": str(error)}))
        display.err.print(f"[bold red]error:[/] {escape(str(error))}")
        code = BAD_INPUT
    except KeyboardInterrupt:
        display.err.print("interrupted; run the same command again to resume")
        code = INTERRUPTED
    sys.exit(code)
