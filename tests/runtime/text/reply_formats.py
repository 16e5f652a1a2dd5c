"""Replies written in each format of tool calls, and tokenizers with their markers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from npuq.runtime.text.replies.parts import Part, ToolCall
from npuq.runtime.text.replies.reply import Reply
from npuq.runtime.text.tokenizer import Tokenizer

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "tiny-deepseek-v3-fp8"
THINK = ("<think>", "</think>")
DEEPSEEK = tuple(f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep"))
KIMI = tuple(f"<|tool_{name}|>" for name in ("calls_section_begin", "calls_section_end", "call_begin", "call_end"))
KIMI += ("<|tool_call_argument_begin|>",)
TAGS = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
MARKERS = (*THINK, *DEEPSEEK, *KIMI, *TAGS)

Call = tuple[str, dict[str, object]]


def written(format: str, calls: Sequence[Call]) -> str:
    """Calls as a model of that format writes them."""
    begin, end, call, call_end, separator = DEEPSEEK
    if format == "deepseek-v3":
        texts = (f"{call}function{separator}{name}\n```json\n{_json(args)}\n```{call_end}" for name, args in calls)
        return begin + "\n".join(texts) + end
    if format == "deepseek-v31":
        return begin + "".join(f"{call}{name}{separator}{_json(args)}{call_end}" for name, args in calls) + end
    if format == "qwen3":
        objects = (f'{{"name": "{name}", "arguments": {_json(args)}}}' for name, args in calls)
        return "".join(f"\n<tool_call>\n{each}\n</tool_call>" for each in objects)
    if format == "glm-4.5":
        return "".join(f"\n<tool_call>{name}\n{_glm(args)}</tool_call>" for name, args in calls)
    begin, end, call, call_end, separator = KIMI
    numbered = enumerate(calls)
    texts = (f"{call}functions.{name}:{n}{separator}{_json(args)}{call_end}" for n, (name, args) in numbered)
    return begin + "".join(texts) + end


def _json(arguments: dict[str, object]) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def _glm(arguments: dict[str, object]) -> str:
    values = ((key, value if isinstance(value, str) else json.dumps(value)) for key, value in arguments.items())
    return "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in values)


def tokenizer_with(directory: Path, markers: Iterable[str], *, special: bool = False) -> Tokenizer:
    """The example's tokenizer with markers as tokens of their own; decoded text leaves special ones out."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(EXAMPLE / "tokenizer_config.json", directory)
    content = json.loads((EXAMPLE / "tokenizer.json").read_text(encoding="utf-8"))
    first = len(content["model"]["vocab"])
    content["added_tokens"] += [
        {**content["added_tokens"][0], "id": first + n, "content": marker, "special": special}
        for n, marker in enumerate(markers)
    ]
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return Tokenizer(directory)


def read(reply: Reply, ids: Iterable[int]) -> tuple[str, str, tuple[ToolCall, ...], list[Part]]:
    """Reasoning, content and calls put together from the parts of a reply, and the parts."""
    parts: list[Part] = []
    for token in ids:
        parts += reply.add(token)
        if reply.stopped:
            break
    parts += reply.flush()
    calls: dict[int, ToolCall] = {}
    for delta in (part.call for part in parts if part.call is not None):
        if delta.name is not None:
            assert delta.index == len(calls) and delta.id
            calls[delta.index] = ToolCall(delta.id, delta.name, "")
        before = calls[delta.index]
        calls[delta.index] = ToolCall(before.id, before.name, before.arguments + delta.arguments)
    return (
        "".join(part.reasoning for part in parts),
        "".join(part.text for part in parts),
        tuple(calls.values()),
        parts,
    )
