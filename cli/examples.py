"""Examples that the commands' `--help` shows, with what each does. The tests run them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

EXAMPLES: Final[Mapping[str, Mapping[str, str]]] = {
    "convert": {
        "npuq convert DeepSeek-V3 DeepSeek-V3-w4a8 --dry-run": "sizes, memory and disk; writes nothing",
        "npuq convert DeepSeek-V3 DeepSeek-V3-w4a8": "continues where it was interrupted",
        "npuq convert DeepSeek-V3 out --method auto --calibration text.jsonl": "chooses by calibration text",
        "npuq convert deepseek-ai/DeepSeek-V3 out --push user/name": "from hub to hub, with 20 GB of disk",
    },
    "verify": {
        "npuq verify DeepSeek-V3-w4a8": "hashes, structure, every value, the engines' needs",
        "npuq verify DeepSeek-V3-w4a8 --source DeepSeek-V3": "and the error of every linear",
        "npuq verify DeepSeek-V3-w4a8 --engine vllm-ascend --tp 8 --ep": "whether the engine can run it so",
    },
    "inspect": {
        "npuq inspect DeepSeek-V3": "the tensors of a checkpoint, by role",
        "npuq inspect DeepSeek-V3-w4a8 --json": "of an artifact, for a program",
    },
    "push": {
        "npuq push DeepSeek-V3-w4a8 user/DeepSeek-V3-w4a8 --private": "continues where it was interrupted",
        "npuq push DeepSeek-V3-w4a8 user/DeepSeek-V3-w4a8 --hub modelscope": "to ModelScope",
    },
    "pull": {
        "npuq pull user/DeepSeek-V3-w4a8": "into the cache of the hub's client; prints where",
        "npuq pull user/DeepSeek-V3-w4a8@v1 here": "a tag, into a directory",
    },
    "generate": {
        'npuq generate DeepSeek-V3-w4a8 --prompt "Call me Ishmael."': "continues the text",
        'npuq generate DeepSeek-V3-w4a8 --chat --prompt "Who is Ishmael?"': "asks it as a user's message",
        "npuq generate DeepSeek-V3-w4a8 --jsonl prompts.jsonl --json": "many prompts together",
        'torchrun --nproc-per-node 8 -m npuq generate DeepSeek-V3-w4a8 --prompt "Hello"': "over 8 NPUs",
    },
    "serve": {
        "npuq serve DeepSeek-V3-w4a8": "http://127.0.0.1:8000/v1, and a chat page",
        "npuq serve DeepSeek-V3-w4a8 --host 0.0.0.0 --api-key-file keys.txt": "for other machines",
    },
    "chat": {
        "npuq chat DeepSeek-V3-w4a8": "a model in this process",
        "npuq chat http://127.0.0.1:8000": "a model behind a server",
        "npuq chat DeepSeek-V3-w4a8 --json < questions.txt": "a line a question",
    },
    "evaluate": {
        "npuq evaluate DeepSeek-V3-w4a8 --source DeepSeek-V3 --text eval.txt": "perplexity and KL divergence",
        "npuq evaluate DeepSeek-V3-w4a8 --source DeepSeek-V3 --text eval.txt --layers --save": "kept in the artifact",
    },
    "report": {
        "npuq report DeepSeek-V3-w4a8": "writes report.html",
        "npuq report DeepSeek-V3-w4a8 -o page.html": "under another name",
    },
    "doctor": {
        "npuq doctor": "this machine",
        "npuq doctor DeepSeek-V3-w4a8": "and whether the model can run on its NPUs",
        "npuq doctor --plan DeepSeek-V3-w4a8 --devices 8 --memory 64GB": "layouts over several NPUs",
        "npuq doctor --selftest": "every operator against the reference",
    },
}
"""For each command its example lines, and what they do."""


def epilog(examples: Mapping[str, str]) -> str:
    """The end of a command's help: each line after a comment on what it does."""
    # click leaves the lines after \b as they are.
    return "\b\nExamples:\n" + "\n".join(f"  # {said}\n  $ {line}" for line, said in examples.items())
