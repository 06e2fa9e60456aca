"""The verdict of a gate for others to read: JSON, JUnit XML for CI servers, and Markdown.

Names of devices and of files come from measurements, which may be anyone's: each form escapes them.
"""

import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from exporter.errors import printable
from exporter.files import replacing
from exporter.gate.finding import BASELINE, Finding
from exporter.gate.gate import Verdict

#: Characters that XML 1.0 cannot hold and that `printable` keeps.
_NOT_XML = re.compile("[\ufffe\uffff]")
#: Characters with a meaning in Markdown, and the colon of a link.
_MARKDOWN = re.compile(r"[\\`*_{}\[\]<>|~&!#@$]|:(?=//)")


def as_json(verdict: Verdict) -> dict[str, Any]:
    """The verdict as JSON-compatible data."""
    findings = [asdict(finding) for finding in verdict.findings]
    return {"passed": verdict.passed, "findings": findings, "notes": list(verdict.notes)}


def write_junit(verdict: Verdict, path: Path) -> None:
    """Write JUnit XML: a test suite for each target and device, and a test for each limit."""
    with replacing(path) as file:
        file.write(junit(verdict))


def junit(verdict: Verdict) -> bytes:
    """JUnit XML, as Jenkins, GitLab and GitHub's actions read it."""
    suites: dict[str, list[Finding]] = {}
    for finding in verdict.findings:
        suites.setdefault(_xml_text(finding.place), []).append(finding)
    root = ET.Element("testsuites", {"name": "mobilellm gate", **_totals(verdict.findings)})
    for place, findings in suites.items():
        suite = ET.SubElement(
            root, "testsuite", {"name": place, **_totals(findings), "skipped": "0"}
        )
        for name, finding in zip(_test_names(findings), findings, strict=True):
            classname = f"gate.{place.replace('.', '_')}"
            case = ET.SubElement(suite, "testcase", classname=classname, name=name, time="0")
            said = _xml_text(_said(finding))
            if finding.passed:
                ET.SubElement(case, "system-out").text = said
            else:
                kind = "not measured" if finding.value is None else "limit"
                failure = ET.SubElement(case, "failure", type=kind, message=said)
                failure.text = _xml_text(finding.note)
    ET.indent(root)
    content: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return content + b"\n"


def _totals(findings: Sequence[Finding]) -> dict[str, str]:
    failed = sum(not finding.passed for finding in findings)
    return {
        "tests": str(len(findings)), "failures": str(failed), "errors": "0", "time": "0",
    }  # fmt: skip


def _test_names(findings: Sequence[Finding]) -> Iterator[str]:
    """A name for each finding; a second one of the same name gets a number, since CI servers know
    a test by its name."""
    seen = Counter[str]()
    for finding in findings:
        against = ", against the baseline" if finding.against == BASELINE else ""
        name = _xml_text(finding.name + against)
        seen[name] += 1
        yield f"{name} ({seen[name]})" if seen[name] > 1 else name


def _said(finding: Finding) -> str:
    limit = finding.shown_limit()
    return f"{finding.shown_value()}, limit {limit}" if limit else finding.shown_value()


def _xml_text(text: str) -> str:
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", printable(text))


def write_markdown(verdict: Verdict, title: str, path: Path) -> None:
    """Write the verdict as Markdown; `title` names the bundle."""
    with replacing(path) as file:
        file.write(markdown(verdict, title).encode())


def markdown(verdict: Verdict, title: str) -> str:
    """A table with what failed first, for the summary of a CI job."""
    failed = [finding for finding in verdict.findings if not finding.passed]
    fine = [finding for finding in verdict.findings if finding.passed]
    count = f"{len(failed)} of {len(verdict.findings)} limits broken"
    lines = [
        f"### {_mark(verdict.passed)}: gate of {_plain(title)}",
        "",
        count if failed else f"All {len(fine)} limits hold.",
        "",
        "| result | target | device | figure | value | limit | against | note |",
        "|---|---|---|---|--:|--:|---|---|",
    ]
    for finding in (*failed, *fine):
        cells = (
            finding.target or "", finding.device or "", finding.name, finding.shown_value(),
            finding.shown_limit(), finding.against, finding.note,
        )  # fmt: skip
        lines.append(f"| {_mark(finding.passed)} | {' | '.join(map(_plain, cells))} |")
    lines += ["", *(f"- {_plain(note)}" for note in verdict.notes)]
    return "\n".join(lines).rstrip() + "\n"


def _mark(passed: bool) -> str:
    return "✅ passed" if passed else "❌ FAILED"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return _MARKDOWN.sub(lambda found: f"\\{found[0]}", printable(text))
