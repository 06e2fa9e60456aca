"""The command line: one function for each subcommand, each one call into the pipeline.

`arguments` says what is typed, `display` how a result looks.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn

from rich.markup import escape

from exporter.cli import arguments, display
from exporter.errors import ExporterError

FINE, CHECK_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(typed: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code."""
    args = arguments.parse(typed, COMMANDS)
    logger = logging.getLogger("exporter")
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.DEBUG if args.verbose else logging.WARNING)
    try:
        code = args.run(args)
    except ExporterError as error:
        if args.json:
            print(json.dumps({"error": str(error)}))
        display.err.print(f"[bold red]error:[/] {escape(str(error))}")
        code = BAD_INPUT
    except OSError as error:  # a full disk, a folder that went away
        if isinstance(error, BrokenPipeError):  # the reader went away, as `| head` does
            sys.stderr.close()
            sys.exit(FINE)
        if args.json:
            print(json.dumps({"error": str(error)}))
        display.err.print(f"[bold red]error:[/] {escape(str(error))}")
        code = BAD_INPUT
    except KeyboardInterrupt:
        display.err.print("interrupted; run the same command again to go on where it stopped")
        code = INTERRUPTED
    sys.exit(code)


def inspect(args: argparse.Namespace) -> int:
    from exporter import pipeline
    from exporter.model.checkpoint import open_checkpoint

    if Path(args.checkpoint).suffix == ".mlpackage":
        return _inspect_package(args)
    checkpoint = open_checkpoint(args.checkpoint)
    fitting = _recipes_for(checkpoint.path.name)
    device = pipeline.catalogue_device(args.device) if args.device else None
    forecasts = [f for recipe in fitting for f in pipeline.forecast(recipe, checkpoint, device)]
    config = checkpoint.config
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in checkpoint.tensors.values()})
    if args.json:
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
        + ("tied to the output layer" if config.tie_word_embeddings else "output layer apart"),
        "attention": f"{config.num_attention_heads} heads over {config.num_key_value_heads} "
        f"k/v heads of {config.head_dim}" + (", q/k norm" if config.use_qk_norm else ""),
        "context": f"{config.max_position_embeddings:,} tokens",
    }
    display.print_facts(str(checkpoint.path), facts)
    speeds = (f"decode tokens/s on {device.name}, empty to full cache",) if device else ()
    columns = "recipe", "target", "file", "KV cache", "memory", *speeds
    table = display.table(*columns, title="Predicted")
    for column in table.columns[2:]:
        column.justify = "right"
    for forecast in forecasts:
        sizes = forecast.prediction
        if sizes is None:
            continue
        table.add_row(
            forecast.recipe,
            forecast.target,
            *map(display.megabytes, (sizes.file, sizes.kv_cache, sizes.memory)),
            *([" to ".join(f"{s.decode:.0f}" for s in forecast.speeds)] if device else []),
        )
    display.wide.print(table)
    impossible = [forecast for forecast in forecasts if forecast.prediction is None]
    for forecast in impossible:
        display.out.print(f"[dim]{forecast.recipe} does not fit: {escape(forecast.problem)}[/]")
    return FINE


def _inspect_package(args: argparse.Namespace) -> int:
    from exporter import pipeline

    found = pipeline.inspect_package(Path(args.checkpoint))
    if args.json:
        return display.print_json(asdict(found))
    facts = {"description": found.description} if found.description else {}
    facts["specification"] = f"version {found.specification_version}"
    display.print_facts(found.path, facts | dict(found.metadata))
    features = display.table("function", "", "name", "type", "shape", title="Functions")
    operators = display.table("operator", *(function.name for function in found.functions))
    for function in found.functions:
        for role in ("inputs", "states", "outputs"):
            for feature in getattr(function, role):
                shape = " × ".join(map(str, feature.shape))
                cells = (feature.name, feature.type, shape)
                features.add_row(function.name, role.removesuffix("s"), *map(escape, cells))
    counts = [function.operators for function in found.functions]
    for operator in dict.fromkeys(name for one in counts for name in one):
        operators.add_row(operator, *(str(one.get(operator, "–")) for one in counts))
    weights = display.table("weights", "tensors", "size")
    for weight in found.weights:
        weights.add_row(weight.format, str(weight.tensors), display.megabytes(weight.bytes))
    for column in (*operators.columns[1:], *weights.columns[1:]):
        column.justify = "right"
    for table in (features, operators, weights):
        display.wide.print(table, "")
    unknown = sorted({name for function in found.functions for name in function.unknown})
    if unknown:
        display.out.print(f"[dim]The reference interpreter does not know: {', '.join(unknown)}[/]")
    return FINE


def quantize(args: argparse.Namespace) -> int:
    import torch

    from exporter import pipeline
    from exporter.model.checkpoint import open_checkpoint
    from exporter.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    checkpoint = open_checkpoint(args.checkpoint)
    with display.progress() as progress, display.Clock() as clock:
        dequantized = None
        if args.dequantize:
            dequantized = pipeline.DequantizedFolder(args.dequantize, getattr(torch, args.dtype))
        quantized = pipeline.quantize(
            recipe, checkpoint, args.output, progress, args.overwrite, dequantized
        )
    if quantized is None:  # a process of torchrun that is not the first
        return FINE
    size = display.folder_bytes(quantized.path)
    if args.json:
        return display.print_json(
            {
                "path": str(quantized.path),
                "bytes": size,
                "float_weights": display.float_weights(quantized),
                **clock.figures(),
            }
        )
    facts = {"quantized checkpoint": f"{display.megabytes(size)} in {quantized.path}"}
    if args.dequantize:
        facts["dequantized"] = f"{args.dequantize} ({args.dtype}: {_ROUNDING[args.dtype]})"
    display.print_facts(recipe.name, facts | display.float_facts(quantized) | clock.facts())
    return FINE


_ROUNDING = {
    "float32": "exact",
    "float16": "code times scale rounded to 11 significant bits",
    "bfloat16": "code times scale rounded to 8 significant bits",
}


def lower(args: argparse.Namespace) -> int:
    from exporter import pipeline
    from exporter.quantization.quantized_checkpoint import open_quantized
    from exporter.recipe import parse_target

    target = parse_target({"target": args.target}, "--target", args.overrides)
    quantized = open_quantized(args.quantized)
    with display.progress() as progress, display.Clock() as clock:
        finished = pipeline.lower(quantized, target, args.output, progress, args.overwrite)
    size = display.folder_bytes(finished.artifact.path)
    if args.json:
        return display.print_json(
            {"path": str(args.output), "bytes": size, **finished.manifest, **clock.figures()}
        )
    facts = {"artifact": f"{display.megabytes(size)} in {args.output}"}
    display.print_facts(target.target, facts | display.float_facts(quantized) | clock.facts())
    return FINE


def export(args: argparse.Namespace) -> int:
    from exporter import pipeline
    from exporter.model.checkpoint import open_checkpoint
    from exporter.recipe import load_recipe

    recipe = pipeline.with_targets(load_recipe(args.recipe, args.overrides), args.target)
    checkpoint = open_checkpoint(args.checkpoint)
    with display.progress() as progress, display.Clock() as clock:
        result = pipeline.export(
            recipe, checkpoint, args.output, progress, overwrite=args.overwrite, text=args.text
        )
    sizes = {
        name: display.folder_bytes(finished.artifact.path)
        for name, finished in result.artifacts.items()
    }
    if args.json:
        display.print_json(
            {
                "path": str(args.output),
                "passed": result.bundle is not None,
                "bytes": sizes,
                "float_weights": display.float_weights(result.quantized),
                "checks": [asdict(check) for check in result.checks],
                **clock.figures(),
            }
        )
    else:
        facts = {"quantized": display.megabytes(display.folder_bytes(result.quantized.path))}
        facts |= {name: display.megabytes(size) for name, size in sizes.items()}
        display.print_facts(
            str(args.output), facts | display.float_facts(result.quantized) | clock.facts()
        )
        display.print_checks(result.checks)
        if result.bundle is None:
            display.err.print(
                "[bold red]not sealed:[/] a check failed, so this is not a bundle yet"
            )
    return FINE if result.bundle is not None else CHECK_FAILED


def verify(args: argparse.Namespace) -> int:
    from exporter import pipeline

    with display.progress() as progress:
        checks = pipeline.verify(args.bundle, progress, args.text)
    passed = all(check.passed for check in checks)
    if args.json:
        display.print_json({"passed": passed, "checks": [asdict(check) for check in checks]})
    else:
        display.print_checks(checks)
    return FINE if passed else CHECK_FAILED


def evaluate(args: argparse.Namespace) -> int:
    from exporter.evaluation import measure

    asked = measure.Measures(
        **{field.name: getattr(args, field.name) for field in fields(measure.Measures)}
    )
    with display.progress() as progress, display.Clock() as clock:
        found = measure.evaluate(args.path, args.target, asked, progress)
    if args.json:
        return display.print_json({"path": args.path, **found.figures(), **clock.figures()})
    display.print_evaluation(args.path, found, clock.facts())
    return FINE


def generate(args: argparse.Namespace) -> int:
    from exporter.inference.generation import Generation, Sampling
    from exporter.inference.loaded_model import open_model
    from exporter.text.tokenizer import load_tokenizer

    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    started = time.perf_counter()
    model = open_model(args.path, args.target)
    loaded = time.perf_counter() - started
    tokenizer = load_tokenizer(model.tokenizer_folder)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    prompt_text = tokenizer.prompt_text(prompt, raw=args.raw, system=args.system)
    prompt_tokens = tokenizer.encode(prompt_text)
    generation = Generation(model.runner, prompt_tokens, model.eos_token_ids, sampling)
    pieces = []
    for _, piece in tokenizer.stream(generation):
        pieces.append(piece)
        if not args.json:
            print(piece, end="", flush=True)
    seconds = {"load": loaded, **generation.seconds}
    if args.json:
        return display.print_json(
            {
                "prompt_text": prompt_text,
                "prompt_tokens": prompt_tokens,
                "tokens": generation.tokens,
                "text": "".join(pieces),
                "finish_reason": generation.finish_reason,
                "seconds": seconds,
            }
        )
    print()
    steps = len(generation.tokens)
    display.err.print(
        f"[dim]{model.kind}: {len(prompt_tokens)} tokens read in {seconds['prefill']:.2f} s, "
        f"{steps} written in {seconds['decode']:.2f} s ({generation.finish_reason})[/]"
    )
    return FINE


def profile(args: argparse.Namespace) -> int:
    from exporter import profiling
    from exporter.cli import display_profile

    if args.plot:
        display_profile.check_plot(args.plot)
    request = profiling.Request(
        args.device, args.target, args.overrides, args.runner, args.threads, args.timeout,
        args.output, args.baseline,
    )  # fmt: skip
    with display.progress() as progress:
        result = profiling.profile(args.bundle, request, progress)
    if args.plot:
        display_profile.plot(result.report, args.plot)
    if args.json:
        comparisons = [asdict(row) for row in result.comparisons]
        display.print_json({**result.report, "comparisons": comparisons})
    else:
        display_profile.print_report(result.report, result.comparisons)
    return FINE if result.passed else CHECK_FAILED


def devices(args: argparse.Namespace) -> int:
    from exporter.cli import display_profile

    return display_profile.print_devices(args.json)


def recipes(args: argparse.Namespace) -> int:
    found = _all_recipes()
    if args.json:
        return display.print_json({"recipes": [recipe.to_dict() for recipe in found]})
    table = display.table("recipe", "linear", "embedding", "scales", "targets")
    for recipe in found:
        q = recipe.quantization
        targets = ", ".join(f"{t.target} ({t.max_context:,} tokens)" for t in recipe.targets)
        table.add_row(recipe.name, q.linear, q.embedding, q.method, targets)
    display.wide.print(table)
    return FINE


def doctor(args: argparse.Namespace) -> int:
    from exporter.cli.doctor import examine

    findings = examine()
    fine = all(finding.fine for finding in findings if finding.required)
    if args.json:
        display.print_json({"fine": fine, "findings": [asdict(finding) for finding in findings]})
    else:
        table = display.table("", "what", "found", "wanted", "to get it")
        for finding in findings:
            mark = "[green]✓[/]" if finding.fine else "[red]✗[/]" if finding.required else "–"
            cells = finding.subject, finding.found, finding.wanted, finding.remedy
            table.add_row(mark, *map(escape, cells))
        display.wide.print(table)
    return FINE if fine else CHECK_FAILED


def _all_recipes() -> list[Any]:
    from exporter.recipe import load_recipe, recipe_folder

    return [load_recipe(path) for path in sorted(recipe_folder().glob("*.yaml"))]


def _recipes_for(model: str) -> list[Any]:
    """The recipes of a model of this name; where there are none, one of each kind."""
    found = _all_recipes()
    own = [recipe for recipe in found if Path(recipe.model).name.lower() == model.lower()]
    kinds = {repr((recipe.quantization, recipe.targets)): recipe for recipe in reversed(found)}
    return own or list(reversed(kinds.values()))


#: Every subcommand, in the order of the help.
# fmt: off
COMMANDS = {
    function.__name__: function
    for function in (
        inspect, quantize, lower, export, verify, evaluate, generate, profile, devices, recipes,
        doctor,
    )
}
# fmt: on
