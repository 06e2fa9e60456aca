"""README and docs/: links, commands, recipes and paths that they name exist."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from exporter.cli import COMMANDS, arguments, main
from exporter.gate.budget import limits, read_budget
from exporter.recipe import load_recipe

DOCS = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "devices/runner/README.md", *DOCS]
RECIPES = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
#: Commands of the documents that run another one.
_WRAPPERS = "taskset", "/usr/bin/time"

by_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix()
)


def code(document: Path) -> list[str]:
    """Every fenced block and every inline code span, without its backticks."""
    found = re.findall(r"^```\w*\n(.*?)^```|`([^`\n]+)`", document.read_text(), re.M | re.S)
    return [block or span for block, span in found]


def prose(document: Path) -> str:
    """The text without fenced blocks and code spans."""
    return re.sub(r"^```.*?^```|`[^`\n]+`", "", document.read_text(), flags=re.M | re.S)


def anchors(document: Path) -> set[str]:
    """The anchors of the headings, as GitHub and mkdocs make them, with the text of code spans."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", text.lower()).strip().replace(" ", "-") for text in headings}


def subcommands(document: Path) -> set[str]:
    pattern = r"(?:^|[\s(])(?:mobilellm|-m exporter) +([a-z]\w*)"
    return {name for text in code(document) for name in re.findall(pattern, text)}


def command_lines(document: Path) -> list[list[str]]:
    """The arguments of every `mobilellm` command in a fenced block; … leaves something out."""
    blocks = re.findall(r"^```sh\n(.*?)^```", document.read_text(), re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    typed = [shlex.split(line, comments=True) for line in lines if "…" not in line]
    ours = [words for words in typed if words and words[0] in ("mobilellm", *_WRAPPERS)]
    return [words[words.index("mobilellm") + 1 :] for words in ours if "mobilellm" in words]


def recipes(document: Path) -> set[str]:
    """What stands where a command takes a recipe, and every name of the form of ours."""
    taken = r"(?:mobilellm|-m exporter) +(?:export|quantize) +([a-z][\w.-]*)|--recipe +([\w.-]+)"
    named = r"(?<![\w/.-])([a-z]\w*(?:-\w+)*-int[48](?:-\w+)*)(?![\w/.-])"
    found = [name for text in code(document) for name in re.findall(f"{taken}|{named}", text)]
    return {name for names in found for name in names if name}


def yaml_blocks(document: Path) -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```", document.read_text(), re.M | re.S)


def paths(document: Path) -> set[str]:
    """Paths of the repository: they begin with one of its folders."""
    pattern = r"(?<![\w/.-])((?:exporter|devices|examples|recipes|tests|docs)/[\w./-]*)"
    return {name for text in code(document) for name in re.findall(pattern, text)}


def test_the_readme_has_at_most_120_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_limits_are_in_the_first_third_of_the_readme() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines.index("## Limits") < len(lines) / 3


@by_document
def test_every_relative_link_resolves(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", prose(document))
    for link in links:
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), f"{link} leads nowhere"
        assert target.is_relative_to(ROOT), f"{link} leads out of the repository"
        assert not anchor or anchor in anchors(target), f"{link} names no heading"


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_a_page_links_to_pages_only(document: Path) -> None:
    """mkdocs publishes docs/ alone; files outside it are named as paths."""
    for link in re.findall(r"\]\(([^)#\s]+)", prose(document)):
        assert "://" in link or document.parent / link in DOCS, link


def test_every_page_is_in_the_navigation_and_in_the_readme() -> None:
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = {name for entry in navigation for name in entry.values()}
    readme = (ROOT / "README.md").read_text()
    assert pages == {path.name for path in DOCS}
    assert pages == set(re.findall(r"\]\(docs/([\w-]+\.md)\)", readme))


@by_document
def test_every_subcommand_that_is_named_exists(
    document: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in subcommands(document):
        with pytest.raises(SystemExit) as exit_:
            main([name, "--help"])
        assert exit_.value.code == 0, f"mobilellm {name}: {capsys.readouterr().err}"


def test_the_readme_names_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = set(re.findall(r"^    ([a-z]+) {2,}", capsys.readouterr().out, re.M))
    assert len(listed) > 5
    assert subcommands(ROOT / "README.md") == listed


@by_document
def test_every_command_line_is_one_that_the_parser_takes(document: Path) -> None:
    for typed in command_lines(document):
        arguments.parse(typed, COMMANDS)


def test_the_command_lines_of_the_documents_are_found() -> None:
    assert sum(len(command_lines(document)) for document in DOCUMENTS) > 20


@by_document
def test_every_path_that_is_named_exists(document: Path) -> None:
    for name in paths(document):
        assert (ROOT / name.rstrip(".")).exists(), name


@by_document
def test_every_recipe_that_is_named_exists(document: Path) -> None:
    assert recipes(document) <= RECIPES


def test_every_recipe_that_exists_is_on_the_page_of_recipes() -> None:
    assert recipes(ROOT / "docs/recipes.md") >= RECIPES


@by_document
def test_every_part_of_a_recipe_or_budget_that_is_shown_is_valid(
    document: Path, tmp_path: Path
) -> None:
    for block in yaml_blocks(document):
        (tmp_path / "shown.yaml").write_text(block)
        if document.name == "gate.md":
            assert limits(read_budget(tmp_path / "shown.yaml"))
        else:
            load_recipe(tmp_path / "shown.yaml")


def test_the_values_on_the_page_of_recipes_are_the_defaults(tmp_path: Path) -> None:
    (block,) = yaml_blocks(ROOT / "docs/recipes.md")
    shown = yaml.safe_load(block)
    assert shown["quantization"].pop("overrides")
    names = [{"target": target["target"]} for target in shown["targets"]]
    loaded = []
    for folder, content in (("shown", shown), ("default", {"targets": names})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "recipe.yaml").write_text(yaml.safe_dump(content))
        loaded.append(load_recipe(tmp_path / folder / "recipe.yaml"))
    assert loaded[0] == loaded[1]
