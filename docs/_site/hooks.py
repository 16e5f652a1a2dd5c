"""Hooks of mkdocs: pages that lie outside docs/ or come from the code, links of all to each other, and a package
tree for the API reference.

The pages stay as they are for those who read them in the repository: links there lead to files. On the site a link to
a page leads to that page; one to a file of code becomes its name, or a link where mkdocs.yml has a `repo_url`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
from messages import raised

ROOT = Path(__file__).parents[2]
# Page of the site → file of the repository.
OUTSIDE = {
    "index.md": "README.md",
    "examples.md": "examples/README.md",
    "benchmarks.md": "benchmarks/README.md",
    "benchmarks-log.md": "benchmarks/log.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
_PAGES = {file: page for page, file in OUTSIDE.items()}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]*)(#[^)\s]*)?\)")

API = {
    "Conversion": ["convert.conversion.convert_checkpoint", "convert.plan.prepare.CalibrationText",
                   "convert.plan.summary.Summary"],
    "Verification": ["verification.verdict.verify", "verification.verdict.Verdict", "verification.inspection.inspect",
                     "verification.inspection.Inspection"],
    "Hubs": ["hub.pushing.push", "hub.pulling.pull", "hub.pushing.PushSummary"],
    "Running a model": ["runtime.llm.load", "runtime.llm.LanguageModel", "runtime.stream.Completion",
                        "runtime.stream.Piece", "runtime.sampling.params.SamplingParams",
                        "runtime.engine_config.EngineConfig", "runtime.text.tokenizer.Tokenizer"],
    "Evaluation": ["runtime.evaluation.perplexity.evaluate", "runtime.evaluation.perplexity.Evaluation",
                   "runtime.evaluation.layer_error.layer_errors", "runtime.evaluation.layer_error.LayerError"],
    "Progress": ["progress.Progress", "progress.Task"],
    "Errors": ["errors"],
}  # fmt: skip


def on_startup(*, command: str, dirty: bool) -> None:
    """Make build/reference/npuq, where the API reference finds the package: its root is the repository's."""
    tree = ROOT / "build/reference/npuq"
    tree.mkdir(parents=True, exist_ok=True)
    parts = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    for name in (*sorted(parts), *(path.name for path in ROOT.glob("*.py") if path.name != "setup.py")):
        link = tree / name
        if not link.is_symlink():
            link.symlink_to(ROOT / name)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for page, path in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    files.append(File.generated(config, "api.md", content=_api()))
    files.append(File.generated(config, "messages.md", content=_messages()))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files into links between pages."""
    name = page.file.src_uri
    if name in ("api.md", "messages.md"):
        return markdown
    folder = PurePosixPath(OUTSIDE.get(name, f"docs/{name}")).parent

    def moved(link: re.Match[str]) -> str:
        picture, text, target, anchor = link[1], link[2], link[3], link[4] or ""
        if not target or "://" in target or target.startswith("mailto:"):
            return link[0]
        path = _normal(folder / target)
        if path in _PAGES:
            return f"{picture}[{text}]({_PAGES[path]}{anchor})"
        if path.startswith("docs/") and files.get_file_from_path(path.removeprefix("docs/")):
            return f"{picture}[{text}]({path.removeprefix('docs/')}{anchor})"
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{name}: a link leads to {path}, which does not exist")
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})"
        return text

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else _LINK.sub(moved, part) for part in parts)


def _normal(path: PurePosixPath) -> str:
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def _api() -> str:
    lines = [
        "# Python API",
        "",
        "`import npuq` has the most used of these: `npuq.convert_checkpoint`, `npuq.load`.",
        "",
    ]
    for title, names in API.items():
        lines += [f"## {title}", ""]
        for name in names:
            lines += [f"::: npuq.{name}", ""]
    return "\n".join(lines)


def _messages() -> str:
    """Every message that the code raises with an error, by kind."""
    head = "As they stand in the code, by kind of error; … is what differs. What lies behind the frequent ones: "
    lines = ["# All error messages", "", f"{head}[troubleshooting](troubleshooting.md).", ""]
    for kind, entries in raised().items():
        lines += [f"## {kind}", ""]
        for text, path in entries:
            fence = "`` {} ``" if "`" in text else "`{}`"
            lines.append(f"- {fence.replace('{}', ' '.join(text.split()))} ({path})")
        lines.append("")
    return "\n".join(lines)
