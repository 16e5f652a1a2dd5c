"""What commands are given, before it is damaged: checkpoints of every dialect, artifacts, an unfinished conversion, a
recipe and texts; 0.1 to 0.4 MB each."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from pathlib import Path

import torch
from fuzz_bases import V3, write_checkpoint
from safetensors.torch import load_file

import npuq
from npuq.convert import CalibrationText, convert_checkpoint
from npuq.errors import NpuqError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "foreign"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "checkpoints"))
from foreign import write_compressed, write_modelslim, write_shards
from packed_v4 import write_random_release

SHARD_BYTES = 80_000
FP8_BLOCK = 16, 32
TEXT = "the quick brown fox jumps over the lazy dog. " * 12
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{{ eos_token }}"
RECIPE = """\
name: mine
target: engines
method: mse
rules:
  - roles: [routed_expert]
    scheme: W4A8
    method: mse
  - names: ["model.layers.?.self_attn.*"]
    layers: 0-1,7
    scheme: W8A8
  - roles: [shared_expert, dense_mlp]
    scheme: W8A8
"""
CARD = "---\nlicense: mit\nlanguage: [en, zh]\nbase_model: someone/model\n---\n\n# A model\n"


def make_inputs(folder: Path) -> None:
    """Write all of them below an empty folder, each as a directory."""
    plain = write_checkpoint(folder / "plain", {**V3, "vocab_size": 128, "eos_token_id": 1})
    _add_side_files(plain)
    source = Path(shutil.copytree(plain, folder / "source"))
    (source / "model.safetensors").unlink()
    write_shards(load_file(plain / "model.safetensors"), source, "model", 3)
    _write_fp8(plain, folder / "fp8")
    write_random_release(folder / "v4")
    _write_ranks(write_checkpoint(folder / "ranks", {**V3, "vocab_size": 320, "eos_token_id": 1}))
    _add_words(folder / "words")
    for written in (
        write_compressed(plain, folder / "compressed"),
        write_compressed(plain, folder / "packed", packed=True),
        write_modelslim(plain, folder / "modelslim", static=("q_a_proj", "kv_a_proj_with_mqa")),
    ):
        shutil.copy(plain / "chat_template.jinja", written)
    calibration = CalibrationText(folder / "words" / "text.jsonl", samples=2, sequence_length=16)
    artifact = folder / "artifact"
    convert_checkpoint(
        source,
        artifact,
        method="rotate+smooth+gptq",
        calibration=calibration,
        workers=1,
        max_shard_size=SHARD_BYTES,
    )
    convert_checkpoint(plain, folder / "bytes", recipe="w8a8", method="minmax", workers=1)
    _unfinished(source, folder / "unfinished")


def _write_fp8(plain: Path, directory: Path) -> None:
    """The same checkpoint in FP8: in blocks, with scales in float32 and as powers of two, and by channel."""
    shutil.copytree(plain, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(plain / "model.safetensors")
    for number, name in enumerate([name for name in tensors if ".layers." in name and "proj" in name]):
        rows, columns = tensors[name].shape
        tensors[name] = (tensors[name] * 64).to(torch.float8_e4m3fn)
        if number % 3 == 2:
            tensors[name + "_scale"] = torch.full((rows, 1), 1 / 64).bfloat16()
            continue
        scale = torch.full((-(-rows // FP8_BLOCK[0]), -(-columns // FP8_BLOCK[1])), 1 / 64)
        tensors[name + "_scale_inv"] = scale if number % 3 else scale.to(torch.float8_e8m0fnu)
    write_shards(tensors, directory, "model", 2)
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(FP8_BLOCK)}
    (directory / "config.json").write_text(json.dumps(config))


def _add_side_files(directory: Path) -> None:
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, **{chr(32 + index): 3 + index for index in range(95)}}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "unk_token": "<unk>", "vocab": vocabulary, "merges": []},
    }
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True, "model_max_length": 10**30}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "temperature": 0.6}))
    (directory / "README.md").write_text(CARD)
    (directory / "LICENSE").write_text("MIT\n")


def _write_ranks(directory: Path) -> None:
    """Add a tokenizer as Kimi has it: a rank for each byte and for some words, and special tokens."""
    tokens = [
        *(bytes([byte]) for byte in range(256)),
        b"ab",
        b"th",
        b"the",
        b" the",
        b"fo",
        b"fox",
        "é".encode(),
        b"  ",
    ]
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    (directory / "tiktoken.model").write_bytes(b"".join(lines))
    names = {"[BOS]": True, "[EOS]": True, "<|im_end|>": True, "<think>": False}
    added = {
        str(number): {"content": text, "special": special}
        for number, (text, special) in enumerate(names.items(), len(tokens))
    }
    settings = {
        "added_tokens_decoder": added,
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "bos_token": "[BOS]",
        "eos_token": {"content": "[EOS]"},
        "model_max_length": 10**30,
        "tokenizer_class": "TikTokenTokenizer",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "tokenization_kimi.py").write_text("raise SystemExit('remote code')\n")
    (directory / "chat_template.jinja").write_text(TEMPLATE)


def _add_words(directory: Path) -> None:
    directory.mkdir()
    (directory / "recipe.yaml").write_text(RECIPE)
    (directory / "text.txt").write_text(TEXT)
    chat = {"messages": [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "yes"}]}
    (directory / "text.jsonl").write_text("\n".join(map(json.dumps, ({"text": TEXT}, chat))))


class _StoppedError(NpuqError):
    pass


def _unfinished(source: Path, output: Path) -> None:
    """A conversion that was stopped after its first shard."""

    def stop(name: str, sha256: str) -> None:
        raise _StoppedError

    try:
        npuq.convert_checkpoint(source, output, method="minmax", workers=1, max_shard_size=SHARD_BYTES, on_shard=stop)
    except _StoppedError:
        return
    raise AssertionError("the conversion was not stopped")
