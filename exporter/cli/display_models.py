"""Display checkpoints, recipes, artifacts, checks, evaluations and answers."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from exporter.cli import display
from exporter.cli.display import Clock, figure, megabytes, out, print_facts, table, wide
from exporter.errors import printable

if TYPE_CHECKING:  # they load torch
    from devices.catalogue import KnownDevice
    from exporter.backends import Inspection
    from exporter.bundle.artifact import FinishedArtifact
    from exporter.forecast import Forecast
    from exporter.inference.answer import Answer
    from exporter.model.checkpoint import Checkpoint
    from exporter.packaging import Packaged
    from exporter.pipeline import Export
    from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
    from exporter.recipe import Recipe
    from exporter.report.write import Written
    from exporter.stages import Stages

_ROUNDING = {
    "float32": "exact",
    "float16": "code times scale rounded to 11 significant bits",
    "bfloat16": "code times scale rounded to 8 significant bits",
}


def print_checkpoint(
    checkpoint: "Checkpoint",
    forecasts: "Sequence[Forecast]",
    device: "KnownDevice | None",
    as_json: bool,
) -> int:
    """Print the architecture, and the predicted sizes and speeds of each recipe."""
    config = checkpoint.config
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in checkpoint.tensors.values()})
    if as_json:
        return display.print_json(
            {
                "path": str(checkpoint.path),
                "parameters": checkpoint.parameter_count,
                "dtypes": dtypes,
                "config": asdict(config),
                "bos_token_id": checkpoint.bos_token_id,
                "eos_token_ids": checkpoint.eos_token_ids,
                "recipes": [asdict(forecast) for forecast in forecasts],
            }
        )
    facts = {
        "architecture": f"{config.model_type}, {config.num_hidden_layers} layers",
        "parameters": f"{checkpoint.parameter_count:,} ({', '.join(dtypes)})",
        "embedding": f"{config.vocab_size:,} tokens × {config.hidden_size}, "
        + ("tied to the output layer" if config.tie_word_embeddings else "separate output layer"),
        "attention": f"{config.num_attention_heads} heads over {config.num_key_value_heads} "
        f"k/v heads of {config.head_dim}" + (", q/k norm" if config.use_qk_norm else ""),
        "context": f"{config.max_position_embeddings:,} tokens",
    }
    print_facts(str(checkpoint.path), facts)
    speeds = (f"decode tokens/s on {device.name}, empty to full cache",) if device else ()
    columns = "recipe", "target", "file", "KV cache", "memory", *speeds
    rows = table(*columns, title="Predicted")
    for column in rows.columns[2:]:
        column.justify = "right"
    for forecast in forecasts:
        sizes = forecast.prediction
        if sizes is None:
            continue
        rows.add_row(
            forecast.recipe,
            forecast.target,
            *map(megabytes, (sizes.file, sizes.kv_cache, sizes.memory)),
            *([" to ".join(f"{s.decode:.0f}" for s in forecast.speeds)] if device else []),
        )
    wide.print(rows)
    for forecast in forecasts:
        if forecast.prediction is None:
            out.print(f"[dim]{forecast.recipe} does not fit: {escape(forecast.problem)}[/]")
    return 0


def print_inspection(found: "Inspection", as_json: bool) -> int:
    """Print the content of a file of a format."""
    if as_json:
        return display.print_json(dict(found.content))
    print_facts(found.title, dict(found.facts))
    for one in found.tables:
        rows = table(*one.columns, title=one.title)
        for cells in one.rows:
            rows.add_row(*map(escape, cells))
        for column in rows.columns[1:] if one.numbers else ():
            column.justify = "right"
        wide.print(rows, "")
    for note in found.notes:
        out.print(f"[dim]{note}[/]")
    return 0


def print_quantized(
    title: str,
    quantized: "QuantizedCheckpoint",
    dequantized: tuple[Path, str] | None,
    clock: Clock,
    as_json: bool,
) -> int:
    """Print a quantized checkpoint. `dequantized` is the folder and dtype of --dequantize."""
    size = folder_bytes(quantized.path)
    if as_json:
        return display.print_json(
            {
                "path": str(quantized.path),
                "bytes": size,
                "float_weights": float_weights(quantized),
                **clock.figures(),
            }
        )
    facts = {"quantized checkpoint": f"{megabytes(size)} in {quantized.path}"}
    if dequantized:
        folder, dtype = dequantized
        facts["dequantized"] = f"{folder} ({dtype}: {_ROUNDING[dtype]})"
    print_facts(title, facts | float_facts(quantized) | clock.facts())
    return 0


def print_artifact(
    finished: "FinishedArtifact",
    quantized: "QuantizedCheckpoint",
    path: Path,
    clock: Clock,
    as_json: bool,
) -> int:
    """Print one artifact in the folder `path`."""
    size = folder_bytes(finished.artifact.path)
    if as_json:
        content = {"path": str(path), "bytes": size, **finished.manifest, **clock.figures()}
        return display.print_json(content)
    facts = {"artifact": f"{megabytes(size)} in {path}"}
    title = finished.artifact.target.target
    print_facts(title, facts | float_facts(quantized) | clock.facts())
    return 0


def print_export(
    result: "Export", path: Path, pruned: int | None, clock: Clock, as_json: bool
) -> None:
    """Print the sizes of a bundle's parts, what happened to each stage, and the checks. `pruned` is
    the number of stages that were removed from the store."""
    sizes = {
        name: folder_bytes(finished.artifact.path) for name, finished in result.artifacts.items()
    }
    stages = result.stages
    if as_json:
        display.print_json(
            {
                "path": str(path),
                "passed": result.bundle is not None,
                "bytes": sizes,
                "float_weights": float_weights(result.quantized),
                "stages": stages.results,
                "damaged_stages": stages.damaged,
                "checks": [asdict(check) for check in result.checks],
                **({} if pruned is None else {"pruned_stages": pruned}),
                **clock.figures(),
            }
        )
        return
    facts = {"quantized": megabytes(folder_bytes(result.quantized.path))}
    facts |= {name: megabytes(size) for name, size in sizes.items()}
    facts |= float_facts(result.quantized) | _stage_facts(stages)
    if pruned is not None:
        facts["pruned"] = f"{pruned} stages of {stages.folder}"
    print_facts(str(path), facts | clock.facts())
    print_checks(result.checks)
    if result.bundle is None:
        display.err.print("[bold red]no bundle:[/] a check failed")


def _stage_facts(stages: "Stages") -> dict[str, str]:
    """The stages by what happened to them, and what was damaged in the store."""
    groups = dict[str, list[str]]()
    for stage, happened in stages.results.items():
        groups.setdefault(happened, []).append(stage)
    facts = {happened: ", ".join(names) for happened, names in groups.items()}
    if "found" in facts:
        facts["found"] += f" (in {stages.folder})"
    if groups.keys() == {"unchanged"}:
        facts["unchanged"] += ": every file has its hash, and nothing was done"
    damaged = (f"{stage} was made again ({why})" for stage, why in stages.damaged.items())
    return facts | ({"damaged": "; ".join(damaged)} if stages.damaged else {})


def print_packaged(packaged: "Packaged", clock: Clock, as_json: bool) -> None:
    """Print what was packaged."""
    if as_json:
        content = asdict(packaged) | {"path": str(packaged.path)}
        display.print_json({**content, **clock.figures()})
        return
    signed = "yes" if packaged.signed else "no (--sign KEY signs it)"
    facts = {"size": megabytes(packaged.bytes), "files": f"{len(packaged.files):,}"}
    print_facts(str(packaged.path), facts | {"signed": signed} | clock.facts())


def print_report(written: "Written", clock: Clock, as_json: bool) -> None:
    """Print what a report was written to, and its size."""
    if as_json:
        content = {"path": str(written.page), "bytes": written.bytes, "bundles": written.bundles}
        markdown = None if written.markdown is None else str(written.markdown)
        display.print_json({**content, "markdown": markdown, **clock.figures()})
        return
    facts = {"size": f"{written.bytes / 1e3:,.0f} kB", "bundles": ", ".join(written.bundles)}
    facts |= {} if written.markdown is None else {"markdown": str(written.markdown)}
    print_facts(str(written.page), facts | clock.facts())


def print_verification(checks: Sequence[Any], passed: bool, as_json: bool) -> None:
    """Print the checks of a bundle or of a quantized checkpoint."""
    if as_json:
        display.print_json({"passed": passed, "checks": [asdict(check) for check in checks]})
    else:
        print_checks(checks)


def print_answer(answer: "Answer", as_json: bool) -> int:
    """Stream the text to stdout, then print the times on stderr."""
    pieces = []
    for piece in answer:
        pieces.append(piece)
        if not as_json:
            print(printable(piece, lines=True), end="", flush=True)
    generation, seconds = answer.generation, answer.seconds
    if as_json:
        return display.print_json(
            {
                "prompt_text": answer.prompt_text,
                "prompt_tokens": generation.prompt,
                "tokens": generation.tokens,
                "text": "".join(pieces),
                "finish_reason": generation.finish_reason,
                "seconds": seconds,
            }
        )
    print()
    display.err.print(
        f"[dim]{answer.kind}: prefill of {len(generation.prompt)} tokens in "
        f"{seconds['prefill']:.2f} s, decoding of {len(generation.tokens)} in "
        f"{seconds['decode']:.2f} s ({generation.finish_reason})[/]"
    )
    return 0


def print_recipes(recipes: "Sequence[Recipe]", as_json: bool) -> int:
    """Print one line per recipe."""
    if as_json:
        return display.print_json({"recipes": [recipe.to_dict() for recipe in recipes]})
    rows = table("recipe", "linear", "embedding", "method", "targets")
    for recipe in recipes:
        q = recipe.quantization
        targets = ", ".join(f"{t.target} ({t.max_context:,} tokens)" for t in recipe.targets)
        rows.add_row(recipe.name, q.linear, q.embedding, q.method, targets)
    wide.print(rows)
    return 0


def print_checks(checks: Sequence[Any]) -> None:
    """Print one line per kind of passed checks, and one line per failed check. A check that only
    reports something has a line of its own."""
    from exporter.verification.checks import failures

    kinds = dict[tuple[str, str | None, str], list[Any]]()
    for check in checks:
        report = check.subject if check.limit is None and check.note else ""
        kinds.setdefault((check.check, check.target, report), []).append(check)
    rows = table("", "check", "target", "value", "limit", "subject")
    for (name, target, _), group in kinds.items():
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
        absent = sum(check.value is None for check in checks)
        rest = f", {absent} not run" if absent else ""
        out.print(f"[bold green]all {len(checks) - absent} checks passed[/]{rest}")


def print_evaluation(
    path: str, found: Any, output: Path | None, clock: Clock, as_json: bool
) -> int:
    """Print the figures of one model, then those by position and by layer."""
    if as_json:
        return display.print_json({"path": path, **found.figures(), **clock.figures()})
    facts = {"runs as": found.kind}
    text, task, generations = found.text, found.task, found.generations
    if text:
        facts["perplexity"] = f"{text.perplexity:.3f} ± {text.perplexity_error:.3f}" + (
            f" (reference {text.reference_perplexity:.3f})" if text.kl is not None else ""
        )
        if text.kl is not None:
            facts["KL"] = f"{text.kl:.4g} ± {text.kl_error:.2g} nats"
            facts["top-1 agreement"] = f"{text.top1_agreement:.1%}"
        facts["measured on"] = f"{text.tokens:,} predictions in {text.sequences:,} sequences"
    if task:
        facts["accuracy"] = f"{task.accuracy:.1%} of {task.problems:,} problems"
        facts["with an answer"] = f"{task.answered:.1%}"
        facts["never ended"] = f"{task.never_ended:.1%}"
        facts["tokens per answer"] = f"{task.mean_tokens:.1f}"
    if generations:
        count = generations.generations
        facts["same generations"] = f"{generations.identical_generations:.1%} of {count:,}"
        facts["first divergence"] = f"at {generations.median_first_divergence:g} (median)"
    if output is not None:
        facts["written to"] = str(output)
    print_facts(path, facts | clock.facts())
    if text:
        rows = table(
            "positions", "perplexity", "KL", "top-1 agreement", title="By position in the text"
        )
        for band in text.agreement_by_position:
            top1 = "" if band.top1_agreement is None else f"{band.top1_agreement:.1%}"
            cells = figure(band.perplexity), figure(band.kl), top1
            rows.add_row(f"{band.first}–{band.last}", *cells)
        wide.print("", rows)
    if found.layers:
        rows = table("layer", "KL", title="By quantized layer")
        for layer in found.layers:
            rows.add_row(layer.layer, figure(layer.kl))
        wide.print("", rows)
    if generations:
        rows = table("positions", "same token", title="By position in the generation")
        for band in generations.generation_agreement_by_position:
            rows.add_row(f"{band.first}–{band.last}", f"{band.agreement:.1%}")
        wide.print("", rows)
    return 0


def folder_bytes(folder: Path) -> int:
    """The bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def float_weights(quantized: Any) -> dict[str, str]:
    """The weights that are not quantized: name → reason."""
    tensors = quantized.manifest["tensors"]
    return {name: entry["reason"] for name, entry in tensors.items() if "reason" in entry}


def float_facts(quantized: Any) -> dict[str, str]:
    """The float weights by reason. Layer numbers are replaced by N and counted."""
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
