"""The child process of `checking.py`: compiles one JSON schema from standard input, confined, and prints its fault.

It imports the standard library and llguidance only.
"""

from __future__ import annotations

import json
import resource
import sys


def main(arguments: list[str]) -> None:
    """arguments: seconds of CPU time, bytes of memory beyond those at the start, the folder of llguidance."""
    sys.path.append(arguments[2])
    from llguidance import LLMatcher

    _limit(int(arguments[0]), int(arguments[1]))
    schema = sys.stdin.buffer.read().decode()
    print(json.dumps(LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(schema))))


def _limit(seconds: int, memory: int) -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    for limit, most in (
        (resource.RLIMIT_AS, used + memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 3),
        (resource.RLIMIT_NPROC, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))


if __name__ == "__main__":
    main(sys.argv[1:])
