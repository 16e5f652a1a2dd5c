"""The model card on the hub: the author's text stays, npuq's own section is replaced."""

from __future__ import annotations

from typing import Any, Final

import yaml

from ..errors import HubError
from ..formats.artifact import CARD_BEGIN, CARD_END, CARD_NAME, CARD_PATH
from ..inputs.names import FileName
from ..inputs.yaml_text import parse_yaml

CARD: Final = FileName(CARD_NAME)
# Facts about the artifact that replace an older card's; all other front matter stays.
_OURS = ("base_model", "base_model_relation", "library_name", "pipeline_tag")


def merge_card(existing: str | None, generated: str, repo: str, base_model: str | None = None) -> str:
    """Merge the card to push: `generated` is the artifact's README.md, `existing` the hub's, None without one.

    Commands in the generated section name `repo`; `base_model` overrides the artifact's own name of its source. Raises
    HubError when the existing front matter is no YAML.
    """
    ours_front, ours_body = _split(generated, "the artifact's README.md")
    if base_model is not None:
        ours_front |= {"base_model": str(base_model), "base_model_relation": "quantized"}
    section = _section(ours_body).replace(CARD_PATH, repo)
    if existing is None or not existing.strip():
        return _join(ours_front, f"\n{section}\n")
    front, body = _split(existing, f"README.md in {repo}")
    before, found, rest = body.partition(CARD_BEGIN)
    if found:
        after = rest.partition(CARD_END)[2]
        body = f"{before}{section}{after}"
    else:
        body = f"{body.rstrip()}\n\n{section}\n"
    return _join(_merged_front(front, ours_front), body)


def _section(body: str) -> str:
    """The generated section with its two lines; the whole of a card without them (edited by hand)."""
    before, found, rest = body.partition(CARD_BEGIN)
    inner = rest.partition(CARD_END)[0] if found else before
    return f"{CARD_BEGIN}\n{inner.strip()}\n{CARD_END}"


def _merged_front(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    merged = {**ours, **theirs}
    merged |= {key: ours[key] for key in _OURS if key in ours}
    tags = theirs.get("tags")
    if isinstance(tags, list):
        merged["tags"] = list(dict.fromkeys([*tags, *ours.get("tags", [])]))
    return merged


def _split(card: str, name: str) -> tuple[dict[str, Any], str]:
    """Split a card into front matter and body."""
    lines = card.splitlines(keepends=True)
    if not lines or lines[0].strip() != "---":
        return {}, card
    for number, line in enumerate(lines[1:], 1):
        if line.strip() == "---":
            return _parsed("".join(lines[1:number]), name), "".join(lines[number + 1 :])
    raise HubError(f"{name}: its front matter has no end; repair it, then push again")


def _parsed(text: str, name: str) -> dict[str, Any]:
    try:
        front = parse_yaml(text, f"{name}: its front matter", HubError)
    except HubError as error:
        raise HubError(f"{error}; repair it, then push again") from None
    if front is None:
        return {}
    if not isinstance(front, dict):
        raise HubError(f"{name}: its front matter is no mapping; repair it, then push again")
    return front


def _join(front: dict[str, Any], body: str) -> str:
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n{body}" if front else body
