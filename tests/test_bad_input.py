"""Bad input to the command line: exit code 2, a message to act on, and nothing touched."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import contents, flip, run
from conftest import LLAMA4, NANO, MakeCheckpoint, random_weights

from exporter.bundle.bundle import Bundle

RECIPE = "mobilellm-r1-nano-int4"
TINY = "model: tiny\ntargets: [{target: executorch, max_context: 64}]\n"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
#: More than one sequence.
PLENTY = json.dumps({"text": "Ada has 12 eggs. " * 400}) + "\n"


@dataclass(frozen=True)
class World:
    """Makes what a row of the table needs; the working directory is `root`."""

    root: Path
    make: MakeCheckpoint
    finished: Bundle

    def export(self, checkpoint: object, *overrides: str, recipe: str = "tiny.yaml") -> list[str]:
        self.write(self.root / "tiny.yaml", TINY)
        return ["export", recipe, *overrides, "--checkpoint", str(checkpoint), "-o", "out"]

    def config(self, **changes: Any) -> list[str]:
        """Export a checkpoint with another configuration, beside weights that do not matter."""
        folder = self.make()
        self.write(folder / "config.json", json.dumps({**LLAMA4, **changes}))
        return self.export(folder)

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], object]) -> list[str]:
        """Export a checkpoint whose tensors `change` has edited."""
        weights = random_weights(LLAMA4, torch.bfloat16)
        change(weights)
        return self.export(self.make(weights=weights))

    def recipe(self, text: str | bytes) -> list[str]:
        file = self.write(self.root / "recipe.yaml", text)
        return self.export(self.make(), recipe=str(file))

    def nano_with(self, name: str, text: str) -> Path:
        """The demo checkpoint with one file of it replaced, or added."""
        folder = Path(shutil.copytree(NANO, self.root / "nano"))
        self.write(folder / name, text)
        return folder

    def bundle(self) -> Path:
        return Path(shutil.copytree(self.finished.path, self.root / "bundle"))

    def part(self, name: str) -> Path:
        """The quantized checkpoint or the artifact of the demo bundle, alone."""
        return Path(shutil.copytree(self.finished.path / name, self.root / "part"))

    def unfinished(self) -> Path:
        bundle = self.bundle()
        (bundle / "SHA256SUMS").unlink()
        return bundle

    def edit(self, path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
        content = json.loads(path.read_text())
        change(content)
        self.write(path, json.dumps(content))
        return path.parent

    def write(self, path: Path, content: str | bytes) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def generate(self, path: object, *options: str, prompt: str = "Ada") -> list[str]:
        return ["generate", str(path), "--prompt", prompt, *options]

    def data(
        self, content: str | bytes, *options: str, path: object = NANO, length: int = 512
    ) -> list[str]:
        """Evaluate a model on a data file with this content."""
        file = self.write(self.root / "data.jsonl", content)
        sized = [] if "--sequence-length" in options else ["--sequence-length", str(length)]
        return ["evaluate", str(path), "--data", str(file), *sized, *options]

    def task(self, content: str) -> list[str]:
        """Evaluate the demo bundle on a task file with this content."""
        file = self.write(self.root / "task.jsonl", content)
        return ["evaluate", str(self.finished.path), "--task", str(file)]

    def calibrate(
        self, *overrides: str, content: str | bytes = PLENTY, name: str = "data.jsonl"
    ) -> list[str]:
        """Quantize the demo checkpoint, calibrated on a data file with this content."""
        file = self.write(self.root / name, content)
        settings = ["quantization.method=distill", f"calibration.data=[{{path: {file}}}]"]
        return ["quantize", RECIPE, *settings, *overrides, "--checkpoint", str(NANO), "-o", "out"]

    def lower(self, quantized: object, *options: str, target: str = "executorch") -> list[str]:
        return ["lower", str(quantized), *options, "--target", target, "-o", "out"]


@pytest.fixture
def world(
    tmp_path: Path,
    make_checkpoint: MakeCheckpoint,
    finished_bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> World:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return World(tmp_path, make_checkpoint, finished_bundle)


def _shard_outside(w: World) -> list[str]:
    folder = w.make()
    (folder / "model.safetensors").rename(w.root / "elsewhere.safetensors")
    index = {"weight_map": {Q_PROJ: "../elsewhere.safetensors"}}
    w.write(folder / "model.safetensors.index.json", json.dumps(index))
    return w.export(folder)


def _shard_missing(w: World) -> list[str]:
    folder = w.make()
    index = {"weight_map": {Q_PROJ: "model-2.safetensors"}}
    w.write(folder / "model.safetensors.index.json", json.dumps(index))
    return w.export(folder)


def _pickle_only(w: World) -> list[str]:
    folder = w.make()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return w.export(folder)


def _executorch_alone(w: World) -> Path:
    manifest = w.bundle() / "manifest.json"
    return w.edit(manifest, lambda content: content.update(targets=["executorch"]))


def _without(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder


def _truncated(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path.parent


def _flipped(path: Path) -> Path:
    flip(path, path.stat().st_size // 2)
    return path.parent


def _set_nan(weights: dict[str, torch.Tensor]) -> None:
    weights[Q_PROJ][3, 5] = torch.nan


def _index_of_names(w: World, weight_map: dict[str, Any]) -> list[str]:
    folder = w.make()
    w.write(folder / "model.safetensors.index.json", json.dumps({"weight_map": weight_map}))
    return w.export(folder)


def _finished_elsewhere(w: World) -> list[str]:
    shutil.copytree(w.finished.path, "out")
    return w.export(NANO, recipe="mobilellm-r1-nano-int8")


def _tokenizer_of_another_model(w: World) -> Path:
    """96 tokens in the model, 512 in the tokenizer."""
    folder = w.make()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO / name, folder)
    return folder


def _other_tokenizer(w: World) -> Path:
    """The demo checkpoint with two of its tokens exchanged."""
    text = (NANO / "tokenizer.json").read_text()
    vocabulary = json.loads(text)["model"]["vocab"]
    one, other = (next(name for name, i in vocabulary.items() if i == at) for at in (40, 41))
    content = json.loads(text)
    content["model"]["vocab"] |= {one: 41, other: 40}
    return w.nano_with("tokenizer.json", json.dumps(content))


Row = Callable[[World], list[str]]


def _setting(name: str, value: str) -> Row:
    """Calibrate with one number changed; YAML writes what is not finite with a dot."""
    written = f".{value}" if value in ("nan", "inf") else value
    return lambda w: w.calibrate(f"calibration.{name}={written}")


CONFIGS: dict[str, tuple[Row, list[str]]] = {
    "model of another kind": (
        lambda w: w.config(model_type="gpt2"),
        ["model_type", "'gpt2' is not supported", "llama4_text"],
    ),
    "activation": (lambda w: w.config(hidden_act="gelu"), ["hidden_act", "'gelu'", "'silu'"]),
    "odd head_dim": (lambda w: w.config(head_dim=31), ["head_dim", "31", "even"]),
    "heads that do not divide": (
        lambda w: w.config(num_key_value_heads=2),
        ["num_key_value_heads", "2", "divisor of 3"],
    ),
    "vocabulary as text": (lambda w: w.config(vocab_size="96"), ["vocab_size", "'96'", "number"]),
    "no layers": (lambda w: w.config(num_hidden_layers=0), ["num_hidden_layers", "0"]),
    "half a layer": (lambda w: w.config(num_hidden_layers=1.5), ["1.5", "whole number"]),
    "experts": (lambda w: w.config(moe_layers=[1]), ["moe_layers", "[1]", "dense"]),
    "layer without RoPE": (
        lambda w: w.config(no_rope_layers=[1, 0]),
        ["no_rope_layers", "[1, 0]", "RoPE in every layer"],
    ),
    "no_rope_layers is a number": (
        lambda w: w.config(no_rope_layers=4),
        ["no_rope_layers", "4", "RoPE in every layer"],
    ),
    "scaled RoPE": (
        lambda w: w.config(rope_scaling={"rope_type": "llama3", "factor": 8}),
        ["rope_scaling", "llama3", "null"],
    ),
    "rope_parameters is a list": (
        lambda w: w.config(rope_parameters=[10000.0]),
        ["rope_parameters", "[10000.0]"],
    ),
    "RoPE base of one": (lambda w: w.config(rope_theta=1), ["rope_theta", "greater than one"]),
    "chunked attention": (
        lambda w: w.config(attention_chunk_size=128),
        ["attention_chunk_size", "128", "256"],
    ),
    "chunk size as text": (
        lambda w: w.config(attention_chunk_size="256"),
        ["attention_chunk_size", "'256'"],
    ),
    "biased attention": (lambda w: w.config(attention_bias=True), ["attention_bias", "false"]),
    "sliding window": (lambda w: w.config(sliding_window=128), ["sliding_window", "128"]),
    "already quantized": (
        lambda w: w.config(quantization_config={"bits": 4}),
        ["quantization_config", "bits", "float checkpoints"],
    ),
    "tied as text": (
        lambda w: w.config(tie_word_embeddings="yes"),
        ["tie_word_embeddings", "'yes'", "true or false"],
    ),
    "end token outside": (
        lambda w: w.config(eos_token_id=96),
        ["eos_token_id", "96", "vocabulary of 96", "between 0 and"],
    ),
    "end token is true": (lambda w: w.config(eos_token_id=True), ["eos_token_id", "True"]),
    "hidden size is NaN": (lambda w: w.config(hidden_size=float("nan")), ["hidden_size", "nan"]),
    "infinitely many layers": (
        lambda w: w.config(num_hidden_layers=float("inf")),
        ["num_hidden_layers", "inf"],
    ),
    "end token outside in generation_config.json": (
        lambda w: w.export(w.nano_with("generation_config.json", '{"eos_token_id": 512}')),
        ["generation_config.json", "eos_token_id", "512"],
    ),
    "no config": (
        lambda w: w.export(_without(w.make(), "config.json")),
        ["config.json", "no such file", "whole folder"],
    ),
    "config is no JSON": (
        lambda w: w.export(w.nano_with("config.json", "{not json")),
        ["config.json", "not valid JSON", "Get the file again"],
    ),
    "config is a list": (
        lambda w: w.export(w.nano_with("config.json", "[1]")),
        ["config.json", "holds a list, not an object"],
    ),
}

WEIGHTS: dict[str, tuple[Row, list[str]]] = {
    "tensor missing": (
        lambda w: w.tensors(lambda t: t.pop(Q_PROJ)),
        [Q_PROJ, "no weight file holds it", "Check that config.json"],
    ),
    "tensor of another shape": (
        lambda w: w.tensors(lambda t: t.update({Q_PROJ: t[Q_PROJ][:, :32].contiguous()})),
        [Q_PROJ, "[96, 32]", "[96, 64]", "Check that config.json"],
    ),
    "extra tensor": (
        lambda w: w.tensors(lambda t: t.update({"model.extra": torch.ones(2)})),
        ["model.extra", "no such tensor", "Remove it"],
    ),
    "integer weights": (
        lambda w: w.tensors(lambda t: t.update({Q_PROJ: t[Q_PROJ].to(torch.int8)})),
        [Q_PROJ, "I8", "float checkpoints"],
    ),
    "NaN": (
        lambda w: w.tensors(_set_nan),
        [Q_PROJ, "1 of 6144 values are NaN", "get it again"],
    ),
    "tied output that differs": (
        lambda w: w.tensors(lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1})),
        ["lm_head.weight", "differs from the embedding", "tie_word_embeddings"],
    ),
    "truncated weights": (
        lambda w: w.export(_truncated(w.make() / "model.safetensors")),
        ["model.safetensors", "not a whole safetensors file", "Get the file again"],
    ),
    "no weights": (
        lambda w: w.export(_without(w.make(), "model.safetensors")),
        ["no model.safetensors", "complete model folder"],
    ),
    "pickle": (_pickle_only, ["pytorch_model.bin", "pickle", "Convert it to safetensors"]),
    "shard outside": (
        _shard_outside,
        ["../elsewhere.safetensors", "not the plain name", "own folder"],
    ),
    "shard missing": (_shard_missing, ["model-2.safetensors", "missing", "Get it again"]),
    "index with a list for a shard": (
        lambda w: _index_of_names(w, {Q_PROJ: ["model.safetensors"]}),
        ["weight_map", "['model.safetensors']"],
    ),
    "checkpoint is no folder": (
        lambda w: w.export("./nowhere"),
        ["./nowhere", "is not a folder", "hub id"],
    ),
    "checkpoint is a file": (
        lambda w: w.export(NANO / "config.json"),
        ["config.json", "is not a folder", "hub id"],
    ),
    "hub id without network": (
        lambda w: w.export("facebook/no-such-model"),
        ["facebook/no-such-model", "no such folder", "the network"],
    ),
}

RECIPES: dict[str, tuple[Row, list[str]]] = {
    "no such recipe": (
        lambda w: w.export(w.make(), recipe="mobilellm-int3"),
        ["mobilellm-int3", "no such recipe", "mobilellm recipes"],
    ),
    "invalid YAML": (lambda w: w.recipe("a: [1\n"), ["recipe.yaml", "not valid YAML", "Correct"]),
    "recipe not UTF-8": (lambda w: w.recipe(b"name: \xff\n"), ["recipe.yaml", "not valid YAML"]),
    "recipe is a list": (lambda w: w.recipe("- a\n"), ["recipe.yaml", "mapping", "recipes/"]),
    "empty recipe": (lambda w: w.recipe(""), ["recipe.yaml", "mapping", "recipes/"]),
    "impossible date": (lambda w: w.recipe("model: 2026-13-45\n"), ["recipe.yaml", "month"]),
    "unknown key": (
        lambda w: w.recipe("quantisation: {}\n"),
        ["recipe.yaml", "unknown key 'quantisation'", "Keys: name, model, license, quantization"],
    ),
    "unknown key of a part": (
        lambda w: w.recipe("quantization: {bits: 4}\n"),
        ["quantization", "unknown key 'bits'", "Keys: linear, embedding"],
    ),
    "bits in a target": (
        lambda w: w.recipe("targets: [{target: executorch, bits: 4}]\n"),
        ["targets.0", "unknown key 'bits'", "max_context"],
    ),
    "targets is a mapping": (
        lambda w: w.recipe("targets: {target: executorch}\n"),
        ["targets", "not a list of targets"],
    ),
    "no targets": (lambda w: w.recipe("targets: []\n"), ["targets", "empty", "executorch"]),
    "target twice": (
        lambda w: w.recipe("targets: [{target: executorch}, {target: executorch}]\n"),
        ["targets", "twice", "executorch"],
    ),
    "unknown target": (
        lambda w: w.recipe("targets: [{target: tflite}]\n"),
        ["targets.0.target", "'tflite' is not a target", "Known: coreml, executorch"],
    ),
    "method": (
        lambda w: w.recipe("quantization: {method: magic}\n"),
        ["quantization.method", "'magic'", "'absmax', 'mse'"],
    ),
    "scheme": (
        lambda w: w.recipe("quantization: {linear: int3-g32}\n"),
        ["quantization.linear", "'int3-g32' is not a scheme", "Write int4-gN"],
    ),
    "group size": (
        lambda w: w.recipe("quantization: {linear: int4-g48}\n"),
        ["quantization.linear", "'int4-g48'", "32, 64, 128, 256"],
    ),
    "name is a number": (lambda w: w.recipe("name: 7\n"), ["name", "7 is not of type str"]),
    "quantization is a text": (
        lambda w: w.recipe("quantization: int4\n"),
        ["quantization", "'int4' is not a mapping"],
    ),
    "context as text": (
        lambda w: w.export(w.make(), "targets.0.max_context=1k"),
        ["targets.0.max_context", "'1k' is not of type int"],
    ),
    "context is true": (
        lambda w: w.export(w.make(), "targets.0.max_context=true"),
        ["targets.0.max_context", "True is not of type int"],
    ),
    "context of one": (
        lambda w: w.export(w.make(), "targets.0.max_context=1"),
        ["targets.0.max_context", "1 is too short", "2 or more"],
    ),
    "context longer than the model's": (
        lambda w: w.export(w.make(), "targets.0.max_context=257"),
        ["max_context", "257 is more than the model's 256", "Lower max_context"],
    ),
    "override without value": (
        lambda w: w.export(w.make(), "max_context"),
        ["max_context", "is not an override", "key=value"],
    ),
    "override of an unknown key": (
        lambda w: w.export(w.make(), "targets.0.bits=3"),
        ["targets.0", "unknown key 'bits'", "max_context"],
    ),
    "override of a target that is not there": (
        lambda w: w.export(w.make(), "targets.1.max_context=64"),
        ["targets.1.max_context=64", "'1' is not one of 0..0", "Count from 0"],
    ),
    "override into a text": (
        lambda w: w.export(w.make(), "model.size=3"),
        ["model.size=3", "'model' holds no keys"],
    ),
    "override that is no YAML": (
        lambda w: w.export(w.make(), "targets.0.max_context=[64"),
        ["targets.0.max_context=[64", "YAML"],
    ),
    "override that is an impossible date": (
        lambda w: w.export(w.make(), "model=2026-13-45"),
        ["model=2026-13-45"],
    ),
    "pattern that matches nothing": (
        lambda w: w.export(w.make(), "quantization.overrides.*.qkv.*=int8"),
        ["*.qkv.*", "matches no tensor", "q_proj.weight"],
    ),
    "quantized norm": (
        lambda w: w.export(w.make(), "quantization.overrides.model.norm.weight=int4"),
        ["model.norm.weight", "needs a matrix", "[64]", "override"],
    ),
    "group that does not divide": (
        lambda w: w.export(w.make(), "quantization.linear=int4-g64"),
        ["o_proj.weight", "groups of 64 do not divide its input width 96", "another scheme"],
    ),
    "int8 groups for a multiplied weight": (
        lambda w: w.export(w.make(), "quantization.linear=int8-g32"),
        [Q_PROJ, "int8-g32", "one scale per row only", "Use int8"],
    ),
    "an opset for onnx": (
        lambda w: w.recipe("targets:\n  - target: onnx\n    opset: 9\n"),
        ["targets.0", "unknown key 'opset'", "form"],
    ),
    "an unknown onnx form": (
        lambda w: w.recipe("targets:\n  - target: onnx\n    form: fused\n"),
        ["targets.0.form", "'fused'", "'contrib', 'portable'"],
    ),
    "onnx with bfloat16": (
        lambda w: w.recipe("targets:\n  - target: onnx\n    activations: bfloat16\n"),
        ["targets.0.activations", "'bfloat16'", "'float32', 'float16'"],
    ),
    "int8 products in standard operators": (
        lambda w: w.recipe("targets:\n  - target: onnx\n    form: portable\n    max_context: 64\n"),
        ["products", "'int8' needs ONNX Runtime's own operators", "Set products to float"],
    ),
    "an onnx context longer than the model's": (
        lambda w: w.recipe("targets:\n  - target: onnx\n    max_context: 100000\n"),
        ["max_context", "100000 is more than the model's", "Lower max_context"],
    ),
    "a target that the recipe does not have": (
        lambda w: [*w.export(w.make()), "--target", "tflite"],
        ["--target tflite", "'tflite' is not a target", "Known: coreml, executorch, gguf"],
    ),
    "int8 groups for a tied embedding": (
        lambda w: w.export(w.make(), "quantization.embedding=int8-g32"),
        [EMBEDDING, "int8-g32", "one scale per row only", "Use int8"],
    ),
}


def _file_out(w: World) -> list[str]:
    w.write(w.root / "out", "x")
    return w.export(NANO)


def _foreign_out(w: World) -> list[str]:
    w.write(w.root / "out" / "thesis.tex", "years of work")
    return w.export(NANO)


OUTPUTS: dict[str, tuple[Row, list[str]]] = {
    "output is a file": (
        _file_out,
        ["out", "is a file", "Give a folder"],
    ),
    "output below a file": (
        lambda w: [*w.export(NANO)[:-1], str(w.write(w.root / "note", "x") / "out")],
        ["note/out", "folder"],
    ),
    "output of something else": (
        _foreign_out,
        ["out", "thesis.tex", "new or an empty folder; nothing in this one was changed"],
    ),
    "finished result of other inputs": (
        _finished_elsewhere,
        ["out", "finished result of other inputs", "--overwrite"],
    ),
    "quantized checkpoint for a folder with a bundle": (
        lambda w: ["quantize", RECIPE, "--checkpoint", str(NANO), "-o", str(w.bundle())],
        ["bundle", "holds other files", "new or an empty folder"],
    ),
    "dequantized into something else": (
        lambda w: [
            "quantize", RECIPE, "--checkpoint", str(NANO), "-o", "out",
            "--dequantize", str(w.write(w.root / "mine" / "thesis.tex", "x").parent),
        ],
        ["mine", "thesis.tex", "new or an empty folder"],
    ),
    "text missing for export": (
        lambda w: [*w.export(NANO), "--text", "nowhere.txt"],
        ["nowhere.txt", "cannot be opened", "No such file"],
    ),
}  # fmt: skip

LOWERING: dict[str, tuple[Row, list[str]]] = {
    "no quantized checkpoint": (
        lambda w: w.lower(w.make()),
        ["quantization.json", "no such file", "whole folder"],
    ),
    "quantized checkpoint that is nowhere": (
        lambda w: w.lower("nowhere"),
        ["nowhere", "no such file"],
    ),
    "target without a backend": (
        lambda w: w.lower(w.part("quantized"), target="tflite"),
        ["--target", "'tflite' is not a target", "Known: coreml, executorch"],
    ),
    "unknown fact of a target": (
        lambda w: w.lower(w.part("quantized"), "backend=qnn"),
        ["--target", "unknown key 'backend'", "Keys: target, max_context, delegate, attention"],
    ),
    "unknown delegate": (
        lambda w: w.lower(w.part("quantized"), "delegate=qnn"),
        ["--target: delegate", "'qnn' is not one of 'xnnpack', 'coreml'"],
    ),
    "attention of a Core ML delegate": (
        lambda w: w.lower(w.part("quantized"), "delegate=coreml", "attention=portable"),
        ["attention", "portable is an option of XNNPACK", "Leave it out"],
    ),
    "half activations in XNNPACK": (
        lambda w: w.lower(w.part("quantized"), "activations=float16"),
        ["activations", "XNNPACK's are float32 and int8, not float16", "set delegate to coreml"],
    ),
    "attention form": (
        lambda w: w.lower(w.part("quantized"), "attention=flash"),
        ["attention", "'flash'", "'custom_sdpa', 'portable'"],
    ),
    "context for lower": (
        lambda w: w.lower(w.part("quantized"), "max_context=4096"),
        ["max_context", "4096 is more than the model's 2048", "Lower"],
    ),
    "quantized checkpoint of another version": (
        lambda w: w.lower(
            w.edit(w.part("quantized") / "quantization.json", lambda m: m.update(format_version=9))
        ),
        ["format_version", "9 is not known", "quantize the checkpoint again"],
    ),
    "quantized checkpoint with another list of tensors": (
        lambda w: w.lower(
            w.edit(w.part("quantized") / "quantization.json", lambda m: m["tensors"].pop(Q_PROJ))
        ),
        ["tensors", "does not list the model's tensors", "Quantize again"],
    ),
    "quantized checkpoint with a tensor without scheme": (
        lambda w: w.lower(
            w.edit(
                w.part("quantized") / "quantization.json",
                lambda m: m["tensors"][Q_PROJ].pop("scheme"),
            )
        ),
        ["quantization.json", Q_PROJ, "scheme"],
    ),
    "quantized checkpoint without weights": (
        lambda w: w.lower(_without(w.part("quantized"), "quantized.safetensors")),
        ["quantized.safetensors", "not a whole safetensors file", "Quantize the checkpoint again"],
    ),
    "truncated quantized checkpoint": (
        lambda w: w.lower(_truncated(w.part("quantized") / "quantized.safetensors")),
        ["quantized.safetensors", "not a whole safetensors file", "Quantize the checkpoint again"],
    ),
    "quantized checkpoint with a flipped bit": (
        lambda w: w.lower(_flipped(w.part("quantized") / "quantized.safetensors")),
        ["quantized.safetensors", "sha256"],
    ),
}

VERIFYING: dict[str, tuple[Row, list[str]]] = {
    "no bundle": (
        lambda w: ["verify", str(w.make())],
        ["model", "is not a bundle", "mobilellm export makes one"],
    ),
    "bundle that is nowhere": (lambda w: ["verify", "nowhere"], ["nowhere", "is not a bundle"]),
    "unfinished bundle": (
        lambda w: ["verify", str(w.unfinished())],
        ["bundle", "did not finish", "Run the same mobilellm export again"],
    ),
    "text missing": (
        lambda w: ["verify", str(w.bundle()), "--text", "nowhere.txt"],
        ["nowhere.txt", "cannot be opened", "No such file"],
    ),
    "text not UTF-8": (
        lambda w: ["verify", str(w.bundle()), "--text", str(w.write(w.root / "t.txt", b"\xff"))],
        ["t.txt", "cannot be read", "UTF-8"],
    ),
    "text too short": (
        lambda w: ["verify", str(w.bundle()), "--text", str(w.write(w.root / "t.txt", "a"))],
        ["t.txt", "gives 2 tokens, too few", "Give more text"],
    ),
}  # fmt: skip

GENERATING: dict[str, tuple[Row, list[str]]] = {
    "model that is nowhere": (
        lambda w: w.generate("./nowhere"),
        ["./nowhere", "is not a folder", "hub id"],
    ),
    "top-p of zero": (
        lambda w: w.generate(NANO, "--top-p", "0"),
        ["--top-p", "0.0 is out of range", "above 0 and up to 1"],
    ),
    "top-p above one": (lambda w: w.generate(NANO, "--top-p", "1.5"), ["--top-p", "1.5"]),
    "top-p is not a number": (lambda w: w.generate(NANO, "--top-p", "nan"), ["--top-p", "nan"]),
    "negative temperature": (
        lambda w: w.generate(NANO, "--temperature", "-1"),
        ["--temperature", "-1.0 is out of range", "0 (greedy) or more"],
    ),
    "no new tokens": (
        lambda w: w.generate(NANO, "--max-new-tokens", "0"),
        ["--max-new-tokens", "0 is out of range", "1 or more"],
    ),
    "seed beyond 64 bits": (
        lambda w: w.generate(NANO, "--temperature", "1", "--seed", str(10**30)),
        ["--seed", str(10**30)],
    ),
    "empty prompt": (
        lambda w: w.generate(NANO, "--raw", prompt=""),
        ["prompt", "has no tokens", "Give some text"],
    ),
    "prompt longer than the context": (
        lambda w: w.generate(w.bundle(), "--raw", prompt="eggs " * 1100),
        ["prompt", "the context holds 1024", "larger max_context"],
    ),
    "prompt that is no text": (
        lambda w: w.generate(NANO, "--raw", prompt="Ada \udcff"),
        ["prompt", "UTF-8"],
    ),
    "no tokenizer": (
        lambda w: w.generate(w.make()),
        ["tokenizer.json", "no such file", "Text needs the model's tokenizer.json"],
    ),
    "broken tokenizer": (
        lambda w: w.generate(w.nano_with("tokenizer.json", "{}")),
        ["tokenizer.json", "is not a tokenizer", "Get the file again"],
    ),
    "tokenizer of another model": (
        lambda w: w.generate(_tokenizer_of_another_model(w)),
        ["vocabulary of 96"],
    ),
    "broken chat template": (
        lambda w: w.generate(w.nano_with("chat_template.jinja", "{% for %}")),
        ["chat template", "cannot be rendered", "--raw"],
    ),
    "system message without a template": (
        lambda w: w.generate(w.nano_with("tokenizer_config.json", "{}"), "--system", "Be brief"),
        ["has no chat template", "--raw"],
    ),
    "target of a checkpoint": (
        lambda w: w.generate(NANO, "--target", "executorch"),
        ["--target", "is not a bundle", "Leave the option out"],
    ),
    "target that a bundle does not hold": (
        lambda w: w.generate(_executorch_alone(w), "--target", "coreml"),
        ["--target coreml", "is not in", "It holds: executorch"],
    ),
    "unfinished bundle to generate": (
        lambda w: w.generate(w.unfinished()),
        ["did not finish", "Run the same mobilellm export again"],
    ),
    "flipped program": (
        lambda w: w.generate(_flipped(w.part("executorch") / "model.pte")),
        ["model.pte", "sha256", "damaged", "lower it again"],
    ),
    "truncated program": (
        lambda w: w.generate(_truncated(w.part("executorch") / "model.pte") / "model.pte"),
        ["model.pte", "sha256", "damaged", "lower it again"],
    ),
    "program without its folder": (
        lambda w: w.generate(shutil.copy(w.finished.path / "executorch/model.pte", w.root)),
        ["artifact.json", "no such file", "whole folder"],
    ),
    "artifact's manifest without hashes": (
        lambda w: w.generate(
            w.edit(w.part("executorch") / "artifact.json", lambda m: m.pop("files"))
        ),
        ["artifact.json: files", "is missing", "ower the model again"],
    ),
    "flipped quantized checkpoint to generate": (
        lambda w: w.generate(_flipped(w.part("quantized") / "quantized.safetensors")),
        ["quantized.safetensors", "sha256"],
    ),
}

EVALUATING: dict[str, tuple[Row, list[str]]] = {
    "nothing to evaluate": (lambda w: ["evaluate", str(NANO)], ["nothing to measure", "--data"]),
    "no such data": (
        lambda w: ["evaluate", str(NANO), "--data", "no.txt"],
        ["no.txt", "No such file", "Check the path"],
    ),
    "empty data": (lambda w: w.data(""), ["data.jsonl", "is empty"]),
    "data in Latin-1": (
        lambda w: w.data("Köln".encode("latin-1")), ["data.jsonl", "0xf6", "UTF-8"]
    ),
    "line without the field": (
        lambda w: w.data('{"text": "a"}\n{"body": "b"}\n'),
        ["data.jsonl: line 2", "'text'", "--field", "'body'"],
    ),
    "line that is no JSON": (
        lambda w: w.data('{"text": "a"}\ntext\n'), ["data.jsonl: line 2", "not valid JSON"]
    ),
    "field that is not there": (
        lambda w: w.data('{"text": "a"}\n', "--field", "body"), ["line 1", "no field 'body'"]
    ),
    "data shorter than one sequence": (
        lambda w: w.data('{"text": "two eggs"}\n'),
        ["--data", "tokens, less than one sequence of 512", "--sequence-length"],
    ),
    "fewer tokens than one sequence": (
        lambda w: w.data(PLENTY, "--max-tokens", "100"),
        ["--max-tokens 100", "less than one sequence", "512 or more"],
    ),
    "sequence of one": (
        lambda w: w.data(PLENTY, "--sequence-length", "1"), ["--sequence-length 1", "2 or more"]
    ),
    "prefill of the whole sequence": (
        lambda w: w.data(PLENTY, "--prefill", "512"), ["--prefill 512", "nothing to predict"]
    ),
    "sequence longer than the context": (
        lambda w: w.data(PLENTY, "--sequence-length", "1200", path=w.part("executorch")),
        ["--sequence-length 1200", "the 1024 tokens", "part"],
    ),
    "reference that is nowhere": (
        lambda w: w.data(PLENTY, "--reference", "./nowhere"), ["./nowhere", "is not a folder"]
    ),
    "reference of another size": (
        lambda w: w.data(PLENTY, "--reference", str(w.make())),
        ["--reference", "vocabulary of 96 tokens, the model one of 512", "was made from"],
    ),
    "reference with another tokenizer": (
        lambda w: w.data(PLENTY, "--reference", str(_other_tokenizer(w))),
        ["--reference", "another tokenizer"],
    ),
    "reference with nothing to compare": (
        lambda w: [*w.task('{"prompt": "a", "answer": "1"}'), "--reference", str(NANO)],
        ["--reference", "--generations"],
    ),
    "field without data": (
        lambda w: [*w.task('{"prompt": "a", "answer": "1"}'), "--field", "a"], ["--field", "--data"]
    ),
    "evaluation with a tokenizer of another model": (
        lambda w: w.data(PLENTY, path=_tokenizer_of_another_model(w), length=64),
        ["tokenizer.json", "vocabulary of 96"],
    ),
    "target of a checkpoint to evaluate": (
        lambda w: w.data(PLENTY, "--target", "onnx"), ["--target", "is not a bundle"]
    ),
    "checkpoint to simulate": (
        lambda w: w.data(PLENTY, "--simulate"), ["--simulate", "is not a bundle"]
    ),
    "simulated answers": (
        lambda w: [*w.task('{"prompt": "a", "answer": "1"}'), "--simulate"],
        ["--simulate", "--data only"],
    ),
    "flipped program to evaluate": (
        lambda w: w.data(PLENTY, path=_flipped(w.part("onnx") / "onnx" / "model_q4.onnx").parent),
        ["onnx/model_q4.onnx", "sha256", "damaged"],
    ),
    "task of plain text": (
        lambda w: ["evaluate", str(NANO), "--task", str(w.write(w.root / "t.txt", "a"))],
        ["t.txt", "has no rows", ".jsonl"],
    ),
    "empty task": (lambda w: w.task("\n"), ["task.jsonl", "no problems"]),
    "problem without answer": (
        lambda w: w.task('{"prompt": "a"}'), ["line 1", "no field 'answer'", "'prompt'"]
    ),
    "problem without prompt": (
        lambda w: w.task('{"answer": "a"}'), ["line 1", "no field 'prompt' or 'question'"]
    ),
    "answer that is a list": (
        lambda w: w.task('{"prompt": "a", "answer": [1]}'), ["line 1: answer", "[1] is not text"]
    ),
    "problem longer than the context": (
        lambda w: [*w.task('{"prompt": "a", "answer": "1"}\n{"prompt": "%s", "answer": "1"}'
                           % ("eggs " * 1100)), "--target", "onnx"],
        ["problem 2", "the context holds 1024"],
    ),
    "no problems wanted": (
        lambda w: [*w.task('{"prompt": "a", "answer": "1"}'), "--limit", "0"],
        ["--limit 0", "1 or more"],
    ),
    "generations without a reference": (
        lambda w: [*w.task('{"prompt": "a", "answer": "1"}'), "--generations", "2"],
        ["--generations", "--reference"],
    ),
}  # fmt: skip

CALIBRATING: dict[str, tuple[Row, list[str]]] = {
    "unknown method": (
        lambda w: w.calibrate("quantization.method=awq"),
        ["quantization.method", "'awq' is not one of", "'distill'"],
    ),
    "empty calibration data": (
        lambda w: w.calibrate(content=""), ["data.jsonl", "is empty", "some text"]
    ),
    "calibration data of blanks": (
        lambda w: w.calibrate(content=" \n\n", name="a.txt"), ["a.txt", "holds no text"]
    ),
    "calibration data in a wrong encoding": (
        lambda w: w.calibrate(content="Ören hat Eier. ".encode("latin-1"), name="a.txt"),
        ["a.txt", "cannot be read as text", "UTF-8"],
    ),
    "calibration data without the field": (
        lambda w: w.calibrate(content='{"text": "a"}\n{"body": "b"}\n'),
        ["data.jsonl: line 2", "'text'", "in a recipe: field", "'body'"],
    ),
    "calibration data without the field that the recipe names": (
        lambda w: w.calibrate("calibration.data.0.field=body"),
        ["data.jsonl: line 1", "no field 'body'", "'text'"],
    ),
    "field of plain calibration text": (
        lambda w: w.calibrate("calibration.data.0.field=body", name="a.txt"),
        ["a.txt", "plain text and has no field 'body'", "in a recipe: field"],
    ),
    "calibration data that is no parquet": (
        lambda w: w.calibrate(name="a.parquet"), ["a.parquet", "cannot be read as parquet"]
    ),
    "calibration data that is missing": (
        lambda w: w.calibrate("calibration.data.0.path=nowhere.txt"),
        ["nowhere.txt", "cannot be opened", "No such file"],
    ),
    "calibration data shorter than a sequence": (
        lambda w: w.calibrate(content='{"text": "two eggs"}\n'),
        ["data.jsonl", "tokens, less than one sequence of 512", "calibration.sequence_length"],
    ),
    "calibration data of one sequence": (
        lambda w: w.calibrate(content=json.dumps({"text": "Ada has 12 eggs. " * 100})),
        ["one sequence of 512 tokens", "held out", "calibration.sequence_length"],
    ),
    "sequences longer than the model's": (
        lambda w: w.calibrate("calibration.sequence_length=4096"),
        ["calibration.sequence_length", "4096 is more than the model's", "Lower it"],
    ),
    "no sources": (
        lambda w: w.calibrate("calibration.data=[]"), ["calibration.data", "[] is not a list of"]
    ),
    "source with neither a path nor tokens": (
        lambda w: w.calibrate("calibration.data=[{tokens: 0}]"),
        ["calibration.data.0.tokens", "0 is out of range", "1 or more"],
    ),
    "source that is a path alone": (
        lambda w: w.calibrate("calibration.data=[text.txt]"),
        ["calibration.data.0", "'text.txt' is not a mapping"],
    ),
    "prompts for a file": (
        lambda w: w.calibrate("calibration.data.0.prompts=prompts.txt"),
        ["calibration.data.0.prompts", "source with a path", "Leave the path out"],
    ),
    "texts to go on with, but none": (
        lambda w: w.calibrate("calibration.data=[{continue_after: 4}]"),
        ["calibration.data.0.continue_after", "needs texts to continue", "Name a file"],
    ),
    "going on after a whole sequence": (
        lambda w: w.calibrate("calibration.data=[{prompts: prompts.txt, continue_after: 9999}]"),
        ["calibration.data.0.continue_after", "9999 is out of range", "between 1 and"],
    ),
    "prompts that are missing": (
        lambda w: w.calibrate("calibration.data=[{prompts: nowhere.txt}]"),
        ["nowhere.txt", "cannot be opened"],
    ),
    "prompts without the field": (
        lambda w: w.calibrate("calibration.data=[{prompts: data.jsonl, field: ask}]"),
        ["data.jsonl: line 1", "no field 'ask'", "'text'"],
    ),
    "endless temperature": (
        lambda w: w.calibrate("calibration.data.0.temperature=.inf"),
        ["calibration.data.0.temperature", "inf is out of range"],
    ),
    **{
        f"{name} of {value}": (
            _setting(name, value),
            [f"calibration.{name}", f"{value} is out of range", said],
        )
        for name, value, said in [
            ("sequence_length", "7", "8 or more"),
            ("held_out", "0.0", "and 0.5"),
            ("held_out", "0.6", "and 0.5"),
            ("gptq_sequences", "0", "1 or more"),
            ("sensitivity_sequences", "0", "1 or more"),
            ("steps", "0", "1 or more"),
            ("batch_size", "0", "1 or more"),
            ("accumulate", "-1", "1 or more"),
            ("learning_rate", "2.0", "and 1"),
            ("learning_rate", "nan", "and 1"),
            ("scale_learning_rate", "-0.1", "between 0 and 1"),
            ("warm_up", "-1", "0 or more"),
            ("temperature", "0.0", "between 0.01 and 100"),
            ("top_k", "-1", "0 or more"),
            ("hidden_weight", "inf", "0 or more"),
            ("evaluate_every", "0", "1 or more"),
            ("held_out_sequences", "0", "1 or more"),
            ("patience", "0", "1 or more"),
            ("seed", "-1", "between 0 and"),
            ("data.0.weight", "0.0", "or more"),
            ("data.0.top_p", "1.5", "and 1"),
        ]
    },
    "calibration setting that is unknown": (
        lambda w: w.calibrate("calibration.epochs=3"),
        ["calibration", "unknown key 'epochs'", "steps"],
    ),
    "steps that are a half": (
        lambda w: w.calibrate("calibration.steps=1.5"), ["calibration.steps", "1.5 is not of type"]
    ),
    "all answers of the teacher to keep": (
        lambda w: w.calibrate("calibration.cache_teacher=true"),
        ["calibration.cache_teacher", "needs a top_k", "Set top_k"],
    ),
    "all answers of the teacher to keep, as a top_k": (
        lambda w: w.calibrate("calibration.cache_teacher=true", "calibration.top_k=512"),
        ["calibration.cache_teacher", "top_k below the vocabulary size", "Set calibration.top_k"],
    ),
    "budget that is no size": (
        lambda w: w.calibrate("quantization.budget=5.3"),
        ["quantization.budget", "5.3 is not of type str"],
    ),
    "budget of another unit": (
        lambda w: w.calibrate("quantization.budget=5 GB"),
        ["quantization.budget", "'5 GB' is not a budget", "'5.3 bits' or '90 MB'"],
    ),
    "budget that is too small": (
        lambda w: w.calibrate("quantization.budget=3 bits"),
        ["quantization.budget", "MB, and the recipe needs at least", "Raise the budget"],
    ),
    "teacher that is nowhere": (
        lambda w: w.calibrate("calibration.teacher=./nowhere"), ["./nowhere", "is not a folder"]
    ),
    "teacher of other tokens": (
        lambda w: w.calibrate(f"calibration.teacher={w.make()}"),
        ["calibration.teacher", "has 96 tokens, the checkpoint has 512", "same family"],
    ),
    "teacher of another tokenizer": (
        lambda w: w.calibrate(f"calibration.teacher={_other_tokenizer(w)}"),
        ["calibration.teacher", "is not the checkpoint's tokenizer", "same family"],
    ),
    "calibration with a tokenizer of another model": (
        lambda w: [
            *w.calibrate("calibration.sequence_length=64")[:-4],
            "--checkpoint", str(_tokenizer_of_another_model(w)), "-o", "out",
        ],
        ["tokenizer.json", "outside of the model's vocabulary", "does not belong"],
    ),
}  # fmt: skip

TABLES = (
    CONFIGS, WEIGHTS, RECIPES, OUTPUTS, LOWERING, VERIFYING, GENERATING, EVALUATING, CALIBRATING,
)  # fmt: skip
ROWS = {name: row for table in TABLES for name, row in table.items()}
#: One of each table, so one of each command at the least.
PLAIN_ROWS = {name: table[name] for table in TABLES for name in list(table)[:1]}


@pytest.mark.parametrize(("row", "said"), ROWS.values(), ids=ROWS)
def test_bad_input_exits_with_2_says_what_why_and_what_to_do_and_changes_no_file(
    row: Row, said: list[str], world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --json, which adds the object on stdout and takes nothing from the text on stderr."""
    arguments = row(world)
    before = contents(world.root)
    outcome = run(capsys, *arguments, "--json")
    assert outcome.code == 2
    assert [part for part in said if part not in outcome.err] == [], outcome.err
    assert list(outcome.json) == ["error"]
    assert [part for part in said if part not in outcome.json["error"]] == []
    assert contents(world.root) == before


@pytest.mark.parametrize(("row", "said"), PLAIN_ROWS.values(), ids=PLAIN_ROWS)
def test_without_json_bad_input_leaves_stdout_empty(
    row: Row, said: list[str], world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """A few rows are enough: `main` alone catches errors, and prints JSON only if asked."""
    outcome = run(capsys, *row(world))
    assert (outcome.code, outcome.out) == (2, "")
    assert [part for part in said if part not in outcome.err] == [], outcome.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "COMMAND"),
        (["exprot"], "invalid choice: 'exprot'"),
        (["inspect"], "CHECKPOINT"),
        (["inspect", "a", "--fast"], "--fast"),
        (["quantize", RECIPE, "--checkpoint", "a"], "-o/--output"),
        (["quantize", RECIPE, "--checkpoint", "a", "-o", "b", "--dtype", "int8"], "'int8'"),
        (["export", RECIPE, "-o", "out"], "--checkpoint"),
        (["lower", "a", "-o", "out"], "--target"),
        (["verify"], "BUNDLE"),
        (["generate", "a"], "--prompt"),
        (["evaluate"], "PATH"),
        (["evaluate", "a", "--data", "b", "--max-tokens", "many"], "'many'"),
        (["generate", "a", "--prompt", "b", "--max-new-tokens", "many"], "'many'"),
        (["generate", "a", "--prompt", "b", "--temperature", "hot"], "'hot'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_exits_with_2_and_shows_the_usage(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run(capsys, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert "usage: mobilellm" in outcome.err
    assert said in outcome.err


def test_a_replacement_killed_while_it_cleared_the_old_result_is_continued(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """SHA256SUMS is deleted first and `quantized` last; here the kill came just before that."""
    bundle = world.unfinished()
    for path in bundle.iterdir():
        if path.name == "quantized":
            (path / "quantization.json").unlink()
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    outcome = run(
        capsys,
        "export",
        "mobilellm-r1-nano-int8",
        "--checkpoint",
        NANO,
        "-o",
        bundle,
        "--overwrite",
    )
    assert outcome.code == 0, outcome.err


def test_a_damaged_bundle_is_made_whole_by_the_same_export(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = world.bundle()
    world.write(bundle / "manifest.json", "{")
    outcome = run(capsys, "export", RECIPE, "--checkpoint", NANO, "-o", bundle)
    assert outcome.code == 0, outcome.err
    assert contents(bundle) == contents(world.finished.path)


def test_a_dequantized_folder_is_written_again_with_overwrite(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """The refusal names --overwrite as the remedy, so it must be one."""
    command = ["quantize", RECIPE, "--checkpoint", NANO, "-o", "out", "--dequantize", "float"]
    assert run(capsys, *command).code == 0
    outcome = run(capsys, *command, "--overwrite")
    assert outcome.code == 0, outcome.err
