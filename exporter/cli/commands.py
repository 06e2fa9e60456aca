"""One function per subcommand, which calls the package and displays the result.

Functions import the package themselves, so that ``mobilellm --help`` does not load torch. They
return the exit code.
"""

import argparse
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.cli import display, display_models
from exporter.cli.exit_codes import CHECK_FAILED, SUCCESS
from exporter.cli.packaging_commands import PACKAGING
from exporter.errors import InputError

if TYPE_CHECKING:
    from exporter.bundle.signature import Signer

#: The longest prompt on standard input, in bytes.
PROMPT_BYTES = 1 << 24


def inspect(args: argparse.Namespace) -> int:
    """Show a checkpoint with the predictions of each recipe, or a file of a format."""
    from exporter.backends import backend, inspector_of

    kind = inspector_of(Path(args.checkpoint))
    if kind is not None:
        inspection = backend(kind).inspect(Path(args.checkpoint))
        return display_models.print_inspection(inspection, args.json)
    from exporter.forecast import catalogue_device, forecast_recipes
    from exporter.model.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(args.checkpoint)
    device = catalogue_device(args.device) if args.device else None
    forecasts = forecast_recipes(checkpoint, device)
    return display_models.print_checkpoint(checkpoint, forecasts, device, args.json)


def quantize(args: argparse.Namespace) -> int:
    """Quantize a checkpoint."""
    import torch

    from exporter import pipeline
    from exporter.model.checkpoint import open_checkpoint
    from exporter.recipe import load_recipe

    if args.family and not args.dequantize:
        raise InputError(f"--as {args.family}", "is for --dequantize", "Give --dequantize DIR too")
    recipe = load_recipe(args.recipe, args.overrides)
    checkpoint = open_checkpoint(args.checkpoint)
    with display.progress() as progress, display.Clock() as clock:
        dequantized = None
        if args.dequantize:
            dtype = getattr(torch, args.dtype)
            dequantized = pipeline.DequantizedFolder(args.dequantize, dtype, args.family)
        quantized = pipeline.quantize(
            recipe, checkpoint, args.output, progress, args.overwrite, dequantized
        )
    if quantized is None:  # another rank of torchrun writes the result
        return SUCCESS
    written = (args.dequantize, args.dtype) if args.dequantize else None
    return display_models.print_quantized(recipe.name, quantized, written, clock, args.json)


def lower(args: argparse.Namespace) -> int:
    """Lower a quantized checkpoint to one artifact."""
    from exporter import pipeline
    from exporter.backends import parse_target
    from exporter.quantization.quantized_checkpoint import open_quantized

    target = parse_target({"target": args.target}, "--target", args.overrides)
    quantized = open_quantized(args.quantized)
    with display.progress() as progress, display.Clock() as clock:
        finished = pipeline.lower(quantized, target, args.output, progress, args.overwrite)
    return display_models.print_artifact(finished, quantized, args.output, clock, args.json)


def export(args: argparse.Namespace) -> int:
    """Export a checkpoint to a verified bundle."""
    from exporter import pipeline
    from exporter.model.checkpoint import open_checkpoint
    from exporter.recipe import load_recipe

    days = args.prune_stages
    if days is not None and (args.stages is None or not days >= 0):
        problem = f"{days:g} is not a number of days" if args.stages else "needs --stages"
        raise InputError("--prune-stages", problem, "Write --stages DIR --prune-stages 14")
    recipe = pipeline.with_targets(load_recipe(args.recipe, args.overrides), args.target)
    checkpoint = open_checkpoint(args.checkpoint)
    if not Path(args.checkpoint).is_dir():  # a hub id, which the bundle then names
        recipe = recipe.model_copy(update={"model": args.checkpoint})
    with display.progress() as progress, display.Clock() as clock:
        result = pipeline.export(
            recipe, checkpoint, args.output, progress,
            overwrite=args.overwrite, text=args.text, store=args.stages,
        )  # fmt: skip
        pruned = None if days is None else result.stages.prune(days)
    display_models.print_export(result, args.output, pruned, clock, args.json)
    return SUCCESS if result.bundle is not None else CHECK_FAILED


def verify(args: argparse.Namespace) -> int:
    """Verify a bundle or a quantized checkpoint."""
    from exporter import pipeline
    from exporter.model.checkpoint import open_checkpoint

    source = open_checkpoint(args.source) if args.source else None
    with display.progress() as progress:
        checks = pipeline.verify(
            args.bundle, progress, args.text, source=source, quick=args.quick, signer=_signer(args)
        )
    passed = all(check.passed for check in checks)
    display_models.print_verification(checks, passed, args.json)
    return SUCCESS if passed else CHECK_FAILED


def _signer(args: argparse.Namespace) -> "Signer | None":
    """Who must have signed the bundle. Raises InputError for options that do not go together."""
    if bool(args.identity) != bool(args.issuer) or (args.key and args.identity):
        raise InputError(
            "--key, --identity, --issuer", "do not go together", "Give --key, or the other two"
        )
    if not args.key and not args.identity:
        return None
    from exporter.bundle.signature import Signer

    return Signer(args.key, args.identity, args.issuer)


def evaluate(args: argparse.Namespace) -> int:
    """Measure the quality of a model."""
    from exporter.evaluation import measure
    from exporter.inference.loaded_model import opened_source

    measures = measure.Measures(
        **{field.name: getattr(args, field.name) for field in fields(measure.Measures)}
    )
    with (
        display.progress() as progress,
        display.Clock() as clock,
        opened_source(args.path, partial(progress, "unpack")) as source,
    ):
        evaluation = measure.evaluate(source, args.target, measures, progress)
    return display_models.print_evaluation(args.path, evaluation, args.output, clock, args.json)


def generate(args: argparse.Namespace) -> int:
    """Generate text with a model."""
    from exporter.inference.answer import begin_answer
    from exporter.inference.generation import Sampling
    from exporter.inference.loaded_model import opened_source

    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    prompt = _standard_input() if args.prompt == "-" else args.prompt
    with opened_source(args.path) as source:
        answer = begin_answer(source, args.target, prompt, sampling, args.raw, args.system)
        return display_models.print_answer(answer, args.json)


def _standard_input() -> str:
    """The prompt from standard input. Raises InputError for text that is too long or not UTF-8."""
    content = sys.stdin.buffer.read(PROMPT_BYTES + 1)
    if len(content) > PROMPT_BYTES:
        raise InputError("prompt", f"is longer than the limit of {PROMPT_BYTES:,} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError("prompt", f"is not UTF-8 ({error})", "Give UTF-8") from error


def profile(args: argparse.Namespace) -> int:
    """Measure a bundle on devices."""
    from exporter import profiling
    from exporter.cli import display_profile

    if args.plot:
        display_profile.check_plot(args.plot)
    request = profiling.Request(
        args.device, args.target, args.overrides, args.runner, args.threads, args.timeout,
        args.output, args.baseline, args.cores, args.mmap, args.packed_cache,
    )  # fmt: skip
    with display.progress() as progress:
        result = profiling.profile(args.bundle, request, progress)
    if args.plot:
        display_profile.plot(result.report, args.plot)
    display_profile.print_profile(result.report, result.comparisons, args.json)
    return SUCCESS if result.passed else CHECK_FAILED


def devices(args: argparse.Namespace) -> int:
    """List the connected devices and the catalogue, or remove our files from devices."""
    from exporter.cli import display_profile

    if args.clean is None:
        return display_profile.print_devices(args.json)
    from exporter import profiling

    with display.progress() as progress:
        cleaned = profiling.clean(args.clean, progress)
    display_profile.print_cleaned(cleaned, args.json)
    return SUCCESS if all(one.problem is None for one in cleaned) else CHECK_FAILED


def recipes(args: argparse.Namespace) -> int:
    """List the recipes that come with the tool."""
    from exporter.recipe import all_recipes

    return display_models.print_recipes(all_recipes(), args.json)


def doctor(args: argparse.Namespace) -> int:
    """Show which packages are installed on this machine."""
    from exporter.cli.doctor import examine

    findings = examine()
    fine = all(finding.fine for finding in findings if finding.required)
    display.print_findings(findings, fine, args.json)
    return SUCCESS if fine else CHECK_FAILED


#: Every subcommand, in the order of the help.
# fmt: off
COMMANDS = {
    function.__name__: function
    for function in (
        inspect, quantize, lower, export, verify, evaluate, generate, profile, *PACKAGING, devices,
        recipes, doctor,
    )
}
# fmt: on
