"""What the command line shows: tables and JSON on stdout, progress and errors on stderr."""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

#: Where stderr is no terminal, long work says how far it is this often.
_SECONDS_BETWEEN_LINES = 30

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)
#: For tables: names are never cut off, the terminal wraps what is too long for it.
wide = Console(highlight=False, width=400)


def table(*columns: str, title: str | None = None) -> Table:
    return Table(*columns, title=title, title_justify="left", box=None, pad_edge=False)


class Clock:
    """Wall time of a block, and the peak memory of this process."""

    def __enter__(self) -> "Clock":
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._seconds = time.perf_counter() - self._started

    def figures(self) -> dict[str, float]:
        # Linux counts in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"seconds": round(self._seconds, 3), "peak_rss_bytes": peak}

    def facts(self) -> dict[str, str]:
        figures = self.figures()
        memory = megabytes(int(figures["peak_rss_bytes"]))
        return {"took": f"{figures['seconds']:.1f} s, peak memory {memory}"}


@contextmanager
def progress() -> Iterator[Callable[..., None]]:
    """A bar on stderr for each stage, with its note; now and then a line where stderr is no
    terminal."""
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}")),
    )
    with Progress(*columns, console=err, transient=True) as bars:
        tasks, said = dict[str, Any](), dict[str, float]()

        def show(stage: str, done: int, total: int, note: str = "") -> None:
            if not err.is_terminal:
                now = time.monotonic()
                if stage not in said:
                    said[stage] = now
                    err.print(f"{stage} … {'' if done else note}".rstrip())
                elif now - said[stage] >= _SECONDS_BETWEEN_LINES:
                    said[stage] = now
                    err.print(f"{stage}: {done} of {total} {note}")
                return
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, note=note)
            bars.update(tasks[stage], completed=done, total=total, note=note)

        yield show


def print_json(content: dict[str, Any]) -> int:
    """As RFC 8259 has it, which knows neither infinity nor NaN: null, for jq and for JavaScript."""
    plain = json.loads(json.dumps(content, default=str), parse_constant=lambda _name: None)
    print(json.dumps(plain, ensure_ascii=False, allow_nan=False))
    return 0


def print_facts(title: str, facts: dict[str, str]) -> None:
    out.print(f"[bold]{escape(title)}[/]")
    width = max(map(len, facts))
    for key, value in facts.items():
        out.print(f"  {key:<{width}}  {escape(value)}")


def print_checks(checks: Sequence[Any]) -> None:
    """Passed checks of a kind in one line; every failed one with where and how much."""
    from exporter.verification import failures

    kinds = dict[tuple[str, str | None], list[Any]]()
    for check in checks:
        kinds.setdefault((check.check, check.target), []).append(check)
    rows = table("", "check", "target", "value", "limit", "what")
    for (name, target), group in kinds.items():
        failed = list(failures(group))
        for check in failed or group[:1]:
            single = len(group) == 1 or failed
            what = f"{check.subject}: {check.note}" if check.note else check.subject
            rows.add_row(
                "[red]✗[/]" if failed else "[green]✓[/]" if check.limit is not None
                or not single else "[dim]·[/]",
                name,
                target or "",
                figure(check.value) if single else "",
                figure(check.limit) if single else "",
                escape(what) if single else f"{len(group)} of {len(group)}",
            )  # fmt: skip
    wide.print(rows)
    count = len(list(failures(checks)))
    if count:
        out.print(f"[bold red]{count} of {len(checks)} checks failed[/]")
    else:
        out.print(f"[bold green]all {len(checks)} checks passed[/]")


def print_evaluation(path: str, found: Any, more: dict[str, str]) -> None:
    """The figures of one model, then how they change along the text."""
    facts = {"runs as": found.kind}
    text, task, generations = found.text, found.task, found.generations
    if text:
        facts["perplexity"] = f"{text.perplexity:.3f} ± {text.perplexity_error:.3f}" + (
            f" (reference {text.reference_perplexity:.3f})" if text.kl is not None else ""
        )
        if text.kl is not None:
            facts["KL"] = f"{text.kl:.4g} nats"
            facts["top-1 agreement"] = f"{text.top1_agreement:.1%}"
        facts["measured on"] = f"{text.tokens:,} predictions in {text.sequences:,} sequences"
    if task:
        facts["accuracy"] = f"{task.accuracy:.1%} of {task.problems:,} problems"
        facts["with an answer"] = f"{task.answered:.1%}"
        facts["never ended"] = f"{task.never_ended:.1%}"
        facts["tokens an answer"] = f"{task.mean_tokens:.1f}"
    if generations:
        count = generations.generations
        facts["same generations"] = f"{generations.identical_generations:.1%} of {count:,}"
        facts["first divergence"] = f"at {generations.median_first_divergence:g} (median)"
    print_facts(path, facts | more)
    if text:
        rows = table("positions", "perplexity", "KL", "top-1 agreement", title="Along the text")
        for band in text.agreement_by_position:
            top1 = "" if band.top1_agreement is None else f"{band.top1_agreement:.1%}"
            cells = figure(band.perplexity), figure(band.kl), top1
            rows.add_row(f"{band.first}–{band.last}", *cells)
        wide.print("", rows)
    if generations:
        rows = table("positions", "same token", title="Along the generations")
        for band in generations.generation_agreement_by_position:
            rows.add_row(f"{band.first}–{band.last}", f"{band.agreement:.1%}")
        wide.print("", rows)


def figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def float_weights(quantized: Any) -> dict[str, str]:
    """name → why it is not quantized."""
    tensors = quantized.manifest["tensors"]
    return {name: entry["reason"] for name, entry in tensors.items() if "reason" in entry}


def float_facts(quantized: Any) -> dict[str, str]:
    """The float weights by reason, layers run together."""
    reasons = dict[str, dict[str, int]]()
    for name, reason in float_weights(quantized).items():
        pattern = ".".join("N" if part.isdigit() else part for part in name.split("."))
        counts = reasons.setdefault(reason, {})
        counts[pattern] = counts.get(pattern, 0) + 1
    return {
        "left in float": "; ".join(
            f"{', '.join(f'{p} ({n}×)' if n > 1 else p for p, n in patterns.items())}: {reason}"
            for reason, patterns in reasons.items()
        )
    }
