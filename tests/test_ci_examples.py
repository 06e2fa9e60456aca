"""The examples for CI: their own shell steps are run as a runner would, on the demo checkpoint."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from devices.files import cache_folder
from exporter.bundle.bundle import read_checksums
from exporter.yaml_reader import parse_yaml

CI = ROOT / "examples" / "ci"
#: The user's cache, where the native runner is compiled already; a test's own would be empty.
USERS_CACHE = cache_folder()
#: Steps of the workflow that the test replaces by nothing, each with the reason.
INSTALLS = {"install"}  # by `id`: they need the network; what they install is there
#: The actions that the test stands in for. Any other is a failure.
ACTIONS = {
    "actions/checkout": "the test copies the examples into an empty folder",
    "actions/cache/restore": "the test carries build/cache from run to run",
    "actions/cache/save": "as above",
    "actions/cache": "the cache of pip, which is not called",
    "actions/upload-artifact": "the test checks that the files to upload are there",
    "actions/download-artifact": "the archives are where it would put them",
}
#: Conditions of steps, and whether they hold in a run whose event is `push`.
CONDITIONS = {
    "${{ !cancelled() }}": lambda event: True,
    "github.event_name != 'pull_request'": lambda event: event != "pull_request",
}
#: Small settings, as variables of the workflow.
SMALL = {
    "OVERRIDES": "targets=[{'target':'executorch','max_context':512},"
    "{'target':'onnx','max_context':512}]",
    "PROFILE": "prompt_lengths=[64] depths=[0] sustained_seconds=0 max_repeats=3",
    "PROBLEMS": "20",
    "MOBILELLM_CACHE": str(USERS_CACHE),
}
RECIPE = "mobilellm-r1-nano-int8"


def read(name: str) -> dict[str, Any]:
    content = parse_yaml((CI / name).read_bytes(), name, "Correct it")
    assert isinstance(content, dict)
    return content


@pytest.fixture(scope="module")
def workflow() -> dict[str, Any]:
    return read("github.yaml")


@pytest.fixture(scope="module")
def gitlab() -> dict[str, Any]:
    return read("gitlab-ci.yml")


def steps(workflow: Mapping[str, Any], job: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = workflow["jobs"][job]["steps"]
    return found


def shell_steps(workflow: Mapping[str, Any], job: str) -> dict[str, str]:
    """Name → script, without those that install."""
    return {
        step["name"]: step["run"]
        for step in steps(workflow, job)
        if "run" in step and step.get("id") not in INSTALLS
    }


# What the files say.


def test_every_action_is_pinned_to_a_commit_and_known_here(workflow: dict[str, Any]) -> None:
    used = [
        step["uses"] for job in workflow["jobs"] for step in steps(workflow, job) if "uses" in step
    ]
    assert used
    for action in used:
        name, _, commit = action.partition("@")
        assert name in ACTIONS
        assert re.fullmatch("[0-9a-f]{40}", commit), action
    # The comment beside each commit names its tag, and one action has one commit.
    lines = re.findall(r"uses: (\S+)@(\S+)(.*)", (CI / "github.yaml").read_text())
    assert all(re.fullmatch(r" # v\d+\.\d+\.\d+", comment) for *_, comment in lines)
    assert len({commit for _, commit, _ in lines}) == len(
        {name.split("/")[1] for name, *_ in lines}
    )


def test_no_permission_is_granted_that_no_step_needs(workflow: dict[str, Any]) -> None:
    assert workflow["permissions"] == {"contents": "read"}
    assert all("permissions" not in job for job in workflow["jobs"].values())


def test_no_expression_and_no_secret_is_part_of_a_script(
    workflow: dict[str, Any], gitlab: dict[str, Any]
) -> None:
    """They come by environment variables: a script is the same text in every run, and the list of
    processes shows no secret."""
    for job in workflow["jobs"]:
        for name, script in shell_steps(workflow, job).items():
            assert "${{" not in script
            # printf is a builtin of the shell, so no process has the key as an argument.
            if name != "Signing key":
                assert not re.search(r"SIGNING_KEY\b", script)
    text = (CI / "github.yaml").read_text()
    assert re.findall(r"secrets\.\w+", text) == ["secrets.SIGNING_KEY"]
    assert "secret" not in json.dumps(gitlab)


@pytest.mark.parametrize("job", ["model", "report"])
def test_gitlab_runs_the_same_scripts_with_the_same_variables(
    job: str, workflow: dict[str, Any], gitlab: dict[str, Any]
) -> None:
    own = {"Signing key"}  # GitLab has variables of type File
    shared = [run for name, run in shell_steps(workflow, job).items() if name not in own]
    assert gitlab[job]["script"] == shared
    (install,) = [step["run"] for step in steps(workflow, job) if step.get("id") in INSTALLS]
    assert gitlab[job]["before_script"] == [install]
    assert gitlab["variables"] == workflow["env"]
    assert gitlab["default"]["image"] == workflow["jobs"][job]["container"]
    uploads = [
        s["with"]["path"] for s in steps(workflow, job) if "upload-artifact" in s.get("uses", "")
    ]
    (upload,) = [path.replace("${{ matrix.recipe }}", "$RECIPE").split() for path in uploads]
    artifacts = gitlab[job]["artifacts"]
    kept = {*artifacts["paths"], *artifacts.get("reports", {}).values()}
    assert kept - {"build/$RECIPE/gate.md"} == set(upload)  # GitHub shows it as the summary


def test_gitlab_has_the_same_matrix(workflow: dict[str, Any], gitlab: dict[str, Any]) -> None:
    model = workflow["jobs"]["model"]
    rows = model["strategy"]["matrix"]["include"]
    names = {key: value for key, value in model["env"].items() if key != "OUT"}
    assert [
        {key: row[value[len("${{ matrix.") : -len(" }}")]] for key, value in names.items()}
        for row in rows
    ] == gitlab["model"]["parallel"]["matrix"]
    out = gitlab["model"]["variables"]["OUT"]
    assert out.replace("$RECIPE", "${{ matrix.recipe }}") == model["env"]["OUT"]
    for row in rows:
        assert (ROOT / row["budget"]).is_file()
        assert (ROOT / "recipes" / f"{row['recipe']}.yaml").is_file()


def test_what_is_installed_is_what_the_tests_use(workflow: dict[str, Any]) -> None:
    """The step that the test does not run names packages that there are."""
    (script,) = [s["run"] for s in steps(workflow, "model") if s.get("id") in INSTALLS]
    tools = re.search(r"needed=\((.*)\)", (ROOT / "tests" / "tools.sh").read_text())
    packages = re.search(r"--no-install-recommends (.*)", script)
    assert tools and packages and set(packages[1].split()) <= set(tools[1].split())
    extras = re.search(r"\[(.*)\]", script)
    known = re.findall(r"^([\w-]+) =$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    assert extras and set(extras[1].split(",")) <= set(known)


def test_the_cache_is_found_and_kept_by_the_same_name(workflow: dict[str, Any]) -> None:
    caches = [step for step in steps(workflow, "model") if "actions/cache" in step.get("uses", "")]
    restored, _, saved = (step["with"] for step in caches)
    assert restored["path"] == saved["path"] == workflow["env"]["CACHE"]
    assert saved["key"].startswith(restored["restore-keys"])
    assert workflow["env"]["MOBILELLM_CACHE"].startswith(f"{workflow['env']['CACHE']}/")


# The steps themselves.


@dataclass
class Runner:
    """A runner of the workflow: runs the steps of a job in an empty folder with the examples."""

    workflow: Mapping[str, Any]
    folder: Path
    event: str = "push"
    secrets: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shutil.copytree(ROOT / "examples", self.folder / "examples")
        (self.folder / "temp").mkdir()
        for name in ("env", "summary.md"):
            (self.folder / "temp" / name).touch()
        self.exported = dict[str, str]()
        self.matrix = next(
            row
            for row in self.workflow["jobs"]["model"]["strategy"]["matrix"]["include"]
            if row["recipe"] == RECIPE
        )

    def run(self, job: str, only: Collection[str] = ()) -> dict[str, str]:
        """Run the shell steps of a job, or those of these names: step → what it printed."""
        printed = dict[str, str]()
        for step in steps(self.workflow, job):
            holds = CONDITIONS[step["if"]](self.event) if "if" in step else True
            if "run" not in step:
                assert step["uses"].partition("@")[0] in ACTIONS
            elif holds and step.get("id") not in INSTALLS and (not only or step["name"] in only):
                printed[step["name"]] = self._shell(job, step)
        return printed

    def _shell(self, job: str, step: Mapping[str, Any]) -> str:
        own = self.workflow["env"], self.workflow["jobs"][job].get("env", {}), step.get("env", {})
        given = {name: self._value(value) for part in own for name, value in part.items()}
        temp = self.folder / "temp"
        search = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        github = {
            "GITHUB_ENV": str(temp / "env"),
            "GITHUB_STEP_SUMMARY": str(temp / "summary.md"),
            "RUNNER_TEMP": str(temp),
        }
        script = temp / "script.sh"
        script.write_text(step["run"])
        outcome = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            cwd=self.folder,
            env=os.environ | search | github | given | self.variables | self.exported,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert outcome.returncode == 0, f"{step['name']}:\n{outcome.stdout}"
        lines = (temp / "env").read_text().splitlines()
        self.exported = dict(line.split("=", 1) for line in lines)
        return outcome.stdout

    def _value(self, text: str) -> str:
        """A value with its expressions replaced; an expression that is not known is a KeyError."""
        known = {f"matrix.{key}": value for key, value in self.matrix.items()}
        known |= {"secrets.SIGNING_KEY": self.secrets.get("SIGNING_KEY", "")}
        return re.sub(r"\$\{\{ (.+?) \}\}", lambda found: known[found[1]], text)

    @property
    def out(self) -> Path:
        return self.folder / "build" / RECIPE


@pytest.fixture(scope="module")
def signing_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture(scope="module")
def first(
    workflow: dict[str, Any],
    signing_key: ec.EllipticCurvePrivateKey,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Runner, dict[str, str]]:
    """A first run, with a signing key, and what its steps printed."""
    for program in ("qemu-aarch64", "aarch64-linux-gnu-g++"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: make tools")
    private = signing_key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = signing_key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    secrets = {"SIGNING_KEY": private.decode().strip()}
    runner = Runner(
        workflow, tmp_path_factory.mktemp("first") / "work", secrets=secrets, variables=SMALL
    )
    (runner.folder / workflow["env"]["PUBLIC_KEY"]).write_bytes(public)
    return runner, runner.run("model")


def happened(printed: str) -> dict[str, set[str]]:
    """The stages of an export by what happened to them, from its log."""
    facts = re.findall(r"^  (made|found|unchanged) +(.*?)(?: \(in .*\))?$", printed, re.MULTILINE)
    return {what: set(stages.split(", ")) for what, stages in facts}


STAGES = {
    "quantize", "lower executorch", "lower onnx",
    "verify quantized", "verify executorch", "verify onnx",
}  # fmt: skip


def test_the_steps_run_and_leave_what_is_uploaded(
    first: tuple[Runner, dict[str, str]], workflow: dict[str, Any]
) -> None:
    runner, printed = first
    assert list(printed) == list(shell_steps(workflow, "model"))
    assert happened(printed["Export"]) == {"made": STAGES}
    (upload,) = [step for step in steps(workflow, "model") if "upload" in step.get("uses", "")]
    for name in upload["with"]["path"].split("\n")[:-1]:
        assert (runner.folder / runner._value(name)).is_file()
    assert RECIPE in (runner.folder / "temp" / "summary.md").read_text()
    assert "signature" in printed["Verify"]
    key = runner.folder / "temp" / "signing.pem"
    assert key.stat().st_mode & 0o077 == 0
    assert all("PRIVATE" not in text for text in printed.values())


def test_the_report_is_made_of_what_the_jobs_uploaded(
    first: tuple[Runner, dict[str, str]], workflow: dict[str, Any]
) -> None:
    runner, _ = first
    runner.run("report")
    assert "<html" in (runner.folder / "build" / "report.html").read_text()
    assert RECIPE in (runner.folder / "build" / "report.md").read_text()


def test_a_second_run_does_no_work_and_a_changed_recipe_redoes_what_depends_on_it(
    first: tuple[Runner, dict[str, str]], workflow: dict[str, Any], tmp_path: Path
) -> None:
    """On another runner, for which the cache is all that is left; of a pull request, which gets no
    secret. What judges the result runs every time, and was run in the first test."""
    before, _ = first
    runner = Runner(workflow, tmp_path / "work", event="pull_request", variables=SMALL)
    shutil.copytree(before.folder / "build" / "cache", runner.folder / "build" / "cache")
    judges = {"Verify", "Gate"}
    printed = runner.run("model", only=shell_steps(workflow, "model").keys() - judges)
    assert happened(printed["Export"]) == {"found": STAGES}
    measured = "Evaluate", "Profile", "Count"
    assert {name: printed[name] for name in measured} == dict.fromkeys(measured, "")
    assert read_checksums(runner.out / "bundle") == read_checksums(before.out / "bundle")

    shutil.rmtree(runner.out)
    changed = SMALL["OVERRIDES"].replace(
        "{'target':'onnx','max_context':512}", "{'target':'onnx','max_context':256}"
    )
    runner.variables = {**SMALL, "OVERRIDES": changed}
    printed = runner.run("model", only=["Export"])
    redone = {"lower onnx", "verify onnx"}
    assert happened(printed["Export"]) == {"found": STAGES - redone, "made": redone}
