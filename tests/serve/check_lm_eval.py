"""lm-evaluation-harness on a server: its log-likelihoods are those that `npuq evaluate` finds.

    python3 -m venv .venv-lm-eval && .venv-lm-eval/bin/pip install 'lm_eval[api]' transformers
    .venv-lm-eval/bin/python tests/serve/check_lm_eval.py --npuq .venv/bin/npuq

Runs by itself, in an environment of its own, because the harness brings a hundred packages. It needs no network: the
task is made of examples/eval.txt. `npuq serve` answers the harness's `local-completions` (token ids, echo, logprobs);
each document's log-likelihood is compared with `npuq evaluate` on the same text.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from listening import start_document

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = 512
PIECE = 1100  # characters: fewer tokens than the context
DOCUMENTS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npuq", type=Path, default=ROOT / ".venv/bin/npuq")
    parser.add_argument("--model", type=Path, default=ROOT / "examples/tiny-deepseek-v3-fp8")
    options = parser.parse_args()
    text = (ROOT / "examples/eval.txt").read_text(encoding="utf-8")
    documents = [text[start : start + PIECE] for start in range(0, PIECE * DOCUMENTS, PIECE)]

    command = [options.npuq, "serve", options.model, "--port", "0", "--json", "--quiet"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = start_document(server.stdout)["url"]
        found = harness_likelihoods(url, options.model, documents)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    worst = 0.0
    for number, (theirs, document) in enumerate(zip(found, documents, strict=True)):
        ours = own_likelihood(options.npuq, options.model, document)
        error = abs(theirs - ours) / abs(ours)
        worst = max(worst, error)
        print(f"document {number}: lm_eval {theirs:.6f}, npuq evaluate {ours:.6f}, relative difference {error:.1e}")
    if worst > 1e-5:
        sys.exit("the log-likelihoods differ")
    print("lm_eval and npuq evaluate agree")


def harness_likelihoods(url: str, model: Path, documents: list[str]) -> list[float]:
    """The log-likelihood of each document, by a task of the harness."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import lm_eval
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    def dataset(**_: Any) -> dict[str, Dataset]:
        return {"test": Dataset.from_list([{"text": document} for document in documents])}

    settings = {
        "task": "documents",
        "custom_dataset": dataset,
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    arguments = {
        "model": model.name,
        "base_url": f"{url}/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(model),
        "max_length": CONTEXT,
        "num_concurrent": 2,
    }
    results = lm_eval.simple_evaluate(
        "local-completions", model_args=arguments, tasks=[ConfigurableTask(config=settings)], bootstrap_iters=0
    )
    samples = sorted(results["samples"]["documents"], key=lambda sample: sample["doc_id"])
    return [_number(sample["resps"]) for sample in samples]


def _number(nested: Any) -> float:
    while isinstance(nested, (list, tuple)):
        nested = nested[0]
    return float(nested)


def own_likelihood(npuq: Path, model: Path, document: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "document.txt"
        path.write_text(document, encoding="utf-8")
        command = [npuq, "evaluate", model, "--text", path, "--context", str(CONTEXT), "--json", "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    return -math.log(result["perplexity"]) * result["tokens"]


if __name__ == "__main__":
    main()
