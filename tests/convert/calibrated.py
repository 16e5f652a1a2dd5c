"""Checkpoints that can be calibrated: small models with a tokenizer, and text for it."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from npuq.convert import CalibrationText, convert_checkpoint

VOCABULARY = 100
LENGTH = 16
CHAIN = "rotate+smooth+gptq"
STATIC = """\
name: static
method: gptq
rules:
  - names: ["*.self_attn.q_a_proj.weight", "*.self_attn.kv_a_proj_with_mqa.weight", "*.self_attn.q_b_proj.weight"]
    layers: 0-2
    scheme: W8A8_STATIC
  - roles: [routed_expert]
    scheme: W4A8
  - scheme: W8A8
"""


def convert(source, output, texts, **options):
    calibration = CalibrationText(texts, 8, LENGTH)
    return convert_checkpoint(source, output, **{"method": CHAIN, "calibration": calibration} | options)


def add_tokenizer(directory: Path, vocabulary: int = VOCABULARY) -> None:
    """A tokenizer whose words are w0, w1, …; <s> and </s> begin and end."""
    words = ["<s>", "</s>", *(f"w{index}" for index in range(vocabulary - 2))]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{% for m in messages %}{{ m.content }} {% endfor %}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def text(words: int, seed: int = 0, vocabulary: int = VOCABULARY) -> str:
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(vocabulary - 2)}" for _ in range(words))
