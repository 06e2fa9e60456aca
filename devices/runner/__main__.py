"""``python -m devices.runner build --arch host|aarch64|x86_64``: prints the folder."""

import argparse
import platform
import sys

from devices.errors import DeviceError
from devices.runner import COMPILERS, build


def main() -> int:
    parser = argparse.ArgumentParser("python -m devices.runner", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    sub = commands.add_parser("build", help="build the native runner and the memory probe")
    sub.add_argument("--arch", choices=["host", *COMPILERS], default="host")
    args = parser.parse_args()
    try:
        made = build(platform.machine() if args.arch == "host" else args.arch)
    except DeviceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(made.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
