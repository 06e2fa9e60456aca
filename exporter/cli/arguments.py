"""What is typed on the command line: every subcommand with its arguments and its help."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from exporter.backends import names

DESCRIPTION = """\
Put MobileLLM-R1 on phones: quantize a checkpoint once, lower it to mobile
formats with the same integers in each, and prove that they are the same.

  mobilellm inspect examples/mobilellm-r1-nano
  mobilellm export mobilellm-r1-nano-int4 --checkpoint examples/mobilellm-r1-nano -o build/nano
  mobilellm generate build/nano --prompt "Ada has 12 eggs. Ada sells 5. ..."

A CHECKPOINT is a Hugging Face model folder or a hub id (owner/name). A RECIPE is
a YAML file or the name of one that `mobilellm recipes` lists; key=value pairs
after it override it, as in max_context=4096.
"""
EPILOG = "Exit codes: 0 fine, 1 a check failed, 2 wrong usage or bad input."

Command = Callable[[argparse.Namespace], int]


def parse(typed: Sequence[str] | None, run: Mapping[str, Command]) -> argparse.Namespace:
    """key=value pairs may stand anywhere, also behind options, where argparse loses them."""
    parser = _parser(run)
    args, rest = parser.parse_known_args(typed)
    pairs = [text for text in rest if "=" in text and not text.startswith("-")]
    if len(pairs) < len(rest) or (pairs and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if pairs:
        args.overrides += pairs
    return args


def _parser(run: Mapping[str, Command]) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "mobilellm", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, text: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=f"{text}.\n\n  {example}", formatter_class=raw,
            epilog=EPILOG,
        )  # fmt: skip
        sub.set_defaults(run=run[name])
        sub.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        sub.add_argument("-v", "--verbose", action="store_true", help="log to stderr")
        return sub

    nano, formats = "examples/mobilellm-r1-nano", names()
    sub = command(
        "inspect",
        "Show a checkpoint, and what each recipe would weigh in file, KV cache and memory; "
        "or what is in a file of a mobile format",
        f"mobilellm inspect {nano}",
    )  # fmt: skip
    sub.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="model folder, hub id, or a file that a format reads",
    )
    sub.add_argument(
        "--device", metavar="NAME",
        help="also predict the speed on a device that mobilellm devices knows, as pixel-8",
    )  # fmt: skip

    sub = command(
        "quantize", "Quantize a checkpoint: integers and scales in one folder",
        f"mobilellm quantize mobilellm-r1-nano-int4 --checkpoint {nano} -o build/nano-int4",
    )  # fmt: skip
    _recipe_arguments(sub)
    sub.add_argument(
        "--dequantize", type=Path, metavar="DIR",
        help="also write an ordinary model folder with the quantized values, for other engines",
    )  # fmt: skip
    sub.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], default="float32",
        help="of --dequantize: float32 (default) is exact, the others round code times scale",
    )  # fmt: skip

    sub = command(
        "lower", "Lower a quantized checkpoint to one mobile format",
        f"mobilellm lower build/nano-int4 --target {formats[0]} -o build/nano max_context=1024",
    )  # fmt: skip
    sub.add_argument("quantized", metavar="QUANTIZED", type=Path, help="from mobilellm quantize")
    sub.add_argument("overrides", metavar="key=value", nargs="*", help="of the target")
    sub.add_argument("--target", required=True, metavar="NAME", help=", ".join(formats))
    _output_arguments(sub)

    sub = command(
        "export", "Make a verified bundle: quantize, lower to every target, verify",
        f"mobilellm export mobilellm-r1-nano-int4 --checkpoint {nano} -o build/nano",
    )  # fmt: skip
    _recipe_arguments(sub)
    sub.add_argument(
        "--target", action="append", default=[], metavar="NAME",
        help="only this target of the recipe; may be given again",
    )  # fmt: skip
    _text_argument(sub)

    sub = command(
        "verify",
        "Verify a bundle: checksums, integers bit for bit, logits against the torch reference",
        "mobilellm verify build/nano",
    )  # fmt: skip
    sub.add_argument("bundle", metavar="BUNDLE", type=Path, help="or a quantized checkpoint")
    _text_argument(sub)

    sub = command(
        "evaluate",
        "Measure the quality of a checkpoint, a quantized one, or an artifact in its own runtime: "
        "perplexity, KL and agreement on text, problems solved",
        f"mobilellm evaluate build/nano --data FILE --reference {nano}",
    )  # fmt: skip
    _evaluate_arguments(sub)

    sub = command(
        "generate", "Write text with a checkpoint, a quantized one, or an artifact",
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

    _profile_arguments(
        command(
            "profile",
            "Measure load, time to first token, prefill, decode, memory and operators on devices",
            "mobilellm profile build/nano --device adb:SERIAL --device host -o build/nano.json",
        )
    )
    command("devices", "List the devices that are connected and known", "mobilellm devices")
    command("recipes", "List the recipes that come with the tool", "mobilellm recipes")
    command("doctor", "Show what is missing on this machine", "mobilellm doctor")
    return parser


def _evaluate_arguments(sub: argparse.ArgumentParser) -> None:
    def number(group: argparse._ArgumentGroup, flag: str, default: int | None, text: str) -> None:
        group.add_argument(flag, type=int, metavar="N", default=default, help=text)

    sub.add_argument("path", metavar="PATH", help="bundle, artifact, quantized or CHECKPOINT")
    sub.add_argument("--target", metavar="NAME", help="which artifact of a bundle")
    sub.add_argument(
        "--reference", metavar="CHECKPOINT",
        help="what to compare with: KL, top-1 agreement, --generations",
    )  # fmt: skip
    text = sub.add_argument_group("text")
    text.add_argument("--data", type=Path, metavar="FILE", help="text, JSONL or parquet")
    text.add_argument(
        "--field", metavar="NAME",
        help="of a row (default: text, messages, prompt + completion or question + answer)",
    )  # fmt: skip
    number(text, "--max-tokens", 8192, "default 8192")
    number(text, "--sequence-length", 512, "default 512")
    number(
        text, "--prefill", 1,
        "tokens of each sequence that an artifact reads at once; what follows them is scored "
        "(default 1)",
    )  # fmt: skip
    text.add_argument(
        "--simulate", action="store_true",
        help="a bundle's quantized checkpoint in torch, activations rounded as in the target",
    )  # fmt: skip
    task = sub.add_argument_group("problems")
    task.add_argument(
        "--task", type=Path, metavar="FILE",
        help="JSONL or parquet with prompt (or question) and answer; compared are the last "
        "\\boxed{} or ####",
    )  # fmt: skip
    number(task, "--limit", None, "only the first N problems")
    number(task, "--max-new-tokens", 512, "default 512")
    number(
        task, "--generations", 0,
        "compare the answers to the first N problems with those of --reference",
    )  # fmt: skip


def _profile_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("bundle", metavar="BUNDLE", type=Path, help="from mobilellm export")
    sub.add_argument(
        "overrides", metavar="key=value", nargs="*",
        help="of the recipe's profile section, as depths=[0,512] or sustained_seconds=60",
    )  # fmt: skip
    sub.add_argument(
        "--device", action="append", required=True, metavar="DEVICE",
        help="host, mac, adb:SERIAL or ssh:USER@HOST[:PORT]; several are measured at the same time",
    )  # fmt: skip
    sub.add_argument(
        "--target", action="append", default=[], metavar="NAME",
        help="only this artifact of the bundle; may be given again",
    )  # fmt: skip
    sub.add_argument(
        "--runner", type=Path, metavar="FILE",
        help="your own llama_main, executor_runner or onnxruntime_perf_test for the device",
    )  # fmt: skip
    sub.add_argument("--threads", type=int, default=0, metavar="N", help="default: what fits it")
    sub.add_argument(
        "--timeout", type=float, default=1800.0, metavar="S", help="of one run; default 1800 s"
    )
    sub.add_argument(
        "-o", "--output", type=Path, metavar="FILE",
        help="write the report as JSON; a stopped session goes on where it was",
    )  # fmt: skip
    sub.add_argument("--plot", type=Path, metavar="FILE", help="draw it, as .png, .svg or .pdf")
    sub.add_argument(
        "--baseline", type=Path, metavar="FILE", help="an earlier report to compare with"
    )


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
