"""Task files are data; likelihoods and completions for the harness; results in manifest, card, report and JSON.

lm-evaluation-harness itself is no part of the tests' environment: check_tasks.py runs it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from json_schemas import check

import npuq
from npuq.errors import ArtifactError, GenerationError
from npuq.progress import Silent
from npuq.runtime import LanguageModel, load
from npuq.runtime.evaluation.task_files import read_task
from npuq.runtime.evaluation.tasks import TaskResult, _generated, _likelihoods, _rolling
from npuq.verification.evaluations import save_tasks
from npuq.verification.task_results import KEY, as_entry

TASKS = Path(__file__).parents[3] / "examples/tasks"
TEXT = (TASKS / "next_words.yaml").read_text(encoding="utf-8")
MANIFEST = "npuq/manifest.json"


def test_a_task_file_is_read_with_its_documents(tmp_path: Path) -> None:
    task = read_task(TASKS / "next_words.yaml")
    assert task.name == "next_words" and len(task.documents["test"]) == 8
    assert task.settings["test_split"] == "test" and "dataset_path" not in task.settings
    shutil.copytree(TASKS, tmp_path / "tasks")
    assert read_task(tmp_path / "tasks/next_words.yaml").digest == task.digest
    with (tmp_path / "tasks/next_words.jsonl").open("a") as file:
        file.write('{"text": "a", "choices": ["b"], "answer": 0}\n')
    assert read_task(tmp_path / "tasks/next_words.yaml").digest != task.digest


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("doc_to_text: ", "doc_to_text: !function os.system ", "tags are not read"),
        ("task: next_words", "process_docs: x.y\ntask: next_words", "key 'process_docs' is not read"),
        ("dataset_path: json", "dataset_path: hellaswag", "dataset_path must be json"),
        ("next_words.jsonl", "../secret.jsonl", "secret.jsonl"),
        ("next_words.jsonl", "none.jsonl", "none.jsonl: missing"),
        ("metric: acc\n", "metric: bleurt\n", "metric 'bleurt' must be one of acc"),
        ("multiple_choice", "code", "output_type 'code' must be one of"),
        ("task: next_words", "test_split: x\ntask: next_words", "test_split 'x' is not of data_files"),
        ("task: next_words", "task: 5", "task 5 must be a name"),
    ],
)
def test_a_task_file_that_is_none_or_would_be_code(old: str, new: str, told: str, tmp_path: Path) -> None:
    shutil.copytree(TASKS, tmp_path / "tasks")
    (tmp_path / "secret.jsonl").write_text("{}\n")
    path = tmp_path / "tasks/next_words.yaml"
    path.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(GenerationError) as refused:
        read_task(path)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_without_the_harness_it_is_one_line(run: Callable[..., tuple[int, str, str]], example_fp8: Path) -> None:
    if importlib.util.find_spec("lm_eval"):
        pytest.skip("lm_eval is installed: check_tasks.py tests with it")
    code, out, err = run("evaluate", example_fp8, "--tasks", TASKS / "next_words.yaml")
    assert (code, out, err.count("\n")) == (1, "", 1) and "pip install 'npuq[tasks]'" in err
    assert (
        run("evaluate", example_fp8)[0]
        == run("evaluate", example_fp8, "--text", TASKS / "next_words.yaml", "--limit", 1)[0]
        == 2
    )


@pytest.fixture(scope="module")
def model(example_fp8: Path) -> LanguageModel:
    return load(example_fp8)


def test_likelihoods_are_those_of_the_logits(model: LanguageModel) -> None:
    encode = model.tokenizer.encode
    pairs = [(encode(text), encode(more, special=False)) for text, more in (("Call me", " Ishmael."), ("The", " sea"))]
    for (context, more), (found, greedy) in zip(pairs, _likelihoods(model, pairs, Silent()), strict=True):
        (logits,) = model.logits([[*context, *more][:-1]])
        rows = logits.double().log_softmax(-1)[len(context) - 1 :]
        assert found == pytest.approx(sum(float(row[token]) for row, token in zip(rows, more, strict=True)), rel=1e-6)
        assert greedy == (rows.argmax(-1).tolist() == more)


def test_the_likelihood_of_a_text_is_its_perplexity(model: LanguageModel) -> None:
    text = "In the beginning God created the heaven and the earth."
    result = npuq.evaluate(model, text, context=64)
    bos = model.tokenizer.bos_id
    if bos is None:
        pytest.skip("without BOS evaluate does not predict the first token")
    assert _rolling(model, text, bos, Silent()) == pytest.approx(-result.tokens * math.log(result.perplexity), rel=1e-6)


def test_a_completion_ends_before_the_first_of_until(model: LanguageModel) -> None:
    whole = model.generate("And God said,", max_new_tokens=12, temperature=0).text
    stop = whole.split()[3]
    options = {"until": [stop], "max_gen_toks": 12}
    assert _generated(model, "And God said,", options, Silent()) == whole[: whole.index(stop)]


@pytest.fixture
def artifact(example_fp8: Path, tmp_path: Path) -> Path:
    npuq.convert_checkpoint(example_fp8, tmp_path / "artifact", method="minmax")
    return tmp_path / "artifact"


def result(name: str, value: float, digest: str = "ab" * 32) -> TaskResult:
    return TaskResult(name, digest, "lm_eval 0.4.13", 8, 0, {"acc": value, "acc_stderr": 0.01}, {"acc": 0.75})


def test_results_are_kept_with_the_artifact(artifact: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    assert save_tasks(artifact, [result("words|x", 0.5), result("other", 0.25, "cd" * 32)])
    assert save_tasks(artifact, [result("words|x", 0.625)])  # in place of the first
    manifest = json.loads((artifact / MANIFEST).read_text())
    assert [entry["metrics"]["acc"] for entry in manifest[KEY]] == [0.25, 0.625]
    card = (artifact / "README.md").read_text()
    line = f"| words\\|x | `{'ab' * 8}` | 8 | 0 | acc | 0.6250 ± 0.0100 | 0.7500 | lm_eval 0.4.13 |"
    assert card.count("## Evaluation") == 1 and line in card and "0.5000" not in card
    assert npuq.verify(artifact).ok
    document = json.loads(run("report", artifact, "--json", "--quiet")[1])
    check("report", document)
    assert document["tasks"] == manifest[KEY]
    values = dict.fromkeys(("perplexity", "tokens", "source_perplexity", "kl_divergence", "top1_agreement"))
    check("evaluate", {"schema": 2, **values, "tasks": [as_entry(result("a", 1.0))]})
    page = artifact.parent / "page.html"
    assert run("report", artifact, "-o", page, "--quiet")[0] == 0 and "0.6250 ± 0.0100" in page.read_text()
    manifest[KEY][0]["metrics"] = {"acc": "high"}
    (artifact / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="'tasks' is damaged"):
        save_tasks(artifact, [result("a", 1.0)])
    assert "'tasks' is damaged" in " ".join(npuq.verify(artifact).problems)
