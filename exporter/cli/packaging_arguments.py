"""The arguments of the commands that package a bundle, judge it and publish it."""

import argparse
from collections.abc import Callable
from pathlib import Path

#: Adds a command: name, summary, example and details.
AddCommand = Callable[..., argparse.ArgumentParser]

_BUNDLE = "folder from mobilellm export or package, or an archive from mobilellm package"


def add_commands(command: AddCommand) -> None:
    """Add the commands package, gate, report and publish."""
    _package_arguments(
        command(
            "package",
            "Add measurements to a bundle, sign it, and write it as a folder or as one archive",
            "mobilellm package build/nano --result nano.json -o nano.tar.zst",
            "The same inputs give the same bytes. A signature is the exception: it is random.",
        )
    )
    _gate_arguments(
        command(
            "gate",
            "Compare a bundle with a budget and with a baseline: pass or fail, for CI",
            "mobilellm gate nano.tar.zst --budget examples/ci/budget.yaml",
            "The exit code is 1 if a limit is broken, and if a limit has no measurement.",
        )
    )
    _report_arguments(
        command(
            "report",
            "Write a report on one or several bundles: one HTML page that needs no network",
            "mobilellm report nano.tar.zst -o report.html",
        )
    )
    _publish_arguments(
        command(
            "publish",
            "Publish a bundle to a folder, an OCI registry or the model hub",
            "mobilellm publish nano.tar.zst --to oci://localhost:5000/nano:1",
            "Without --yes nothing is written: the command shows what it would do.",
        )
    )


def result_argument(sub: argparse.ArgumentParser, text: str) -> None:
    """--result, which can be repeated."""
    sub.add_argument(
        "--result", action="append", default=[], type=Path, metavar="FILE", help=text
    )  # fmt: skip


def _package_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("bundle", metavar="BUNDLE", type=Path, help=_BUNDLE)
    result_argument(
        sub,
        "a measurement of this bundle to add: a file from evaluate or profile -o; can be repeated",
    )
    sub.add_argument(
        "--sign", type=Path, metavar="KEY",
        help="sign the bundle with this private key (PEM, elliptic curve)",
    )  # fmt: skip
    sub.add_argument(
        "--sign-keyless", action="store_true",
        help="sign with a short-lived certificate from sigstore, which needs the network",
    )  # fmt: skip
    sub.add_argument(
        "-o", "--output", required=True, type=Path, metavar="PATH",
        help="a new folder, or an archive that ends with .tar.zst or .zip",
    )  # fmt: skip
    sub.add_argument("--overwrite", action="store_true", help="replace an earlier output")


def _gate_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("bundle", metavar="BUNDLE", type=Path, help=_BUNDLE)
    sub.add_argument(
        "--budget", required=True, type=Path, metavar="FILE",
        help="the limits and tolerances, as YAML; docs/gate.md describes them",
    )  # fmt: skip
    sub.add_argument(
        "--baseline", type=Path, metavar="BUNDLE",
        help="also compare with an earlier bundle, as a folder or an archive with its measurements",
    )  # fmt: skip
    result_argument(
        sub,
        "a measurement of this bundle that is not in it: a file from evaluate, profile or count "
        "-o; can be repeated",
    )
    sub.add_argument(
        "--junit", type=Path, metavar="FILE", help="write the verdict as JUnit XML, for CI servers"
    )
    sub.add_argument(
        "--markdown", type=Path, metavar="FILE",
        help="write the verdict as Markdown, for example to $GITHUB_STEP_SUMMARY",
    )  # fmt: skip


def _report_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("bundles", metavar="BUNDLE", type=Path, nargs="+", help=_BUNDLE)
    result_argument(sub, "a measurement to show beside those in the bundles; can be repeated")
    sub.add_argument(
        "-o", "--output", required=True, type=Path, metavar="FILE",
        help="the HTML page; an earlier file is replaced",
    )  # fmt: skip
    sub.add_argument(
        "--markdown", type=Path, metavar="FILE",
        help="also write the tables as Markdown; an earlier file is replaced",
    )  # fmt: skip


def _publish_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("bundle", metavar="BUNDLE", type=Path, help=_BUNDLE)
    sub.add_argument(
        "--to", required=True, metavar="DESTINATION",
        help="a folder, oci://HOST:PORT/NAME:TAG, or hub:OWNER/NAME",
    )  # fmt: skip
    sub.add_argument(
        "--yes", action="store_true", help="publish; without it, only say what would be"
    )
    sub.add_argument(
        "--overwrite", action="store_true", help="replace another bundle at the destination"
    )
