"""Check that version, changelog and tag agree.

A version `X.Y.Z.devN` is unreleased, and so says the changelog's first heading. A version `X.Y.Z` has a date there, and
where HEAD has a tag, the tag is `vX.Y.Z`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def problems(root: Path, tags: list[str]) -> list[str]:
    """Contradictions between `__version__`, the first heading of CHANGELOG.md and the tags of HEAD."""
    found = re.search(r'^__version__ = "([^"]+)"$', (root / "__init__.py").read_text(), re.MULTILINE)
    heading = re.search(r"^## (\S+) \((.*)\)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    if found is None or heading is None:
        return ["__init__.py has no __version__, or CHANGELOG.md no heading `## X.Y.Z (…)`"]
    version, (described, state) = found[1], heading.groups()
    released, is_dev = re.subn(r"\.dev\d+$", "", version)
    result = []
    if described != released:
        result.append(f"__version__ is {version}, but CHANGELOG.md begins with {described}")
    if bool(is_dev) != (state == "unreleased"):
        result.append(f"__version__ is {version}, but CHANGELOG.md says ({state}) of it")
    result += [f"HEAD has the tag {tag}, but __version__ is {version}" for tag in tags if tag != f"v{version}"]
    return result


def main() -> None:
    """Print the problems; exit code 1 if there are any."""
    listed = subprocess.run(["git", "tag", "--points-at", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    found = problems(ROOT, [tag for tag in listed.stdout.split() if tag.startswith("v")])
    for problem in found:
        print(problem, file=sys.stderr)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
