"""The command line: its arguments, its commands, and the display of results.

mobilellm --help
"""

import json
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

from rich.markup import escape

from exporter.cli import arguments, display
from exporter.cli.commands import BAD_INPUT, COMMANDS, INTERRUPTED, SUCCESS
from exporter.errors import ExporterError


def main(typed: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its exit code."""
    args = arguments.parse(typed, COMMANDS)
    logger = logging.getLogger("exporter")
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.DEBUG if args.verbose else logging.WARNING)
    try:
        code = args.run(args)
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
