"""The report: content, determinism, hostile names, missing measurements, commands that run."""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import reporting
from commands import contents, run

from exporter.bundle.archive import pack
from exporter.bundle.bundle import CHECKSUMS, Bundle, read_checksums
from exporter.bundle.manifest import MANIFEST, WeightEntry, read_manifest
from exporter.bundle.results import Result
from exporter.cli import arguments
from exporter.cli.commands import COMMANDS
from exporter.errors import InputError, printable
from exporter.files import json_bytes, sha256
from exporter.recipe import all_recipes, load_recipe
from exporter.report import page as pages
from exporter.report.markdown import markdown, tables
from exporter.report.page import report
from exporter.report.plots import Point, Style, pareto
from exporter.report.reproduce import recipe_words
from exporter.report.speed import thinned
from exporter.report.subjects import Subject, read_subjects
from exporter.report.summary import comparison
from exporter.report.values import figure

CSP = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
#: Every topic, and a text of its data.
TOPICS = {
    "summary": "4.51, scales included",
    "size": "graph and packing",
    "quality": "KL to the reference against bits per weight",
    "layers": "model.layers.5",
    "positions": "64–127",
    "speed": "Pixel 8",
    "memory": "70.00 MB",
    "operators": "Fully Connected (NC, QDU8, F32, QB4W) GEMM",
    "delegation": "MatMul reached no delegate",
    "instructions": "kai_matmul_int4",
    "float": "a normalization weight, one vector",
    "figures": "decode after 512",
    "reproduce": "mobilellm export mobilellm-r1-nano-int4 --checkpoint CHECKPOINT -o BUNDLE",
}


class Document(HTMLParser):
    """The elements of a page, and the text of each `section` by its id."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self._section = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag == "section":
            self._section = str(attributes["id"])
            self.sections[self._section] = ""

    def handle_data(self, data: str) -> None:
        if self._section:
            self.sections[self._section] += data

    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}


@pytest.fixture(scope="module")
def measured(finished_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return reporting.measurements(finished_bundle.path, tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def html(finished_bundle: Bundle, measured: list[Path]) -> str:
    return report([finished_bundle.path], measured)


@pytest.fixture
def subject(finished_bundle: Bundle, measured: list[Path]) -> Subject:
    return read_subjects([finished_bundle.path], measured)[0]


@pytest.mark.parametrize("topic", TOPICS)
def test_each_topic_has_its_data(topic: str, html: str) -> None:
    assert TOPICS[topic] in Document(html).sections[topic]


def test_the_page_forbids_scripts_and_the_network(html: str) -> None:
    document = Document(html)
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": CSP}) in document.elements
    assert not document.tags() & {"script", "link", "img", "iframe", "object", "form", "base"}
    for _, attributes in document.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert all(
            str(attributes[key]).startswith("#") for key in ("href", "src") if key in attributes
        )
    assert not re.search(r"url\((?!#)|@import|@font-face", html)


def test_every_id_is_unique_and_every_reference_has_its_target(html: str) -> None:
    elements = Document(html).elements
    ids = [a["id"] for _, a in elements if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = {str(a["href"])[1:] for _, a in elements if "href" in a}
    wanted |= {i for _, a in elements for i in str(a.get("aria-labelledby") or "").split()}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", html))
    assert wanted <= set(ids)


def test_every_plot_has_a_name_a_description_and_its_data_as_a_table(html: str) -> None:
    figures = re.findall(r"<figure>.*?</figure>", html, re.DOTALL)
    assert len(figures) > 12
    for one in figures:
        assert re.search(r'<svg [^>]*role="img"[^>]*><title id="[^"]+">[^<]+</title><desc ', one)
        assert re.search(r"<details>.*<caption><span>[^<]+<.*<th scope=\"row\">", one, re.DOTALL)


def test_a_page_is_small(html: str) -> None:
    assert len(html.encode()) < 500_000


def test_the_same_bundle_gives_the_same_bytes_as_an_archive_of_another_folder(
    finished_bundle: Bundle, measured: list[Path], html: str, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(finished_bundle.path, tmp_path / "another place"))
    archive = tmp_path / "bundle.tar.zst"
    pack(copied, archive, [*read_checksums(copied), CHECKSUMS])
    assert report([archive], measured) == html


def test_headings_have_no_gap_and_one_is_the_first(html: str) -> None:
    levels = [int(tag[1]) for tag, _ in Document(html).elements if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_times_of_emulated_and_of_real_machines_share_no_plot(html: str) -> None:
    titles = re.findall(r"<figcaption><h3>([^<]+)</h3>", html)
    decode = [title for title in titles if title.startswith("Time of one decoded token")]
    assert decode == [
        "Time of one decoded token", "Time of one decoded token (virtual)",
        "Time of one decoded token (emulated)",
    ]  # fmt: skip
    figures = re.findall(r"<figure>.*?</figure>", html, re.DOTALL)
    both = [one for one in figures if "ssh:qemu" in one and "adb:123" in one]
    assert both == []


def test_what_ran_and_what_was_interpreted_share_no_plot(html: str) -> None:
    for topic in ("quality", "positions"):
        plots = re.findall(rf'<svg [^>]*aria-labelledby="{topic}.*?</svg>', html, re.DOTALL)
        assert len(plots) >= 4
        names = [(">coreml<" in one, ">onnx<" in one) for one in plots]
        assert set(names) == {(True, False), (False, True)}


def test_each_headline_says_how_it_was_got(html: str) -> None:
    how = set(re.findall(r'<span class="how">([^<]+)</span>', html))
    assert how >= {
        "exact", "run", "interpreted", "run in torch", "not run", "counted, cortex-a76",
        "run on a device, adb:123 (Pixel 8)", "run on a virtual machine, host (Pixel 8)",
    }  # fmt: skip
    assert not any(text.startswith("run under emulation") for text in how)  # no headline


def test_counts_are_marked_as_counts(html: str) -> None:
    for one in re.findall(r"<figure>.*?</figure>", html, re.DOTALL):
        if "bytes loaded per token" in one:
            assert "(counts)" in one
            assert "MB a token (no time)" in one
        elif "kai_matmul_int4" in one or "Instructions per token" in one:
            assert "(counts)" in one
            assert "million instructions a token (no time)" in one
            assert "near xnn_f32_gemm" in one or "kai_matmul_int4" not in one


def test_a_product_outside_of_its_delegate_fails_the_audit(html: str) -> None:
    section = Document(html).sections["delegation"]
    assert "FAILED: 1" in section
    assert "passed" in section


def test_a_session_that_failed_says_why(html: str) -> None:
    assert "onnx, ssh:pi (Pixel 8): failed: no route" in Document(html).sections["speed"]


def test_the_bytes_of_the_components_are_those_of_the_folder(
    finished_bundle: Bundle, subject: Subject
) -> None:
    table = pages.sections([subject])[0].figures[0].table
    sums = dict(zip(table.columns[1:], table.rows[-1][1:], strict=True))
    for target, total in sums.items():
        files = (finished_bundle.path / target).rglob("*")
        assert total == f"{sum(path.stat().st_size for path in files if path.is_file()):,}"


def test_every_weight_in_float_is_listed_with_its_reason(
    finished_bundle: Bundle, html: str
) -> None:
    weights = read_manifest(finished_bundle.path).weights
    floats = {name for name, entry in weights.items() if entry.scheme == "float"}
    section = Document(html).sections["float"]
    assert floats and all(name in section for name in floats)


# Bundles without measurements, and what is wrong with others.


def test_a_topic_without_data_names_the_command_that_measures_it(finished_bundle: Bundle) -> None:
    sections = Document(report([finished_bundle.path])).sections
    for topic, wanted in (
        ("quality", "mobilellm evaluate BUNDLE --target onnx"),
        ("layers", "mobilellm evaluate BUNDLE/quantized"),
        ("positions", "mobilellm evaluate BUNDLE --target"),
        ("speed", "mobilellm profile BUNDLE --device DEVICE"),
        ("memory", "mobilellm profile BUNDLE --device DEVICE"),
        ("operators", "mobilellm profile BUNDLE --device DEVICE"),
        ("delegation", "mobilellm profile BUNDLE --device DEVICE"),
        ("instructions", "mobilellm profile BUNDLE --device count:cortex-a76"),
    ):
        assert "Missing." in sections[topic]
        assert wanted in sections[topic]


def test_a_damaged_bundle_gets_no_report(bundle_copy: Path) -> None:
    path = bundle_copy / "onnx" / "onnx" / "model_q4.onnx_data"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"onnx/onnx/model_q4\.onnx_data: has sha256"):
        report([bundle_copy])


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found["model"].update(parameters=0),
        lambda found: found["model"].update(layers=10**290),
        lambda found: found["weights"].update(x={"scheme": "int4", "shape": [9], "bytes": 1}),
        lambda found: found["weights"]["model.norm.weight"].update(shape=[10**290]),
        lambda found: found["files"]["onnx/onnx/model_q4.onnx"].update(bytes=1),
        lambda found: found.update(licence=None),
    ],
    ids=["parameters", "layers", "weight", "shape", "size", "licence"],
)
def test_a_manifest_that_is_not_that_of_the_files_gets_no_report(
    change: Callable[[dict[str, Any]], None], bundle_copy: Path
) -> None:
    path = bundle_copy / MANIFEST
    content = json.loads(path.read_text())
    change(content)
    path.write_bytes(json_bytes(content))
    lines = {**read_checksums(bundle_copy), MANIFEST: sha256(path)}
    listed = "".join(f"{digest}  {name}\n" for name, digest in sorted(lines.items()))
    (bundle_copy / CHECKSUMS).write_text(listed)
    with pytest.raises(InputError, match=MANIFEST):
        report([bundle_copy])


def test_a_measurement_of_another_bundle_is_refused(
    finished_bundle: Bundle, tmp_path: Path
) -> None:
    content = reporting.evaluation(read_manifest(finished_bundle.path), "onnx", 0.1)
    content["files"]["onnx/model_q4.onnx"] = "0" * 64
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="measured files that none of the bundles holds"):
        report([finished_bundle.path], [path])


@pytest.mark.parametrize("extreme", [None, 0, -1.0, 1e18, 1e300, -1e300, 10**299], ids=str)
def test_extreme_figures_are_drawn_or_left_out(extreme: Any, subject: Subject) -> None:
    names = ["perplexity", "perplexity_error", "reference_perplexity", "kl", "kl_error"]
    bands = [{"first": 0, "last": 15, "kl": extreme, "top1_agreement": 0.5, "perplexity": extreme}]
    content = reporting.evaluation(
        subject.manifest, "onnx", 0.1, tokens=10**290, agreement_by_position=bands,
        kl_by_layer=[{"layer": "lm_head", "kl": extreme or 0}], **dict.fromkeys(names, extreme),
    )  # fmt: skip
    results = {"x": Result("evaluation", content)}
    page = pages.page([Subject("", 0, subject.manifest, results, ())])
    assert ("KL to the reference against bits" in page) == (extreme in (0, -1.0, 1e18))


# Hostile names.

#: Names of one form each, and all others in one.
NAMES = {
    "markup": "".join([
        "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</title></svg><b>",
        "a\x1b[31m\nb", "\u202ereversed", "\ud800", "#0a0a01", "url(https://example.org/x)",
        "日本語", "{{ 7 * 7 }}", "a & b", "; rm -rf ~ #",
    ]),
    "formula": "_hidden $\\frac{1", "option": "--overwrite", "empty": "", "long": "x" * 2000,
}  # fmt: skip


def hostile(subject: Subject, name: str) -> Subject:
    """The bundle with this text as every name that a bundle or a measurement has."""
    manifest = subject.manifest
    entry = WeightEntry(scheme=name, shape=[8], bytes=16, reason=name or "none")
    recipe = {**manifest.recipe, "name": name, "model": name, "quantization": {"linear": name}}
    changed = manifest.model_copy(
        update={
            "recipe": recipe, "versions": {name: name}, "source": {name: "0" * 64},
            "weights": {**manifest.weights, name: entry},
            "model": manifest.model.model_copy(update={"model_type": name}),
        }
    )  # fmt: skip
    operators = [
        {"name": name, "calls": 1, "milliseconds": 1.0, "share": 1.0, "delegate": name,
         "product": True}
    ]  # fmt: skip
    session = reporting.session(
        manifest, "onnx", 5.0, device=name, operators=operators, undelegated=[name],
        engine={"name": name, "versions": {name: name}, "threads": 1},
    )  # fmt: skip
    session["identity"] = {**session["identity"], "name": name, "system": name}
    failed = {**session, "status": "failed", "problem": name}
    counts = reporting.counts(manifest, {name: 5e6})
    counts["counts"][0]["cpu"] = counts["emulator"] = name
    evaluation = reporting.evaluation(
        manifest, "onnx", 0.1, kind=name, kl_by_layer=[{"layer": name, "kl": 0.1}]
    )
    evaluation["data"] = evaluation["task"] = {"file": name, "sha256": "0" * 64}
    results = {
        "a": Result("evaluation", evaluation),
        "b": Result("profile", reporting.profile([session, failed])),
        "c": Result("instructions", counts),
    }
    return Subject("", 0, changed, results, ())


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_hostile_name_is_text(name: str, subject: Subject) -> None:
    made = pages.page([hostile(subject, name)])
    document = Document(made)
    assert document.tags() <= set(
        "html head meta title style body a header nav ul li main section article div dl dt dd "
        "span strong h1 h2 h3 h4 p figure figcaption svg desc defs g path use text clippath rect "
        "pattern details summary table caption thead tbody tr th td pre code footer".split()
    )
    assert not [a for _, attributes in document.elements for a in attributes if a[:2] == "on"]
    assert not [letter for letter in "\x1b\u202e\ud800" if letter in made]
    assert not re.search(r"(style|fill|stroke|clip-path)=\"[^\"]*example\.org", made)
    if name == NAMES["markup"]:
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in made
        assert "{{ 7 * 7 }}" in made


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_hostile_name_is_one_quoted_word_of_a_command(name: str, subject: Subject) -> None:
    section = next(s for s in pages.sections([hostile(subject, name)]) if s.name == "reproduce")
    profile = next(line for line in section.commands if line.startswith("mobilellm profile"))
    words = shlex.split(profile, comments=True)
    assert words[:3] == ["mobilellm", "profile", "BUNDLE"]
    assert words.count("--device") == 1
    device = words[words.index("--device") + 1]
    assert device == printable(name)
    assert all("\n" not in line for line in section.commands)


def test_markdown_shows_hostile_names_as_text(subject: Subject) -> None:
    made = tables([hostile(subject, "<b>|`x`| [a](http://b) @user")])
    assert r"\<b\>\|\`x\`\| \[a\](http://b) &#64;user" in made
    assert "<b>" not in made
    rows = [line for line in made.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)


# Commands.


def parsed(line: str) -> Any:
    """The arguments of a command of the page; the parser exits for one that is wrong."""
    return arguments.parse(shlex.split(line)[1:], COMMANDS)


def test_every_command_of_a_page_is_one_that_the_command_line_takes(
    finished_bundle: Bundle, subject: Subject
) -> None:
    bare = read_subjects([finished_bundle.path])[0]
    found = [section for one in (subject, bare) for section in pages.sections([one])]
    lines = [line for section in found for line in section.commands]
    lines += [line for section in found for gap in section.missing for line in gap.commands]
    assert len(lines) > 20
    for line in lines:
        assert parsed(line).run


def test_the_command_of_an_evaluation_has_its_settings(subject: Subject) -> None:
    section = pages.sections([subject])[-1]
    line = next(line for line in section.commands if "evaluate BUNDLE --target onnx" in line)
    args = parsed(line)
    assert (args.max_tokens, args.sequence_length, args.prefill) == (8192, 512, 1)
    assert (str(args.data), str(args.task)) == ("problems.jsonl", "problems.jsonl")


def all_changes() -> Iterator[tuple[str, list[str]]]:
    for recipe in all_recipes():
        yield recipe.name, []
        yield recipe.name, ["max_context=512", "quantization.linear=int8"]
    yield "mobilellm-r1-nano-int4", ["quantization.overrides.*.down_proj.weight=int8"]
    yield "mobilellm-r1-nano-int4", ["profile.depths=[0, 7]", "calibration.seed=3"]


@pytest.mark.parametrize(("name", "overrides"), all_changes())
def test_the_words_of_a_recipe_give_the_same_recipe(name: str, overrides: list[str]) -> None:
    wanted = load_recipe(name, overrides)
    words = recipe_words({**wanted.to_dict(), "model": "owner/name"})
    assert words is not None
    args = parsed(shlex.join(["mobilellm", "export", *words, "--checkpoint", "C", "-o", "B"]))
    assert load_recipe(args.recipe, args.overrides) == wanted
    assert args.target == []


def test_a_recipe_of_some_targets_names_them(finished_bundle: Bundle) -> None:
    recipe = dict(read_manifest(finished_bundle.path).recipe)
    recipe["targets"] = recipe["targets"][1:2]
    words = recipe_words(recipe)
    assert words == ["mobilellm-r1-nano-int4", "--target", recipe["targets"][0]["target"]]


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../../etc/passwd"}, {"name": "my-own"}, {"name": None}, {"targets": 3},
        {"targets": [{"target": "other"}]}, {"quantization": "x"}, {"unknown": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_recipe_that_no_name_gives_is_shown_whole(
    change: dict[str, Any], subject: Subject
) -> None:
    manifest = subject.manifest.model_copy(update={"recipe": {**subject.manifest.recipe, **change}})
    assert recipe_words(manifest.recipe) is None
    section = pages.sections([Subject("", 0, manifest, {}, ())])[-1]
    assert section.commands[0].startswith("mobilellm export RECIPE.yaml")
    assert any(table.caption.startswith("RECIPE.yaml") for table in section.tables)


# Several bundles.


@pytest.fixture
def two(finished_bundle: Bundle, bundle_copy: Path, tmp_path: Path) -> list[Subject]:
    paths = [finished_bundle.path, bundle_copy]
    first, second = read_subjects(paths)
    results = [
        {
            path.name: Result(kind_of(path.name), json.loads(path.read_text()))
            for path in reporting.measurements(paths[0], tmp_path / str(scale), scale)
        }
        for scale in (1.0, 0.5)
    ]
    return [
        Subject(one.letter, one.first, one.manifest, found, ())
        for one, found in zip((first, second), results, strict=True)
    ]


def kind_of(name: str) -> str:
    return {"q": "evaluation", "s": "profile", "c": "instructions"}[name[0]]


def test_several_bundles_are_compared(two: list[Subject]) -> None:
    summary = comparison(two)
    assert summary.columns[1:] == ("A: mobilellm-r1-nano-int4", "B: mobilellm-r1-nano-int4")
    assert ("onnx: KL to the reference (run)", "0.02000 nats", "0.01000 nats") in summary.rows
    figures = next(s for s in pages.sections(two) if s.name == "quality").figures
    drawn = figures[0].draw()
    assert "KL to the reference" in figures[0].title
    assert all(f">{letter} {name}<" in drawn for letter in "AB" for name in ("onnx", "executorch"))
    assert ">front<" in drawn or len({one.manifest.bits_per_weight() for one in two}) == 1


def test_a_measurement_goes_to_the_bundle_that_it_measured(
    finished_bundle: Bundle, bundle_copy: Path, measured: list[Path]
) -> None:
    subjects = read_subjects([finished_bundle.path, bundle_copy], measured)
    assert [len(one.results) for one in subjects] == [len(measured)] * 2


def test_figures_on_different_texts_share_no_plot(two: list[Subject]) -> None:
    one = two[0]
    other = json.loads(json.dumps(next(iter(one.evaluations()))))
    other["data"]["sha256"] = "b" * 64
    before = pages.sections([one])[1].figures
    results = {**one.results, "other": Result("evaluation", other)}
    after = pages.sections([Subject("", 0, one.manifest, results, ())])[1].figures
    assert len(after) == len(before) + 2  # KL and perplexity; the problems are the same


@pytest.mark.parametrize("less", [True, False])
def test_the_front_holds_what_no_other_point_beats(less: bool) -> None:
    sign = 1 if less else -1
    places = [(4.5, 3.0), (4.5, 2.0), (5.0, 2.5), (6.0, 1.0), (8.0, 1.0)]
    points = [Point("", Style(0), x, sign * y) for x, y in places]
    assert [(p.x, sign * p.y) for p in pareto(points, less)] == [(4.5, 2.0), (6.0, 1.0)]


# Samples and numbers.


def test_thinned_samples_keep_the_extremes_and_the_median() -> None:
    values = [float((index * 7919) % 10_007) for index in range(10_000)]
    shown = thinned(values, 101)
    assert (len(shown), shown[0], shown[-1]) == (101, min(values), max(values))
    assert shown[50] == pytest.approx(sorted(values)[5000], rel=0.01)
    assert thinned([3.0, 1.0], 101) == [1.0, 3.0]


def test_many_samples_and_sessions_make_no_large_page(subject: Subject) -> None:
    one = reporting.session(subject.manifest, "onnx", 5.0, operators=[])
    for records in one["samples"]["rounds"]:
        for record in records:
            record["ms"] = [record["ms"][0] + index / 999 for index in range(2000)]
    sessions = [{**one, "device": f"adb:{index}"} for index in range(50)]
    results = {"a": Result("profile", reporting.profile(sessions))}
    made = pages.page([Subject("", 0, subject.manifest, results, ())])
    assert len(made.encode()) < 1_000_000
    assert "samples are not drawn" in made
    assert "10 more sessions are left out" in made


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"), (0, "0.000"), (1234567.8, "1,234,568"), (12.3456, "12.35"), (0.5, "0.5000"),
        (0.00012345, "0.000123"), (1.5e-7, "1.5e-07"), (-2.5, "-2.500"),
    ],
)  # fmt: skip
def test_numbers_have_four_significant_digits(value: float | None, shown: str) -> None:
    assert figure(value) == shown


# The command.


def test_the_command_writes_the_page_and_the_markdown(
    finished_bundle: Bundle,
    measured: list[Path],
    html: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page, text = tmp_path / "report.html", tmp_path / "report.md"
    words = [word for path in measured for word in ("--result", str(path))]
    written = ["-o", page, "--markdown", text, "--json"]
    outcome = run(capsys, "report", finished_bundle.path, *words, *written)
    assert outcome.code == 0, outcome.err
    assert page.read_text() == html
    assert text.read_text() == markdown(finished_bundle.path, measured)
    assert outcome.json["bytes"] == page.stat().st_size


@pytest.mark.parametrize("place", ["onnx/report.html", "report.html", "onnx/onnx/model_q4.onnx"])
def test_nothing_is_written_into_a_bundle(
    place: str, bundle_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(bundle_copy)
    outcome = run(capsys, "report", bundle_copy, "-o", bundle_copy / place)
    assert (outcome.code, outcome.out) == (2, "")
    assert "lies in what is read" in outcome.err
    assert contents(bundle_copy) == before


# Colours.


def colours(css: str) -> Iterator[dict[str, str]]:
    """The variables of the light scheme, then those of the dark one."""
    for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL):
        yield dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        red, green, blue = (
            p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_and_series_stand_out_from_their_backgrounds(scheme: int) -> None:
    css = (Path(pages.__file__).parent / "page.css").read_text()
    named = list(colours(css))[scheme]
    for paper in ("paper", "raised", "warn-paper"):
        for text in ("ink", "muted", "accent", "warn"):
            assert contrast(named[text], named[paper]) >= 4.5, (text, paper)
    series = [named[f"series-{number}"] for number in range(1, 7)]
    assert all(contrast(colour, named["raised"]) >= 3 for colour in series)
    assert len(set(series)) == 6


def test_the_contrast_of_too_similar_colours_is_low() -> None:
    assert contrast("#777777", "#ffffff") < 4.5 < contrast("#767676", "#ffffff")
