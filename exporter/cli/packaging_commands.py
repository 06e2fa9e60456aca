"""One function per command that packages a bundle, judges it or publishes it.

As in `exporter.cli.commands`, each imports what it needs, displays the result and returns the exit
code.
"""

import argparse

from exporter.cli import display
from exporter.cli.exit_codes import CHECK_FAILED, SUCCESS


def package(args: argparse.Namespace) -> int:
    """Add measurements to a bundle, sign it, and write it as a folder or as an archive."""
    from exporter import packaging
    from exporter.cli import display_models

    with display.progress() as progress, display.Clock() as clock:
        packaged = packaging.package(
            args.bundle,
            args.output,
            packaging.Request(args.result, args.sign, args.sign_keyless, args.overwrite),
            progress,
        )
    display_models.print_packaged(packaged, clock, args.json)
    return SUCCESS


def gate(args: argparse.Namespace) -> int:
    """Compare a bundle with a budget and a baseline."""
    from devices.files import check_replaceable
    from exporter.cli import display_gate
    from exporter.gate import outputs
    from exporter.gate.gate import gate as judge_bundle

    for path in filter(None, (args.junit, args.markdown)):
        check_replaceable(path)
    with display.progress() as progress:
        verdict = judge_bundle(args.bundle, args.budget, args.baseline, args.result, progress)
    if args.junit:
        outputs.write_junit(verdict, args.junit)
    if args.markdown:
        outputs.write_markdown(verdict, args.bundle.name, args.markdown)
    display_gate.print_verdict(verdict, args.json)
    return SUCCESS if verdict.passed else CHECK_FAILED


def report(args: argparse.Namespace) -> int:
    """Write a report on bundles."""
    from exporter.cli import display_models
    from exporter.report.write import write_report

    with display.Clock() as clock:
        written = write_report(args.bundles, args.output, args.markdown, args.result)
    display_models.print_report(written, clock, args.json)
    return SUCCESS


def publish(args: argparse.Namespace) -> int:
    """Publish a bundle to a folder, an OCI registry or the model hub."""
    from exporter.cli import display_publishing
    from exporter.publishing.publish import publish as publish_bundle

    with display.progress() as progress:
        published = publish_bundle(args.bundle, args.to, args.yes, progress, args.overwrite)
    display_publishing.print_published(published, args.json)
    return SUCCESS


#: The commands, in the order of the help.
PACKAGING = (package, gate, report, publish)
