"""`npuq evaluate --tasks` with the real lm-evaluation-harness: accuracies are those of likelihoods computed here.

    python3 -m venv .venv-lm-eval && .venv-lm-eval/bin/pip install lm_eval
    .venv/bin/python tests/runtime/evaluation/check_tasks.py --harness .venv-lm-eval

Runs by itself: the harness brings fifty packages, which stand behind npuq's own on the path.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import npuq

ROOT = Path(__file__).resolve().parents[3]
SOURCE, TASKS = ROOT / "examples/tiny-deepseek-v3-fp8", ROOT / "examples/tasks"
PROGRAM = "import sys; sys.path.append(sys.argv.pop(1)); sys.argv[0] = 'npuq'; from npuq.cli.main import main; main()"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--harness", type=Path, required=True, help="an environment with lm_eval")
    (packages,) = parser.parse_args().harness.glob("lib/python3*/site-packages")
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "artifact"
        npuq.convert_checkpoint(SOURCE, artifact, method="minmax")
        files = [
            str(argument) for name in ("next_words", "completion") for argument in ("--tasks", TASKS / f"{name}.yaml")
        ]
        options = [*files, "--source", str(SOURCE), "--save", "--json", "--quiet"]
        command = [sys.executable, "-c", PROGRAM, str(packages), "evaluate", str(artifact), *options]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        choices, completion = found["tasks"]
        for key, model in (("metrics", artifact), ("source_metrics", SOURCE)):
            expected = accuracy(model)
            assert choices[key]["acc"] == expected, (choices, expected)
        assert 0 <= completion["metrics"]["exact_match"] <= 1 and completion["documents"] == 3
        assert npuq.verify(artifact).ok
        assert choices["harness"] in (artifact / "README.md").read_text()
        refused = Path(folder) / "refused.yaml"
        shutil.copy(TASKS / "next_words.jsonl", folder)
        text = (TASKS / "next_words.yaml").read_text()
        refused.write_text(text.replace("{{text}}", "{{ text.__class__.__mro__[1].__subclasses__() }}"))
        done = subprocess.run([*command[:6], "--tasks", str(refused)], capture_output=True, text=True)
        assert done.returncode == 1 and "unsafe" in done.stderr, done.stderr
    print("tasks agree")


def accuracy(directory: Path) -> float:
    """The share of documents whose right choice is the likeliest, from the model's logits in float64."""
    model = npuq.load(directory)
    right = []
    for line in (TASKS / "next_words.jsonl").read_text().splitlines():
        document = json.loads(line)
        before = model.tokenizer.encode(document["text"])
        sums = []
        for choice in document["choices"]:
            ids = model.tokenizer.encode(f"{document['text']} {choice}")
            (logits,) = model.logits([ids[:-1]])
            rows = logits.double().log_softmax(-1)[len(before) - 1 :]
            sums.append(sum(float(row[token]) for row, token in zip(rows, ids[len(before) :], strict=True)))
        right.append(sums.index(max(sums)) == document["answer"])
    model.close()
    return sum(right) / len(right)


if __name__ == "__main__":
    main()
