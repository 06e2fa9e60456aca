"""The models of this tool in lm-eval itself: as its own `hf` model, and in every runtime."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from conftest import NANO, ROOT
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

from exporter.bundle.bundle import Bundle
from exporter.errors import InputError
from exporter.evaluation import lm_eval_plugin
from exporter.evaluation.lm_eval import MobileLLM
from exporter.verification.runs import SAMPLE_TEXT

TASK = ROOT / "examples" / "tasks" / "arithmetic.yaml"
PROMPT = "Ada has 12 eggs. Ada sells 5. How many eggs does Ada have now?"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
#: Contexts and continuations: several tokens, a space to move, one token and another after the
#: same context, no context, a context that writes the begin token itself.
PAIRS = [
    ("Ada has 12 eggs. Ada sells", " 5. How many"),
    ("12 - 5 =", " 7"),
    ("12 - 5 =", " 8"),
    ("12 - 5 = ", "7"),
    ("Ada", " has"),
    ("Ada", " starts"),
    ("", "Ada has 12 eggs."),
    ("<|begin_of_text|>Ada has", " 12"),
]


@pytest.fixture(scope="module")
def ours() -> MobileLLM:
    return MobileLLM(str(NANO))


@pytest.fixture(scope="module")
def theirs() -> HFLM:
    model = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    return HFLM(pretrained=model, tokenizer=str(NANO), device="cpu", batch_size=1)


def requests(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


# As the harness's own model.


def test_likelihoods_are_those_of_the_hf_model(ours: MobileLLM, theirs: HFLM) -> None:
    asked = requests("loglikelihood", *PAIRS)
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(asked, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    values = [value for value, _ in found]
    assert values == pytest.approx([value for value, _ in expected], abs=1e-3)


@pytest.mark.parametrize("max_length", [None, 64, 33])
def test_likelihoods_of_whole_texts_are_those_of_the_hf_model(
    max_length: int | None, theirs: HFLM
) -> None:
    text = SAMPLE_TEXT.read_text()
    asked = requests("loglikelihood_rolling", (text,), ("Ada has 12 eggs.",))
    theirs._max_length = max_length
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    ours = MobileLLM(str(NANO), max_length=max_length)
    assert ours.loglikelihood_rolling(asked, disable_tqdm=True) == pytest.approx(expected, rel=1e-4)
    theirs._max_length = None


@pytest.mark.parametrize(
    "options",
    [
        {"until": [], "max_gen_toks": 60},
        {"until": ["\n"], "max_gen_toks": 60},
        {"until": "eggs", "max_gen_toks": 60},
        {"until": ["<|eot_id|>"], "max_gen_toks": 7},
        {"until": [" = 7", "never"], "max_gen_toks": 60},
    ],
    ids=lambda options: repr(options["until"]),
)
def test_generations_are_those_of_the_hf_model(
    options: dict[str, Any], ours: MobileLLM, theirs: HFLM
) -> None:
    prompts = [ours.apply_chat_template([CHAT[1]]), "Ada has"]
    asked = requests("generate_until", *((prompt, options) for prompt in prompts))
    expected = theirs.generate_until(asked, disable_tqdm=True)
    assert ours.generate_until(asked, disable_tqdm=True) == expected


@pytest.mark.parametrize("answered", [False, True])
def test_conversations_are_those_of_the_hf_model(
    answered: bool, ours: MobileLLM, theirs: HFLM
) -> None:
    """An answer that is begun stays open, for the model to go on with."""
    chat = [*CHAT, {"role": "assistant", "content": "She has"}] if answered else CHAT
    found = ours.apply_chat_template(chat, add_generation_prompt=not answered)
    assert found == theirs.apply_chat_template(chat, add_generation_prompt=not answered)


@pytest.mark.parametrize("text", ["Ada has", "<|begin_of_text|>Ada", ""])
@pytest.mark.parametrize("special", [None, False, True])
def test_texts_become_the_tokens_of_the_hf_model(
    text: str, special: bool | None, ours: MobileLLM, theirs: HFLM
) -> None:
    assert ours.tok_encode(text, special) == theirs.tok_encode(text, special)


# What it does by itself.


def test_the_next_choice_of_a_question_is_not_read_again(
    ours: MobileLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [
        ours.loglikelihood(requests("loglikelihood", pair), disable_tqdm=True)[0]
        for pair in reversed(PAIRS)
    ]
    reads = list[int]()
    score = type(ours._loaded.runner).score

    def counted(runner: Any, tokens: Sequence[int], first: int, rows: int) -> Any:
        reads.append(len(tokens))
        return score(runner, tokens, first, rows)

    monkeypatch.setattr(type(ours._loaded.runner), "score", counted)
    together = ours.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    assert together == alone[::-1]
    assert len(reads) == len(PAIRS) - 1


def test_samples_of_one_prompt_differ_and_repeat_from_the_start() -> None:
    options = {"do_sample": True, "temperature": 2.0, "top_p": 0.9, "max_gen_toks": 20, "until": []}
    asked = requests("generate_until", *[("Ada has", options)] * 3)
    one, other = (MobileLLM(str(NANO)).generate_until(asked, disable_tqdm=True) for _ in range(2))
    assert len(set(one)) == 3
    assert one == other


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"path": "./nowhere"}, "is not a folder"),
        ({"path": str(NANO), "target": "onnx"}, "is not a bundle"),
        ({"path": str(NANO), "max_length": 1}, "max_length=1"),
        ({"path": str(NANO), "max_length": 5000}, "not within 2..2048"),
    ],
)
def test_a_model_that_cannot_be_opened_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        MobileLLM(**arguments)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_gen_toks": 2048, "until": []}, "no room for a prompt"),
        ({"do_sample": True, "temperature": 1.0, "top_k": 5, "until": []}, "top_k"),
    ],
)
def test_options_of_a_generation_that_cannot_be_kept_are_refused(
    options: dict[str, Any], said: str, ours: MobileLLM
) -> None:
    with pytest.raises(InputError, match=said):
        ours.generate_until(requests("generate_until", ("a", options)), disable_tqdm=True)


def test_a_continuation_longer_than_the_context_is_refused() -> None:
    model = MobileLLM(str(NANO), max_length=8)
    with pytest.raises(InputError, match="the context holds 8"):
        model.loglikelihood(requests("loglikelihood", ("a", "eggs " * 10)), disable_tqdm=True)


# Whole tasks, in every runtime.


def task_files(folder: Path) -> list[str]:
    """Three tasks of two problems, one for each kind of request; they need no network."""
    rows = [
        {"text": PROMPT, "choices": [" 7", " 8"], "gold": 0, "answer": "7"},
        {"text": "Ben has 30 pens. Ben finds 5 more. How many pens does Ben have now?",
         "choices": [" 25", " 35"], "gold": 1, "answer": "35"},
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "rows.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "{{text}}",
    }
    kinds: dict[str, dict[str, Any]] = {
        "choosing": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}",
                     "doc_to_target": "{{gold}}", "metric_list": [{"metric": "acc"}]},
        "reading": {"output_type": "loglikelihood_rolling", "doc_to_text": "",
                    "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}]},
        "writing": {"output_type": "generate_until", "doc_to_target": "{{answer}}",
                    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12},
                    "metric_list": [{"metric": "exact_match"}]},
    }  # fmt: skip
    for name, content in kinds.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **content}))
    return list(kinds)


def measured(model: Any, arguments: str, names: list[str], folder: Path) -> dict[str, Any]:
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=names,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        verbosity="ERROR",
        bootstrap_iters=0,
    )
    assert found is not None
    return dict(found)


@pytest.mark.parametrize("kind", ["checkpoint", "quantized", "executorch", "onnx", "coreml"])
def test_every_kind_of_request_runs_on_every_kind_of_model(
    kind: str, finished_bundle: Bundle, theirs: HFLM, tmp_path: Path
) -> None:
    bundle = finished_bundle.path
    path = {"checkpoint": str(NANO), "quantized": f"{bundle / 'quantized'}"}.get(
        kind, f"{bundle},target={kind}"
    )
    lm_eval_plugin.register()
    names = task_files(tmp_path)
    found = measured("mobilellm", f"path={path}", names, tmp_path)
    results = found["results"]
    assert set(results) == set(names)
    assert {"acc,none", "alias"} <= results["choosing"].keys()
    assert results["reading"]["bits_per_byte,none"] < 8
    assert found["config"]["model_path"] == path.partition(",")[0]
    assert kind in found["config"]["model_kind"]
    if kind == "checkpoint":
        expected = measured(theirs, "", names, tmp_path)["results"]
        for name, metric in zip(names, ("acc", "bits_per_byte", "exact_match"), strict=True):
            key = f"{metric},none"
            assert results[name][key] == pytest.approx(expected[name][key], rel=1e-4)


def lm_eval_command(module: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`lm_eval` in a process that finds this package's entry points as setup.cfg names them."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options.entry_points"]["torch.backends"].strip()
    info = folder / "site" / "mobilellm_exporter-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mobilellm-exporter\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[torch.backends]\n{lines}\n")
    paths = os.pathsep.join((str(info.parent), str(ROOT), os.environ.get("PYTHONPATH", "")))
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT, check=False, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1",
             "HF_DATASETS_CACHE": str(folder / "cache")},
    )  # fmt: skip


@pytest.mark.parametrize("module", ["lm_eval", "exporter.evaluation.lm_eval"])
def test_the_plain_lm_eval_command_runs_the_example(
    module: str, finished_bundle: Bundle, tmp_path: Path
) -> None:
    """Most of eight problems are solved through the .onnx."""
    outcome = lm_eval_command(
        module, tmp_path, "--model", "mobilellm", "--model_args",
        f"path={finished_bundle.path},target=onnx", "--tasks", str(TASK), "--limit", "8",
        "--apply_chat_template", "--output_path", str(tmp_path / "out"),
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())
    assert found["results"]["mobilellm_arithmetic"]["exact_match,boxed"] >= 6 / 8
    assert found["config"]["model_kind"] == "onnx"


def test_importing_torch_alone_loads_no_harness() -> None:
    program = (
        "import torch, sys; from exporter.evaluation.lm_eval_plugin import register; register();"
        "print([name for name in sys.modules if name.startswith('lm_eval')])"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert outcome.stdout == "[]\n"


def test_registering_keeps_the_models_of_the_harness() -> None:
    program = (
        "import lm_eval; from exporter.evaluation.lm_eval_plugin import register;"
        "register(); register(); from lm_eval.api.registry import get_model;"
        "print(get_model('mobilellm').__name__, get_model('dummy').__name__)"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert outcome.stdout == "MobileLLM DummyLM\n"
