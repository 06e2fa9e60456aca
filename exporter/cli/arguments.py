"""The arguments of every subcommand, with their help."""

import argparse
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from exporter.backends import names
from exporter.cli import packaging_arguments

DESCRIPTION = """\
Export MobileLLM-R1 and other small language models to phones. A checkpoint is
quantized once and lowered to mobile formats with the same integers in each;
the integers and the logits of each format are verified.

  mobilellm inspect examples/mobilellm-r1-nano
  mobilellm export mobilellm-r1-nano-int4 --checkpoint examples/mobilellm-r1-nano -o build/nano
  mobilellm generate build/nano --prompt "Ada has 12 eggs. Ada sells 5. ..."

A CHECKPOINT is a Hugging Face model folder or a hub id (owner/name). A RECIPE is
a YAML file or a name from `mobilellm recipes`; arguments key=value override it,
for example max_context=4096.
"""
EPILOG = "Exit codes: 0 success, 1 a check failed, 2 wrong usage or bad input."
#: Columns of a wrapped description.
_WIDTH = 79

Command = Callable[[argparse.Namespace], int]


def parse(typed: Sequence[str] | None, run: Mapping[str, Command]) -> argparse.Namespace:
    """Parse a command line. Exits with code 2 and a message for wrong usage.

    Arguments key=value may follow options, where argparse does not accept them by itself.
    """
    parser = _parser(run)
    if [*(sys.argv[1:] if typed is None else typed)][:1] == ["count"]:  # of earlier versions
        parser.error("count is now a device: mobilellm profile BUNDLE --device count:cortex-a76")
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

    def command(
        name: str, summary: str, example: str, details: str = ""
    ) -> argparse.ArgumentParser:
        text = textwrap.fill(f"{summary}. {details}".strip(), _WIDTH)
        sub = commands.add_parser(
            name, help=summary, description=f"{text}\n\n  {example}", formatter_class=raw,
            epilog=EPILOG,
        )  # fmt: skip
        sub.set_defaults(run=run[name])
        sub.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        sub.add_argument("-v", "--verbose", action="store_true", help="print the log on stderr")
        return sub

    nano, formats = "examples/mobilellm-r1-nano", names()
    sub = command(
        "inspect", "Show a checkpoint and the predicted size of each recipe, or a file of a format",
        f"mobilellm inspect {nano}",
        "For a checkpoint: architecture, parameters and data types, and for each recipe the "
        "predicted size of the file, of the KV cache and of the memory. For a file or package of a "
        "mobile format: its content, whatever tool made it.",
    )  # fmt: skip
    sub.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="model folder, hub id (owner/name), or a file of a format",
    )
    sub.add_argument(
        "--device", metavar="NAME",
        help="also predict the decode speed on a device from mobilellm devices, such as pixel-8",
    )  # fmt: skip

    sub = command(
        "quantize", "Quantize a checkpoint to integer codes and scales",
        f"mobilellm quantize mobilellm-r1-nano-int4 --checkpoint {nano} -o build/nano-int4",
        "The result is a quantized checkpoint, which mobilellm lower converts to every format.",
    )  # fmt: skip
    _recipe_arguments(sub)
    sub.add_argument(
        "--dequantize", type=Path, metavar="DIR",
        help="also write a Hugging Face model folder with the dequantized weights",
    )  # fmt: skip
    sub.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], default="float32",
        help="data type of --dequantize (default: float32, which is exact; the others round)",
    )  # fmt: skip
    sub.add_argument(
        "--as", dest="family", choices=["qwen3", "llama"],
        help="write the folder of --dequantize as a model of this type that computes the same; "
        "MobileLLM-R1 is a qwen3, which more engines run (default: the checkpoint's own type)",
    )  # fmt: skip

    sub = command(
        "lower", "Lower a quantized checkpoint to one mobile format",
        f"mobilellm lower build/nano-int4 --target {formats[0]} -o build/nano max_context=1024",
        "The result is an artifact with the codes and scales of the quantized checkpoint.",
    )  # fmt: skip
    sub.add_argument(
        "quantized", metavar="QUANTIZED", type=Path, help="folder from mobilellm quantize"
    )
    sub.add_argument(
        "overrides", metavar="key=value", nargs="*",
        help="options of the target, such as max_context=1024",
    )  # fmt: skip
    sub.add_argument(
        "--target", required=True, metavar="NAME", help=f"the format: {', '.join(formats)}"
    )
    _output_arguments(sub)

    sub = command(
        "export", "Quantize a checkpoint, lower it to every target, and verify the result",
        f"mobilellm export mobilellm-r1-nano-int4 --checkpoint {nano} -o build/nano",
        "If every check passes, the result is a verified bundle: the quantized checkpoint and one "
        "artifact for each target of the recipe.",
    )  # fmt: skip
    _recipe_arguments(sub)
    sub.add_argument(
        "--target", action="append", default=[], metavar="NAME",
        help="lower to this target only, which the recipe need not name; can be repeated",
    )  # fmt: skip
    _text_argument(sub)
    sub.add_argument(
        "--stages", type=Path, metavar="DIR",
        help="find finished stages of earlier exports in this folder, and keep this one's there; "
        "exports can share it",
    )  # fmt: skip
    sub.add_argument(
        "--prune-stages", type=float, metavar="DAYS",
        help="afterwards remove the stages that were not used for so many days (0: that this "
        "export did not use)",
    )  # fmt: skip

    sub = command(
        "verify", "Verify a bundle: derive every file again, and compare integers and logits",
        "mobilellm verify build/nano",
        "Every artifact is lowered again from the quantized checkpoint, and its files are compared "
        "byte for byte. The codes and scales decoded from each artifact are compared with the "
        "quantized checkpoint, and the logits of each artifact with the torch reference.",
    )  # fmt: skip
    _verify_arguments(sub)

    sub = command(
        "evaluate", "Measure the quality of a model on text and on problems",
        f"mobilellm evaluate build/nano --data FILE --reference {nano}",
        "On text: perplexity, and KL divergence and top-1 agreement with a reference. On problems: "
        "accuracy, and the generations that are the same as the reference's. An artifact runs in "
        "its own runtime.",
    )  # fmt: skip
    _evaluate_arguments(sub)

    sub = command(
        "generate", "Generate text with a checkpoint, a quantized checkpoint or an artifact",
        'mobilellm generate build/nano --prompt "Ada has 12 eggs. Ada sells 5. ..."',
    )  # fmt: skip
    _model_arguments(sub)
    sub.add_argument(
        "--prompt", required=True, metavar="TEXT", help="the prompt; - reads it from stdin"
    )
    sub.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N",
        help="limit of generated tokens (default: 512)",
    )  # fmt: skip
    sub.add_argument(
        "--temperature", type=float, default=0.0, metavar="T",
        help="sampling temperature (default: 0, greedy)",
    )  # fmt: skip
    sub.add_argument(
        "--top-p", type=float, default=1.0, metavar="P",
        help="sample from the most likely tokens with this total probability (default: 1)",
    )  # fmt: skip
    sub.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the sampling (default: 0)"
    )
    sub.add_argument("--raw", action="store_true", help="do not apply the chat template")
    sub.add_argument("--system", metavar="TEXT", help="system message for the chat template")

    _profile_arguments(
        command(
            "profile",
            "Measure load time, prefill, decode, memory and operators on devices",
            "mobilellm profile build/nano --device adb:SERIAL --device host -o build/nano.json",
            "Times are medians with a 95 % interval. Results from virtual or emulated devices are "
            "marked as such. A device count:CPU is an emulated Arm CPU, whose instructions and "
            "bytes for each token are counted: the same in every run, and no times.",
        )
    )
    packaging_arguments.add_commands(command)
    sub = command(
        "devices", "List the connected devices and the catalogue, or remove our files from devices",
        "mobilellm devices",
    )  # fmt: skip
    sub.add_argument(
        "--clean", nargs="*", metavar="DEVICE",
        help="remove what mobilellm profile copied to these devices (default: to all connected)",
    )  # fmt: skip
    command("recipes", "List the recipes that come with the tool", "mobilellm recipes")
    command("doctor", "Show which required and optional packages are installed", "mobilellm doctor")
    return parser


def _verify_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "bundle", metavar="BUNDLE", type=Path,
        help="folder or archive of a bundle, or a quantized checkpoint",
    )  # fmt: skip
    sub.add_argument(
        "--key", type=Path, metavar="FILE",
        help="require the signature of the owner of this public key (PEM)",
    )  # fmt: skip
    sub.add_argument(
        "--identity", default="", metavar="NAME",
        help="require a keyless signature of this identity, such as an e-mail address",
    )  # fmt: skip
    sub.add_argument("--issuer", default="", metavar="URL", help="who has confirmed the --identity")
    sub.add_argument(
        "--source", metavar="CHECKPOINT",
        help="also quantize this checkpoint again and compare it with the quantized checkpoint",
    )  # fmt: skip
    sub.add_argument(
        "--quick", action="store_true",
        help="do not derive the artifacts again: compare hashes, manifests, integers and logits",
    )  # fmt: skip
    _text_argument(sub)


def _evaluate_arguments(sub: argparse.ArgumentParser) -> None:
    def number(group: argparse._ArgumentGroup, flag: str, default: int | None, text: str) -> None:
        group.add_argument(flag, type=int, metavar="N", default=default, help=text)

    _model_arguments(sub)
    sub.add_argument(
        "--reference", metavar="CHECKPOINT",
        help="model to compare with, for KL divergence, top-1 agreement and --generations",
    )  # fmt: skip
    sub.add_argument(
        "-o", "--output", type=Path, metavar="FILE",
        help="write the result as JSON, for mobilellm package, gate and report",
    )  # fmt: skip
    text = sub.add_argument_group("text")
    text.add_argument("--data", type=Path, metavar="FILE", help="text file, JSONL or parquet")
    text.add_argument(
        "--field", metavar="NAME",
        help="field of a JSONL or parquet row with the text (default: text, messages, "
        "prompt + completion or question + answer)",
    )  # fmt: skip
    number(text, "--max-tokens", 8192, "limit of tokens of --data to score (default: 8192)")
    number(text, "--sequence-length", 512, "tokens per sequence (default: 512)")
    number(
        text, "--prefill", 1,
        "tokens of each sequence that an artifact reads in one prefill; the tokens after them are "
        "decoded one by one and scored (default: 1)",
    )  # fmt: skip
    text.add_argument(
        "--simulate", action="store_true",
        help="run the bundle's quantized checkpoint in torch, with activations rounded as in the "
        "runtime of the target",
    )  # fmt: skip
    text.add_argument(
        "--layers", action="store_true",
        help="also measure, in torch, the KL divergence that the quantized weights of each layer "
        "alone cause; the work grows with the square of the number of layers",
    )  # fmt: skip
    task = sub.add_argument_group("problems")
    task.add_argument(
        "--task", type=Path, metavar="FILE",
        help="JSONL or parquet with prompt (or question) and answer; the last \\boxed{} or #### of "
        "a generated text is its answer",
    )  # fmt: skip
    number(task, "--limit", None, "use only the first N problems")
    number(task, "--max-new-tokens", 512, "limit of generated tokens per problem (default: 512)")
    number(
        task, "--generations", 0,
        "compare the generations for the first N problems with those of --reference",
    )  # fmt: skip


def _profile_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("bundle", metavar="BUNDLE", type=Path, help="folder from mobilellm export")
    sub.add_argument(
        "overrides", metavar="key=value", nargs="*",
        help="overrides of the recipe's profile section, such as depths=[0,512]",
    )  # fmt: skip
    sub.add_argument(
        "--device", action="append", required=True, metavar="DEVICE",
        help="host, mac, adb:SERIAL, ssh:USER@HOST[:PORT] or count:CPU, such as count:cortex-a76; "
        "can be repeated, to measure several devices at the same time",
    )  # fmt: skip
    sub.add_argument(
        "--target", action="append", default=[], metavar="NAME",
        help="measure this artifact of the bundle only; can be repeated",
    )  # fmt: skip
    sub.add_argument(
        "--runner", type=Path, metavar="FILE",
        help="an official runner built for the device: llama_main, executor_runner, "
        "onnxruntime_perf_test or llama-bench",
    )  # fmt: skip
    sub.add_argument(
        "--threads", type=int, default=0, metavar="N",
        help="threads of the runtime, at most one for each core that a process may use "
        "(default: chosen for the device)",
    )  # fmt: skip
    sub.add_argument(
        "--cores", default="", metavar="LIST",
        help="run on these cores only, such as 4-7 or 0,2; the device needs taskset",
    )  # fmt: skip
    sub.add_argument(
        "--no-mmap", dest="mmap", action="store_false",
        help="read the model into memory instead of mapping it (native runner and llama.cpp)",
    )  # fmt: skip
    sub.add_argument(
        "--packed-cache", action="store_true",
        help="keep the weights as XNNPACK packs them in a file on the device, which all loads but "
        "the first map (native runner)",
    )  # fmt: skip
    sub.add_argument(
        "--timeout", type=float, default=1800.0, metavar="S",
        help="limit of one run in seconds (default: 1800)",
    )  # fmt: skip
    sub.add_argument(
        "-o", "--output", type=Path, metavar="FILE",
        help="write the report as JSON; an interrupted session resumes from this file",
    )  # fmt: skip
    sub.add_argument(
        "--plot", type=Path, metavar="FILE", help="write a plot of the report: .png, .svg or .pdf"
    )
    sub.add_argument(
        "--baseline", type=Path, metavar="FILE", help="an earlier report to compare with"
    )


def _model_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "path", metavar="PATH",
        help="a checkpoint (folder or hub id), a quantized checkpoint, an artifact, or a bundle, "
        "also as an archive",
    )  # fmt: skip
    sub.add_argument(
        "--target", metavar="NAME", help="the artifact of a bundle (default: its first one)"
    )


def _recipe_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("recipe", metavar="RECIPE", help="YAML file, or a name from mobilellm recipes")
    sub.add_argument("overrides", metavar="key=value", nargs="*", help="overrides of the recipe")
    sub.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="model folder or hub id (owner/name)"
    )
    _output_arguments(sub)


def _output_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "-o", "--output", required=True, type=Path, metavar="DIR",
        help="output folder, new or from an interrupted run, which is resumed",
    )  # fmt: skip
    sub.add_argument(
        "--overwrite", action="store_true", help="replace a finished result from other inputs"
    )


def _text_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--text", type=Path, metavar="FILE",
        help="text on which logits are compared (default: a built-in sample)",
    )  # fmt: skip
