"""The commands that make a bundle and its measurements again, from its recipe and their settings.

Paths are placeholders in capitals. Names of devices and files come from measurements, so every word
is quoted for the shell.
"""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from devices.instructions import COUNT
from exporter.bundle.results import PROFILE
from exporter.errors import InputError, printable
from exporter.recipe import Recipe, all_recipes, load_recipe, parse_recipe
from exporter.report.blocks import Section, Table
from exporter.report.subjects import Subject
from exporter.report.values import mapping, text, whole

CHECKPOINT, BUNDLE, DATA = "CHECKPOINT", "BUNDLE", "TEXT.jsonl"
#: How the names of the engines end that `mobilellm profile` chooses itself. Any other engine is a
#: program that was given with --runner.
_OWN_ENGINES = ("-native", "-python")


def command(*words: str) -> str:
    """A command line of mobilellm, each word quoted where the shell needs it."""
    return shlex.join(["mobilellm", *map(printable, words)])


def evaluate_command(target: str | None, *, layers: bool = False) -> str:
    """The command that measures the quality of a target, or of the quantized checkpoint (None)."""
    path = [BUNDLE, "--target", target] if target else [f"{BUNDLE}/quantized"]
    options = ["--layers"] if layers else []
    reference = ["--data", DATA, "--reference", CHECKPOINT]
    return command("evaluate", *path, *reference, *options, "-o", "QUALITY.json")


def profile_command() -> str:
    """The command that measures speed, memory and operators."""
    return command("profile", BUNDLE, "--device", "DEVICE", "-o", "SPEED.json")


def count_command() -> str:
    """The command that counts instructions."""
    device = f"{COUNT}:cortex-a76"
    return command("profile", BUNDLE, "--device", device, "-o", "COUNTS.json")


def reproduce(subjects: Sequence[Subject]) -> Section:
    """The section: every command, and the hashes of what they read."""
    notes = [
        f"Words in capitals are yours to fill in. {BUNDLE} is the folder or archive of the bundle, "
        f"{CHECKPOINT} the folder of the float checkpoint. The same inputs give the same bytes; "
        "measured times differ from run to run."
    ]
    commands, tables = list[str](), list[Table]()
    for subject in subjects:
        if subject.letter:
            commands.append(f"# {printable(subject.title)}")
        commands += [*_making(subject), *dict.fromkeys(_measuring(subject))]
        commands.append(command("package", BUNDLE, "--result", "FILE.json", "-o", "NEW.tar.zst"))
        tables += [_inputs(subject), _versions(subject)]
        if recipe_words(subject.manifest.recipe) is None:
            tables.append(_recipe_file(subject))
    bundles = [BUNDLE] if len(subjects) == 1 else [f"{BUNDLE}_{one.letter}" for one in subjects]
    commands.append(command("report", *bundles, "-o", "report.html"))
    return Section("reproduce", "Reproduce", notes, tables=tables, commands=commands)


def recipe_words(recipe: Mapping[str, Any]) -> list[str] | None:
    """The arguments of `mobilellm export` that give exactly this recipe: the name of a built-in
    one, overrides and targets. None where no built-in recipe gives it.

    The key `model` is left out: an export replaces it by the id of the checkpoint.
    """
    name = recipe.get("name")
    if name not in {known.name for known in all_recipes()}:
        return None
    try:
        wanted = parse_recipe(recipe, "recipe").to_dict()
    except InputError:  # the manifest may be of another version, or of anyone
        return None
    base = load_recipe(str(name)).to_dict()
    kinds = [target["target"] for target in wanted["targets"]]
    places = {target["target"]: place for place, target in enumerate(base["targets"])}
    if not set(kinds) <= places.keys():
        return None
    chosen = list[str]()
    if kinds != list(places):
        chosen = [word for kind in kinds for word in ("--target", kind)]
    overrides = list[str]()
    for key in base.keys() - {"model", "targets"}:
        overrides += _differences(key, base[key], wanted[key])
    for target in wanted["targets"]:
        place = places[target["target"]]
        overrides += _differences(f"targets.{place}", base["targets"][place], target)
    words = sorted(overrides)
    try:
        made = load_recipe(str(name), words)
    except InputError:
        return None
    return [str(name), *words, *chosen] if _same(made, kinds, wanted) else None


def _same(made: Recipe, kinds: Sequence[str], wanted: Mapping[str, Any]) -> bool:
    """Whether a recipe with the targets `kinds` is the wanted one, up to `model`."""
    content = made.to_dict()
    content["targets"] = [target for target in content["targets"] if target["target"] in kinds]
    return {**content, "model": ""} == {**wanted, "model": ""}


def _differences(key: str, base: Any, wanted: Any) -> Iterator[str]:
    """Overrides that turn one value into the other."""
    if isinstance(base, dict) and isinstance(wanted, dict):
        for part in {**base, **wanted}:
            yield from _differences(f"{key}.{part}", base.get(part), wanted.get(part))
    elif base != wanted:
        yield f"{key}={wanted if _is_word(wanted) else json.dumps(wanted)}"


def _is_word(value: Any) -> bool:
    """Whether a value is a text that YAML reads back without quotes."""
    return (
        isinstance(value, str)
        and value.replace("-", "").replace("_", "").isalnum()
        and (
            value[0].isalpha() and value not in ("true", "false", "null", "yes", "no", "on", "off")
        )
    )


def _making(subject: Subject) -> Iterator[str]:
    words = recipe_words(subject.manifest.recipe) or ["RECIPE.yaml"]
    yield command("export", *words, "--checkpoint", CHECKPOINT, "-o", BUNDLE)
    yield command("verify", BUNDLE, "--source", CHECKPOINT)


def _measuring(subject: Subject) -> Iterator[str]:
    for content in subject.evaluations():
        yield _evaluate(content)
    for content in subject.measured(PROFILE):
        if content["sessions"]:
            yield _profile(content)
    for content in subject.counts():
        yield _count(content)


def _evaluate(content: Mapping[str, Any]) -> str:
    settings, target = mapping(content, "settings"), content["target"]
    words = [BUNDLE, "--target", str(target)] if target else [f"{BUNDLE}/quantized"]
    for key in ("data", "task"):
        name = text(mapping(content, key), "file")
        words += [f"--{key}", name] if name else []
    if content["reference"]:
        words += ["--reference", CHECKPOINT]
    options = ["limit", "generations"]
    options += ["max_tokens", "sequence_length", "prefill"] if content["data"] else []
    options += ["max_new_tokens"] if content["task"] else []
    for option in options:
        value = whole(settings, option)
        words += [f"--{option.replace('_', '-')}", str(value)] if value else []
    figures = mapping(content, "figures")
    words += ["--layers"] if figures.get("kl_by_layer") else []
    return command("evaluate", *words, "-o", "QUALITY.json")


def _profile(content: Mapping[str, Any]) -> str:
    settings, sessions = content["settings"], content["sessions"]
    words = list[str]()
    for device in dict.fromkeys(session["device"] for session in sessions):
        words += ["--device", device]
    for target in dict.fromkeys(session["artifact"]["format"] for session in sessions):
        words += ["--target", target]
    engines = {session["engine"]["name"] for session in sessions if session["engine"]}
    own = all(name.endswith(_OWN_ENGINES) for name in engines)
    words += [] if own else ["--runner", "PROGRAM"]
    words += ["--threads", str(settings["threads"])] if settings["threads"] else []
    words += ["--cores", settings["cores"]] if settings.get("cores") else []
    words += ["--no-mmap"] if settings.get("mmap") is False else []
    words += ["--packed-cache"] if settings.get("packed_cache") else []
    for key in ("prompt_lengths", "depths", "decode_steps", "sustained_seconds",
                "sustained_tokens", "cooldown_seconds", "precision", "max_repeats"):  # fmt: skip
        if key in settings:
            words.append(f"{key}={json.dumps(settings[key]).replace(' ', '')}")
    return command("profile", BUNDLE, *words, "-o", "SPEED.json")


def _count(content: Mapping[str, Any]) -> str:
    words = ["--target", str(content["target"])]
    for counted in content["counts"]:
        words += ["--device", f"{COUNT}:{counted['cpu']}"]
    first = content["counts"][0]
    for key, place, name in (("prompt_lengths", "to", "prefill"), ("depths", "depth", "decode")):
        words.append(f"{key}={json.dumps([e[place] for e in first[name]]).replace(' ', '')}")
    return command("profile", BUNDLE, *words, "-o", "COUNTS.json")


def _inputs(subject: Subject) -> Table:
    rows = [("checkpoint", name, digest) for name, digest in subject.manifest.source.items()]
    for content in subject.evaluations():
        for key in ("data", "task"):
            file = mapping(content, key)
            if file:
                rows.append((f"evaluate --{key}", text(file, "file"), text(file, "sha256")))
    rows = [(what, name, digest) for what, name, digest in dict.fromkeys(rows)]
    caption = f"SHA-256 of the inputs, {subject.title}"
    return Table(caption, ("input", "file", "SHA-256"), rows, 3, folded=True)


def _versions(subject: Subject) -> Table:
    rows = [(k, v) for k, v in subject.manifest.versions.items()]
    rows += [(f"seed of the {k}", str(v)) for k, v in subject.manifest.seeds.items()]
    caption = f"Versions and seeds, {subject.title}"
    return Table(caption, ("package", "version"), rows, 2, folded=True)


def _recipe_file(subject: Subject) -> Table:
    """The whole recipe, for the file that the export reads."""
    rows = [
        (key, json.dumps(value, ensure_ascii=False))
        for key, value in subject.manifest.recipe.items()
    ]
    return Table(
        f"RECIPE.yaml of {subject.title}: a line “key: value” for each row", ("key", "value"), rows,
        2, folded=True,
    )  # fmt: skip
