"""The model card of a bundle: ``README.md`` in the format of the model hub.

It says what is in the bundle and how to run it, which licence it has, what was measured and how,
and how to check it and to make it again. It is derived from the manifest and the measurements.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from exporter.backends import Target, front, names, parse_target
from exporter.bundle.licence import Licence
from exporter.bundle.manifest import BundleManifest, WeightEntry
from exporter.bundle.markdown import (
    code,
    front_matter,
    megabytes,
    number,
    plain,
    shell,
    shell_word,
    table,
)
from exporter.bundle.origin import is_hub_id
from exporter.bundle.results import EVALUATION, Result
from exporter.bundle.speed import speed_sections
from exporter.quantization.schemes import FLOAT

CARD = "README.md"
LIBRARY = "mobilellm-exporter"
#: Figures of an evaluation in the card and in its front matter: key → type in the hub's model
#: index, name, digits and factor.
_FIGURES = {
    "perplexity": ("perplexity", "perplexity", 3, 1),
    "kl": ("kl_divergence", "KL from the reference", 4, 1),
    "top1_agreement": ("top1_agreement", "top-1 agreement, %", 2, 100),
    "accuracy": ("exact_match", "problems solved, %", 1, 100),
}

Results = Mapping[str, Result]


def card(manifest: BundleManifest, results: Results) -> bytes:
    """The model card. `manifest` lists the models, the licence files and the measurements."""
    sections = (
        front_matter(dict(_metadata(manifest, results))),
        f"# {code(manifest.recipe.get('name', ''))}",
        _summary(manifest),
        *_artifacts(manifest),
        *_weights(manifest),
        *_calibration(manifest),
        *_quality(results),
        *speed_sections(results),
        *_licence(manifest.licence),
        *_verification(),
        *_reproduction(manifest),
    )
    return ("\n\n".join(sections) + "\n").encode()


def _metadata(manifest: BundleManifest, results: Results) -> Iterator[tuple[str, object]]:
    licence, model = manifest.licence, manifest.recipe.get("model")
    if licence:
        yield "license", licence.id
        for key, value in (("license_name", licence.name), ("license_link", licence.link)):
            if value:
                yield key, value
    if is_hub_id(model):
        yield "base_model", model
        yield "base_model_relation", "quantized"
    yield "library_name", LIBRARY
    yield "pipeline_tag", "text-generation"
    bits = sorted({weight.scheme.split("-")[0] for weight in manifest.weights.values()})
    tags = [LIBRARY, *manifest.targets, *(b for b in bits if b != str(FLOAT)), "quantized"]
    yield "tags", [*tags, manifest.model.model_type]
    measured = _model_index(results)
    if measured:
        name = plain(manifest.recipe.get("name", ""))
        yield "model-index", [{"name": name, "results": measured}]


def _model_index(results: Results) -> list[dict[str, object]]:
    """The evaluations, as the hub's specification of model cards wants them."""
    found = list[dict[str, object]]()
    for result in _evaluations(results):
        kind = plain(_kind(result))
        for file, keys in (
            (result["data"], ("perplexity", "kl", "top1_agreement")),
            (result["task"], ("accuracy",)),
        ):
            metrics = [
                {
                    "type": _FIGURES[key][0],
                    "name": f"{_FIGURES[key][1].split(',')[0]} ({kind})",
                    "value": value,
                }
                for key in keys
                if math.isfinite(value := _figure(result, key))
            ]
            if metrics and file:
                dataset = {"name": file["file"], "type": file["file"], "revision": file["sha256"]}
                task = {"type": "text-generation"}
                found.append({"task": task, "dataset": dataset, "metrics": metrics})
    return found


def _evaluations(results: Results) -> Iterator[Mapping[str, Any]]:
    return (one.content for _, one in sorted(results.items()) if one.kind == EVALUATION)


def _figure(evaluation: Mapping[str, Any], key: str) -> float:
    """A figure of an evaluation; NaN if it was not measured."""
    value = evaluation["figures"].get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e300 else math.nan


def _summary(manifest: BundleManifest) -> str:
    model, source = manifest.model, manifest.recipe.get("model")
    of = f"[{source}](https://huggingface.co/{source})" if is_hub_id(source) else "A checkpoint"
    return (
        f"{of} of type {code(model.model_type)}, quantized for phones with {LIBRARY}: "
        f"{number(model.parameters)} parameters in {number(manifest.bits_per_weight(), 2)} bits "
        f"each, {number(model.layers)} layers, hidden size {number(model.hidden_size)}, vocabulary "
        f"of {number(model.vocab_size)} tokens"
        f"{', which is also the output layer' if model.tied else ''}. "
        "Every format below has the same integers and scales: those of `quantized/`."
    )


def _artifacts(manifest: BundleManifest) -> Iterator[str]:
    targets = _targets(manifest)
    rows = []
    for name, target in targets.items():
        module = front(name)
        held = [
            path.removeprefix(f"{name}/") for path in manifest.files if path.startswith(f"{name}/")
        ]
        size = sum(manifest.files[f"{name}/{file}"].bytes for file in held if file in module.FILES)
        options = target.model_dump(mode="json", exclude={"target", "max_context"})
        chosen = ", ".join(f"{key}: {value}" for key, value in options.items() if value != "")
        rows.append([
            f"`{name}/{module.main_file(held)}`", megabytes(size), f"{target.max_context:,} tokens",
            code(chosen) if chosen else "",
        ])  # fmt: skip
    yield "## Artifacts"
    yield table(["file", "size", "context", "options"], rows)
    yield (
        "Each folder has all that a phone needs: the model, the tokenizer, the chat template, and "
        "the tokens that end a text."
    )
    for name, target in targets.items():
        yield f"### {name}"
        yield front(name).usage(target)
    yield "All of them run with mobilellm too:"
    yield shell(*(f'mobilellm generate . --target {name} --prompt "…"' for name in targets))


def _targets(manifest: BundleManifest) -> dict[str, Target]:
    """The targets of the bundle with the options of the recipe. Raises InputError."""
    known = [name for name in manifest.targets if name in names()]
    raw = manifest.recipe.get("targets")
    found = {
        one["target"]: parse_target(one, "recipe: targets")
        for one in (raw if isinstance(raw, list | tuple) else ())
        if isinstance(one, dict) and one.get("target") in known
    }
    return {name: found[name] for name in known if name in found}


def _weights(manifest: BundleManifest) -> Iterator[str]:
    by_scheme = defaultdict[str, list[WeightEntry]](list)
    reasons = defaultdict[str, list[str]](list)
    for name, weight in manifest.weights.items():
        by_scheme[weight.scheme].append(weight)
        if weight.scheme == str(FLOAT):
            reasons[weight.reason].append(name)
    rows = [
        [code(scheme), number(len(weights)), number(sum(math.prod(w.shape) for w in weights)),
         megabytes(sum(w.bytes for w in weights))]
        for scheme, weights in sorted(by_scheme.items())
    ]  # fmt: skip
    yield "## Integers"
    yield table(["scheme", "weights", "parameters", "size"], rows)
    yield (
        "A weight is code times scale; there are no zero points. `int4-g32` has one scale for 32 "
        "neighbouring inputs, `int8` one for each output. Every scale is exact in float16 and in "
        "bfloat16. `manifest.json` lists every weight."
    )
    if reasons:
        lines = [
            f"- {code(reason)}: {', '.join(map(code, _patterns(weights)))} ({len(weights)} weights)"
            for reason, weights in sorted(reasons.items())
        ]
        yield "Weights that stay in float:"
        yield "\n".join(lines)


def _patterns(weights: Sequence[str]) -> list[str]:
    """Names of weights; those that differ in the number of the layer are one pattern."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in weights))


def _calibration(manifest: BundleManifest) -> Iterator[str]:
    yield "## Calibration"
    quantization = manifest.recipe.get("quantization")
    method = quantization.get("method") if isinstance(quantization, dict) else None
    if manifest.calibration is None:
        yield f"None: the scales were chosen from the weights alone ({code(method)})."
        return
    yield f"The method is {code(method)}. The texts, by SHA-256:"
    text = manifest.calibration.get("text")
    sources = [one for one in (text if isinstance(text, list) else ()) if isinstance(one, dict)]
    rows = [[code(one.get("source")), code(one.get("sha256")), number(one.get("weight"), 2)]
            for one in sources]  # fmt: skip
    yield table(["text", "sha256", "weight"], rows)


def _quality(results: Results) -> Iterator[str]:
    evaluations = list(_evaluations(results))
    yield "## Quality"
    if not evaluations:
        yield "Not measured. `mobilellm evaluate` measures it, and `mobilellm package` adds it."
        return
    rows = [
        [
            code(_kind(one)),
            ", ".join(code(one[key]["file"]) for key in ("data", "task") if one[key]),
            number(one["figures"].get("tokens")),
            number(_figure(one, "reference_perplexity"), 3),
            *(
                number(factor * _figure(one, key), digits)
                for key, (_, _, digits, factor) in _FIGURES.items()
            ),
        ]
        for one in evaluations
    ]
    titles = [title for _, title, _, _ in _FIGURES.values()]
    yield table(["model", "texts", "tokens", "perplexity of the reference", *titles], rows)
    yield (
        "A format ran in its own runtime; *interpreted* is the reference interpreter of "
        f"{LIBRARY}, which stands in for a runtime that this machine lacks. The reference is "
        "the checkpoint in float32. The settings of `mobilellm evaluate`, and the texts by SHA-256:"
    )
    yield "\n".join(f"- {code(_kind(one))}: {', '.join(_how(one))}" for one in evaluations)


def _kind(evaluation: Mapping[str, Any]) -> object:
    """The form and the runtime of the model that was measured."""
    return evaluation["figures"].get("kind") or evaluation["target"] or "quantized checkpoint"


def _how(evaluation: Mapping[str, Any]) -> Iterator[str]:
    settings = sorted(evaluation["settings"].items())
    given = [f"{key}: {value}" for key, value in settings if value is not None]
    yield code(", ".join(given))
    for key in ("data", "task"):
        if file := evaluation[key]:
            yield f"{code(file['file'])} is {code(file['sha256'])}"


def _licence(licence: Licence | None) -> Iterator[str]:
    yield "## Licence"
    if licence is None:
        yield (
            "**Not known.** The checkpoint names no licence, and the recipe neither. Do not pass "
            "this bundle on before you know it."
        )
        return
    name = code(licence.name or licence.id)
    where = f", {licence.link}" if licence.link.startswith("http") else ""
    files = [f"[{file}]({file})" for file in licence.files]
    text = f" Its text and notices are in this folder: {', '.join(files)}." if files else ""
    yield (
        f"The weights are those of the checkpoint, and its licence holds for all files made from "
        f"them: {name}{where}.{text}"
    )


def _verification() -> Iterator[str]:
    yield "## Verify"
    yield shell(
        "sha256sum --check SHA256SUMS  # every file is the one that was packaged",
        "mobilellm verify .  # every file is derived again, integers and logits are compared",
    )
    yield "If the bundle is signed (`model.sig`), other tools verify it with the public key:"
    yield shell("model_signing verify key . --signature model.sig --public_key key.pub")


def _reproduction(manifest: BundleManifest) -> Iterator[str]:
    name, model = manifest.recipe.get("name", "recipe"), manifest.recipe.get("model")
    checkpoint = shell_word(model) if is_hub_id(model) else "CHECKPOINT"
    recipe = shell_word(f"{plain(name)}.yaml")
    yield "## Reproduce"
    yield (
        "The recipe is in `manifest.json`. The same checkpoint gives the same bytes in "
        "`quantized/` and in the folder of every format:"
    )
    yield shell(
        'python -c "import json, yaml; '
        "print(yaml.safe_dump(json.load(open('manifest.json'))['recipe']))\" "
        f"> {recipe}",
        f"mobilellm export {recipe} --checkpoint {checkpoint} -o again",
    )
    versions = [f"{plain(one)}=={plain(v)}" for one, v in sorted(manifest.versions.items())]
    yield f"Made with {', '.join(map(code, versions))}."
