"""The child process of `checking.py`: compiles the grammars of a JSON list from standard input, confined, and
prints the fault of each in a line.

It imports the standard library and llguidance only.
"""

from __future__ import annotations

import json
import sys


def main(arguments: list[str]) -> None:
    """arguments: seconds of CPU time, bytes of memory, and the folders of llguidance and of `confinement.py`."""
    sys.path.extend(arguments[2:])
    from confinement import confine  # type: ignore[import-not-found]  # this runs as a script of its own
    from llguidance import LLMatcher

    confine(int(arguments[1]), int(arguments[0]))
    for grammar in json.load(sys.stdin.buffer):
        print(json.dumps(LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(grammar))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
