"""The command line: one function for each subcommand, each one call into the pipeline."""

import argparse
import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from exporter.errors import ExporterError

FINE, CHECK_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

DESCRIPTION = """\
Put MobileLLM-R1 on phones: quantize a checkpoint once, lower it to mobile
formats with the same integers in each, and prove that they are the same.

  mobilellm inspect examples/mobilellm-r1-nano
  mobilellm export mobilellm-r1-nano-int4 --checkpoint examples/mobilellm-r1-nano -o build/nano
  mobilellm generate build/nano --prompt "Ada has 12 eggs. Ada sells 5. ..."

A CHECKPOINT is a Hugging Face model folder or a hub id (owner/name). A RECIPE is
a YAML file or the name of one that `mobilellm recipes` lists; key=value pairs
after it override it, as in targets.0.max_context=4096.
"""
EPILOG = "Exit codes: 0 fine, 1 a check failed, 2 wrong usage or bad input."

_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)
#: For tables: names are never cut off, the terminal wraps what is too long for it.
_wide = Console(highlight=False, width=400)


def _table(*columns: str, title: str | None = None) -> Table:
    return Table(*columns, title=title, title_justify="left", box=None, pad_edge=False)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code."""
    args = _parse(arguments)
    logger = logging.getLogger("exporter")
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.DEBUG if args.verbose else logging.WARNING)
    try:
        code = args.run(args)
    except ExporterError as error:
        if args.json:
            print(json.dumps({"error": str(error)}))
        _err.print(f"[bold red]error:[/] {escape(str(error))}")
        code = BAD_INPUT
    except OSError as error:  # a full disk, a folder that went away
        if isinstance(error, BrokenPipeError):  # the reader went away, as `| head` does
            sys.stderr.close()
            sys.exit(FINE)
        if args.json:
            print(json.dumps({"error": str(error)}))
        _err.print(f"[bold red]error:[/] {escape(str(error))}")
        code = BAD_INPUT
    except KeyboardInterrupt:
        _err.print("interrupted; run the same command again to go on where it stopped")
        code = INTERRUPTED
    sys.exit(code)


def inspect(args: argparse.Namespace) -> int:
    from exporter import pipeline
    from exporter.checkpoint import open_checkpoint

    if Path(args.checkpoint).suffix == ".mlpackage":
        return _inspect_package(args)
    checkpoint = open_checkpoint(args.checkpoint)
    fitting = _recipes_for(checkpoint.path.name)
    forecasts = [f for recipe in fitting for f in pipeline.forecast(recipe, checkpoint)]
    config = checkpoint.config
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in checkpoint.tensors.values()})
    if args.json:
        return _print_json(
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
    _print_facts(str(checkpoint.path), facts)
    table = _table("recipe", "target", "file", "KV cache", "memory", title="Predicted")
    for column in table.columns[2:]:
        column.justify = "right"
    for forecast in forecasts:
        sizes = forecast.prediction
        if sizes is None:
            continue
        table.add_row(
            forecast.recipe,
            forecast.target,
            *map(_megabytes, (sizes.file, sizes.kv_cache, sizes.memory)),
        )
    _wide.print(table)
    impossible = [forecast for forecast in forecasts if forecast.prediction is None]
    for forecast in impossible:
        _out.print(f"[dim]{forecast.recipe} does not fit: {escape(forecast.problem)}[/]")
    return FINE


def _inspect_package(args: argparse.Namespace) -> int:
    from exporter import pipeline

    found = pipeline.inspect_package(Path(args.checkpoint))
    if args.json:
        return _print_json(asdict(found))
    facts = {"description": found.description} if found.description else {}
    facts["specification"] = f"version {found.specification_version}"
    _print_facts(found.path, facts | dict(found.metadata))
    features = _table("function", "", "name", "type", "shape", title="Functions")
    operators = _table("operator", *(function.name for function in found.functions))
    for function in found.functions:
        for role in ("inputs", "states", "outputs"):
            for feature in getattr(function, role):
                shape = " × ".join(map(str, feature.shape))
                cells = (feature.name, feature.type, shape)
                features.add_row(function.name, role.removesuffix("s"), *map(escape, cells))
    counts = [function.operators for function in found.functions]
    for operator in dict.fromkeys(name for one in counts for name in one):
        operators.add_row(operator, *(str(one.get(operator, "–")) for one in counts))
    weights = _table("weights", "tensors", "size")
    for weight in found.weights:
        weights.add_row(weight.format, str(weight.tensors), _megabytes(weight.bytes))
    for column in (*operators.columns[1:], *weights.columns[1:]):
        column.justify = "right"
    for table in (features, operators, weights):
        _wide.print(table, "")
    unknown = sorted({name for function in found.functions for name in function.unknown})
    if unknown:
        _out.print(f"[dim]The reference interpreter does not know: {', '.join(unknown)}[/]")
    return FINE


def quantize(args: argparse.Namespace) -> int:
    import torch

    from exporter import pipeline
    from exporter.checkpoint import open_checkpoint
    from exporter.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    checkpoint = open_checkpoint(args.checkpoint)
    with _progress() as progress, _Clock() as clock:
        dequantized = None
        if args.dequantize:
            dequantized = pipeline.Dequantized(args.dequantize, getattr(torch, args.dtype))
        waist = pipeline.quantize(
            recipe, checkpoint, args.output, progress, args.overwrite, dequantized
        )
    size = _folder_bytes(waist.path)
    if args.json:
        return _print_json(
            {
                "path": str(waist.path),
                "bytes": size,
                "float_weights": _float_weights(waist),
                **clock.figures(),
            }
        )
    facts = {"quantized checkpoint": f"{_megabytes(size)} in {waist.path}"}
    if args.dequantize:
        facts["dequantized"] = f"{args.dequantize} ({args.dtype}: {_ROUNDING[args.dtype]})"
    _print_facts(recipe.name, facts | _float_facts(waist) | clock.facts())
    return FINE


_ROUNDING = {
    "float32": "exact",
    "float16": "code times scale rounded to 11 significant bits",
    "bfloat16": "code times scale rounded to 8 significant bits",
}


def lower(args: argparse.Namespace) -> int:
    from exporter import pipeline
    from exporter.quantization.waist import open_waist
    from exporter.recipe import parse_target

    target = parse_target({"target": args.target}, "--target", args.overrides)
    waist = open_waist(args.quantized)
    with _progress() as progress, _Clock() as clock:
        finished = pipeline.lower(waist, target, args.output, progress, args.overwrite)
    size = _folder_bytes(finished.artifact.path)
    if args.json:
        return _print_json(
            {"path": str(args.output), "bytes": size, **finished.manifest, **clock.figures()}
        )
    facts = {"artifact": f"{_megabytes(size)} in {args.output}"}
    _print_facts(target.target, facts | _float_facts(waist) | clock.facts())
    return FINE


def export(args: argparse.Namespace) -> int:
    from exporter import pipeline
    from exporter.checkpoint import open_checkpoint
    from exporter.recipe import load_recipe

    recipe = pipeline.with_targets(load_recipe(args.recipe, args.overrides), args.target)
    checkpoint = open_checkpoint(args.checkpoint)
    with _progress() as progress, _Clock() as clock:
        result = pipeline.export(
            recipe, checkpoint, args.output, progress, overwrite=args.overwrite, text=args.text
        )
    sizes = {
        name: _folder_bytes(finished.artifact.path) for name, finished in result.artifacts.items()
    }
    if args.json:
        _print_json(
            {
                "path": str(args.output),
                "passed": result.bundle is not None,
                "bytes": sizes,
                "float_weights": _float_weights(result.waist),
                "checks": [asdict(check) for check in result.checks],
                **clock.figures(),
            }
        )
    else:
        facts = {"quantized": _megabytes(_folder_bytes(result.waist.path))}
        facts |= {name: _megabytes(size) for name, size in sizes.items()}
        _print_facts(str(args.output), facts | _float_facts(result.waist) | clock.facts())
        _print_checks(result.checks)
        if result.bundle is None:
            _err.print("[bold red]not sealed:[/] a check failed, so this is not a bundle yet")
    return FINE if result.bundle is not None else CHECK_FAILED


def verify(args: argparse.Namespace) -> int:
    from exporter import pipeline

    with _progress() as progress:
        checks = pipeline.verify(args.bundle, progress, args.text)
    passed = all(check.passed for check in checks)
    if args.json:
        _print_json({"passed": passed, "checks": [asdict(check) for check in checks]})
    else:
        _print_checks(checks)
    return FINE if passed else CHECK_FAILED


def generate(args: argparse.Namespace) -> int:
    from exporter import pipeline
    from exporter.generation import Generation, Sampling
    from exporter.tokenizer import load_tokenizer

    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    started = time.perf_counter()
    speaker = pipeline.open_speaker(args.path, args.target)
    loaded = time.perf_counter() - started
    tokenizer = load_tokenizer(speaker.tokenizer_folder)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    prompt_text = tokenizer.prompt_text(prompt, raw=args.raw, system=args.system)
    prompt_tokens = tokenizer.encode(prompt_text)
    generation = Generation(speaker.runner, prompt_tokens, speaker.eos_token_ids, sampling)
    pieces = []
    for _, piece in tokenizer.stream(generation):
        pieces.append(piece)
        if not args.json:
            print(piece, end="", flush=True)
    seconds = {"load": loaded, **generation.seconds}
    if args.json:
        return _print_json(
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
    _err.print(
        f"[dim]{speaker.kind}: {len(prompt_tokens)} tokens read in {seconds['prefill']:.2f} s, "
        f"{steps} written in {seconds['decode']:.2f} s ({generation.finish_reason})[/]"
    )
    return FINE


def recipes(args: argparse.Namespace) -> int:
    found = _all_recipes()
    if args.json:
        return _print_json({"recipes": [recipe.to_dict() for recipe in found]})
    table = _table("recipe", "linear", "embedding", "scales", "targets")
    for recipe in found:
        q = recipe.quantization
        targets = ", ".join(f"{t.target} ({t.max_context:,} tokens)" for t in recipe.targets)
        table.add_row(recipe.name, q.linear, q.embedding, q.method, targets)
    _wide.print(table)
    return FINE


def doctor(args: argparse.Namespace) -> int:
    from exporter.doctor import examine

    findings = examine()
    fine = all(finding.fine for finding in findings if finding.required)
    if args.json:
        _print_json({"fine": fine, "findings": [asdict(finding) for finding in findings]})
    else:
        table = _table("", "what", "found", "wanted", "to get it")
        for finding in findings:
            mark = "[green]✓[/]" if finding.fine else "[red]✗[/]" if finding.required else "–"
            cells = finding.subject, finding.found, finding.wanted, finding.remedy
            table.add_row(mark, *map(escape, cells))
        _wide.print(table)
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


class _Clock:
    """Wall time of a block, and the peak memory of this process."""

    def __enter__(self) -> "_Clock":
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
        memory = _megabytes(int(figures["peak_rss_bytes"]))
        return {"took": f"{figures['seconds']:.1f} s, peak memory {memory}"}


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for each stage; a plain line where stderr is no terminal."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=_err, transient=True) as bars:
        tasks = dict[str, Any]()

        def show(stage: str, done: int, total: int) -> None:
            if not _err.is_terminal:
                if done == 0:
                    _err.print(f"{stage} …")
                return
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield show


def _print_json(content: dict[str, Any]) -> int:
    print(json.dumps(content, ensure_ascii=False, default=str))
    return FINE


def _print_facts(title: str, facts: dict[str, str]) -> None:
    _out.print(f"[bold]{escape(title)}[/]")
    width = max(map(len, facts))
    for key, value in facts.items():
        _out.print(f"  {key:<{width}}  {escape(value)}")


def _print_checks(checks: Sequence[Any]) -> None:
    """Passed checks of a kind in one line; every failed one with where and how much."""
    from exporter.verification import failures

    kinds = dict[tuple[str, str | None], list[Any]]()
    for check in checks:
        kinds.setdefault((check.check, check.target), []).append(check)
    table = _table("", "check", "target", "value", "limit", "what")
    for (name, target), group in kinds.items():
        failed = list(failures(group))
        for check in failed or group[:1]:
            single = len(group) == 1 or failed
            what = f"{check.subject}: {check.note}" if check.note else check.subject
            table.add_row(
                "[red]✗[/]" if failed else "[green]✓[/]" if check.limit is not None
                or not single else "[dim]·[/]",
                name,
                target or "",
                _figure(check.value) if single else "",
                _figure(check.limit) if single else "",
                escape(what) if single else f"{len(group)} of {len(group)}",
            )  # fmt: skip
    _wide.print(table)
    count = len(list(failures(checks)))
    if count:
        _out.print(f"[bold red]{count} of {len(checks)} checks failed[/]")
    else:
        _out.print(f"[bold green]all {len(checks)} checks passed[/]")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _float_weights(waist: Any) -> dict[str, str]:
    """name → why it is not quantized."""
    tensors = waist.manifest["tensors"]
    return {name: entry["reason"] for name, entry in tensors.items() if "reason" in entry}


def _float_facts(waist: Any) -> dict[str, str]:
    """The float weights by reason, layers run together."""
    reasons = dict[str, dict[str, int]]()
    for name, reason in _float_weights(waist).items():
        pattern = ".".join("N" if part.isdigit() else part for part in name.split("."))
        counts = reasons.setdefault(reason, {})
        counts[pattern] = counts.get(pattern, 0) + 1
    return {
        "left in float": "; ".join(
            f"{', '.join(f'{p} ({n}×)' if n > 1 else p for p, n in patterns.items())}: {reason}"
            for reason, patterns in reasons.items()
        )
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """key=value pairs may stand anywhere, also behind options, where argparse loses them."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    pairs = [text for text in rest if "=" in text and not text.startswith("-")]
    if len(pairs) < len(rest) or (pairs and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if pairs:
        args.overrides += pairs
    return args


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "mobilellm", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, example: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=f"{text}.\n\n  {example}", formatter_class=raw,
            epilog=EPILOG,
        )  # fmt: skip
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        sub.add_argument("-v", "--verbose", action="store_true", help="log to stderr")
        return sub

    nano = "examples/mobilellm-r1-nano"
    sub = command(
        "inspect", inspect,
        "Show a checkpoint, and what each recipe would weigh in file, KV cache and memory; "
        "or what is in a Core ML package",
        f"mobilellm inspect {nano}",
    )  # fmt: skip
    sub.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="model folder, hub id, or anyone's .mlpackage"
    )

    sub = command(
        "quantize", quantize, "Quantize a checkpoint: integers and scales in one folder",
        f"mobilellm quantize mobilellm-r1-nano-int4 --checkpoint {nano} -o build/nano-int4",
    )  # fmt: skip
    _recipe_arguments(sub)
    sub.add_argument(
        "--dequantize", type=Path, metavar="DIR",
        help="also write an ordinary model folder with the quantized values, for other engines",
    )  # fmt: skip
    sub.add_argument(
        "--dtype", choices=list(_ROUNDING), default="float32",
        help="of --dequantize: float32 (default) is exact, the others round code times scale",
    )  # fmt: skip

    sub = command(
        "lower", lower, "Lower a quantized checkpoint to one mobile format",
        "mobilellm lower build/nano-int4 --target executorch -o build/nano max_context=1024",
    )  # fmt: skip
    sub.add_argument("quantized", metavar="QUANTIZED", type=Path, help="from mobilellm quantize")
    sub.add_argument("overrides", metavar="key=value", nargs="*", help="of the target")
    sub.add_argument("--target", required=True, metavar="NAME", help="executorch or onnx")
    _output_arguments(sub)

    sub = command(
        "export", export, "Make a verified bundle: quantize, lower to every target, verify",
        f"mobilellm export mobilellm-r1-nano-int4 --checkpoint {nano} -o build/nano",
    )  # fmt: skip
    _recipe_arguments(sub)
    sub.add_argument(
        "--target", action="append", default=[], metavar="NAME",
        help="only this target of the recipe; may be given again",
    )  # fmt: skip
    _text_argument(sub)

    sub = command(
        "verify", verify,
        "Verify a bundle: checksums, integers bit for bit, logits against the torch reference",
        "mobilellm verify build/nano",
    )  # fmt: skip
    sub.add_argument("bundle", metavar="BUNDLE", type=Path, help="or a quantized checkpoint")
    _text_argument(sub)

    sub = command(
        "generate", generate, "Write text with a checkpoint, a quantized one, or an artifact",
        'mobilellm generate build/nano --prompt "Ada has 12 eggs. Ada sells 5. ..."',
    )  # fmt: skip
    sub.add_argument("path", metavar="PATH", help="bundle, artifact, quantized or CHECKPOINT")
    sub.add_argument("--prompt", required=True, metavar="TEXT", help="the prompt; - reads stdin")
    sub.add_argument("--target", metavar="NAME", help="which artifact of a bundle")
    sub.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="default 512")
    sub.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy"
    )
    sub.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default 1: all tokens")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling; default 0")
    sub.add_argument("--raw", action="store_true", help="give the prompt without chat template")
    sub.add_argument("--system", metavar="TEXT", help="a system message for the chat template")

    command("recipes", recipes, "List the recipes that come with the tool", "mobilellm recipes")
    command("doctor", doctor, "Show what is missing on this machine", "mobilellm doctor")
    return parser


def _recipe_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("recipe", metavar="RECIPE", help="a file, or a name from mobilellm recipes")
    sub.add_argument("overrides", metavar="key=value", nargs="*", help="overrides of the recipe")
    sub.add_argument("--checkpoint", required=True, metavar="DIR", help="model folder or hub id")
    _output_arguments(sub)


def _output_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "-o", "--output", required=True, type=Path, metavar="DIR",
        help="a new folder; what a stopped run left there is continued",
    )  # fmt: skip
    sub.add_argument(
        "--overwrite", action="store_true", help="replace a finished result of other inputs"
    )


def _text_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--text", type=Path, metavar="FILE",
        help="text for comparing logits (default: a built-in sample)",
    )  # fmt: skip
