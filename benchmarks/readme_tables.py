"""Write the tables of benchmarks/README.md from the JSON of `bash benchmarks/all.sh`.

    python benchmarks/readme_tables.py build/benchmarks.json            write them
    python benchmarks/readme_tables.py build/benchmarks.json --print    print them

A table stands between `<!-- begin of the table: NAME -->` and `<!-- end of the table -->`. NAME is a table of
this script, or one with `avx2` or `avx512` behind it, which only machines of that level fill. A table whose benchmarks
the record lacks, or whose benchmark failed, stays as it is.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import marked_tables
from measure.machine import in_words
from measure.rounds import with_spread

PAGE = Path(__file__).resolve().parent / "README.md"
LEVELS = ("avx2", "avx512")
Result = Mapping[str, Any]
Lines = Iterator[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--print", action="store_true", help="print the tables, of a smoke run too")
    options = parser.parse_args()
    record = json.loads(options.record.read_text(encoding="utf-8"))
    if options.print:
        for name in TABLES:
            if (table := text(name, record)) is not None:
                print(f"{name}\n\n{table}")
        return
    if failed := write(record):
        raise SystemExit("\n".join(failed))


def write(record: Result) -> list[str]:
    """Write a record's tables into the page; returns a line for each that could not be made. Raises SystemExit for a
    smoke run's."""
    if record["quick"]:
        raise SystemExit("a record of --quick is a smoke run: its figures say nothing, README.md stays as it is")
    page = PAGE.read_text(encoding="utf-8")
    page, failed = with_tables(page, record)
    PAGE.write_text(page, encoding="utf-8")
    return failed


def with_tables(page: str, record: Result) -> tuple[str, list[str]]:
    """The page with the tables of a record, and a line for each that its benchmark's JSON has not all of: it stays as
    it is. Raises ValueError for a marker that names no table."""
    failed = []
    level = (record["machine"]["levels"] or [""])[-1]
    for marker in marked_tables.names(page):
        name, wanted = parsed(marker)
        try:
            table = text(name, record) if level.startswith(wanted) else None
        except (KeyError, IndexError, TypeError) as error:
            failed.append(f"table {marker}: {error!r}")
            continue
        if table is not None:
            page = marked_tables.with_table(page, marker, table)
    return page, failed


def parsed(marker: str) -> tuple[str, str]:
    """A marker's table, and the level that it is kept for ("" for any). Raises ValueError for other markers."""
    name, _, level = marker.partition(" ")
    if name not in TABLES or level not in ("", *LEVELS):
        raise ValueError(f"no table {marker!r}: tables are {', '.join(TABLES)}, alone or with {' or '.join(LEVELS)}")
    return name, level


def text(name: str, record: Result) -> str | None:
    """A table with its caption; None if the record lacks a benchmark of it."""
    table = TABLES[name]
    found = [record["benchmarks"].get(each, {}) for each in table.benchmarks]
    if not all("result" in each for each in found):
        return None
    commands = ", ".join(f"`{_command(each['command'])}`" for each in found)
    met = {name: max(each[name] for each in found) for name in ("load", "read_bytes_per_s")}
    wall, cpu = (sum(each[name] for each in found) for name in ("wall_s", "cpu_s"))
    machine = in_words({**record["machine"], **met})
    caption = f"{commands}: {machine}. The run took {wall:,.0f} s, {cpu:,.0f} CPU seconds. {table.says}"
    lines = textwrap.wrap(caption, 125, break_long_words=False, break_on_hyphens=False)
    return "\n".join([*lines, "", *table.lines(*(each["result"] for each in found))]) + "\n"


def _command(text: str) -> str:
    """The command as one calls it for a table, without the places of the peers' Pythons."""
    return re.sub(r"(--llama-cpp|--llm-compressor) \S+", r"\1 …", text.removesuffix(" --json"))


def head(*columns: str) -> Lines:
    """The first two lines of a table: the first column is text, the others are numbers."""
    yield f"| {' | '.join(columns)} |"
    yield f"|---|{'---:|' * (len(columns) - 1)}"


def row(*columns: str) -> str:
    return f"| {' | '.join(columns)} |"


def kernels(found: Result) -> Lines:
    levels = list(dict.fromkeys(each["level"] for each in found["rows"]))
    limits = ", ".join(
        f"{title} {with_spread(found['limits'], name, 1, 1e-9)}"
        for name, title in (("read", "read"), ("copy", "copy"), ("int8", "torch int8"), ("floats", "torch float32"))
    )
    yield from head("kernel", *levels, "of the limit, at the last level")
    for what in dict.fromkeys(each["what"] for each in found["rows"]):
        same = {each["level"]: each for each in found["rows"] if each["what"] == what}
        last = same[levels[-1]]
        figures = [f"{same[level]['medians']['value']:,.1f}" if level in same else "" for level in levels]
        yield row(f"{what}, {last['unit']}", *figures, f"{with_spread(last, 'ratio')} of {last['limit']}")
    yield row(f"limits, G/s: {limits}", *[""] * (len(levels) + 1))


def runtime(found: Result) -> Lines:
    """Prefill, decode and a batch, beside the peers."""
    batch = bool(found["batch"])
    several = f"{found['batch']} sequences"

    def line(*columns: str) -> str:
        return row(*columns[: 4 if batch else 3])

    def shown(name: str, digits: int = 2, scale: float = 1.0) -> str:
        return with_spread(found, name, digits, scale)

    yield from head(*("", f"prefill of {found['prompt']}", "decode", several)[: 4 if batch else 3])
    many = f"{shown('npuq batch', 1)}, {shown('batch gain')} × one" if batch else ""
    yield line("npuq, tokens/s", shown("npuq prefill", 1), shown("npuq decode"), many)
    limits = f"{shown('of int8')} of torch int8", f"{shown('of bandwidth')} of read bandwidth"
    yield line("of the limit", *limits, "")
    processor = [shown(f"npuq {what} CPU ms", 2) for what in ("prefill", "decode", *(["batch"] if batch else []))]
    yield line("CPU ms of a token, of a step", *processor, "")
    for name in found["peers"]:
        peer = [f"{shown(f'{name} {what}')}, npuq {shown(f'{name} {what} ratio')} ×" for what in ("prefill", "decode")]
        yield line(f"{name}, tokens/s", *peer, "")


def context(found: Result) -> Lines:
    peers = [f"{name} {what}" for name in found["peers"] for what in ("prefill", "decode")]
    yield from head("context", "prefill", "decode", "CPU ms of a step", *peers)
    for length, each in found["contexts"].items():
        ratios = [f"{with_spread(each, name)}, npuq {with_spread(each, f'{name} ratio')} ×" for name in peers]
        figures = with_spread(each, "npuq prefill", 1), with_spread(each, "npuq decode")
        yield row(f"{int(length):,}", *figures, with_spread(each, "npuq decode CPU ms", 1), *ratios)


def convert(found: Result) -> Lines:
    columns = "source GB/s", "copy GB/s", "of copy", "CPU s/GB", "copy's", "anonymous memory"
    yield from head("directory, method", *columns)
    for each in found["rows"]:
        yield row(
            f"{each['directory']}, {each['method']}",
            _between(each["source_bytes_per_s"] / 1e9, [rate / 1e9 for rate in each["source_bytes_per_s_spread"]], 3),
            f"{each['copy_bytes_per_s'] / 1e9:.3f}",
            _between(each["of_copy"], each["of_copy_spread"], 2),
            f"{each['cpu_s_per_gb']:.2f}",
            f"{each['copy_cpu_s_per_gb']:.2f}",
            f"{each['peak_anonymous_bytes'] / 1e6:,.0f} MB",
        )


def _between(value: float, spread: list[float], digits: int) -> str:
    return f"{value:.{digits}f} ({min(spread):.{digits}f} to {max(spread):.{digits}f})"


def calibrate(found: Result) -> Lines:
    def errors(each: Result) -> str:
        return ", ".join(f"{error:.2e}" for error in each["squared_error"].values())

    yield from head("", "CPU seconds", "squared output error of gate, up, down")
    if "expert" in found:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in found["expert"]["parts"].items())
        yield row("an expert, `gptq`", f"{found['expert']['cpu_s']:.1f} ({parts})", errors(found["expert"]))
    if "llm_compressor" in found:
        peer = found["llm_compressor"]
        yield row(f"llm-compressor {peer['version']}'s GPTQ, no forward passes", f"{peer['cpu_s']:.1f}", errors(peer))
    for each in found.get("linears", []):
        yield row(f"{each['linear'].replace('|', ', ')} of a layer", f"{each['cpu_s']:.1f}", "")
    if "whole_v3" in found:
        hours = sum(found["whole_v3"].values()) / 3600
        yield row("a whole V3 by that, without attention's scores and reading", f"{hours:.0f} hours", "")


def sampling(found: Result) -> Lines:
    yield from head("rows, request", "native ms", "CPU ms", "% of DeepSeek-V3's step", "numpy ms", "numpy of native")
    for each in found["requests"]:
        request = ", ".join(f"{name} {value:g}" for name, value in each["request"].items())
        columns = "native ms", "native CPU ms", "% of V3's step", "numpy ms", "numpy of native"
        yield row(f"{each['rows']}, {request}", *(with_spread(each, name) for name in columns))


def attention(found: Result) -> Lines:
    yield from head("operator", "GMAC/s", "GB/s", "of torch's bf16", "of torch's int8")
    for each in found["operators"]:
        rates = with_spread(each, "rate", 0, 1e-9), with_spread(each, "bytes", 1, 1e-9)
        yield row(each["name"], *rates, with_spread(each, "of bf16"), with_spread(each, "of int8"))


def ranks(found: Result) -> Lines:
    settings = found["settings"]
    names = [name if name == "one process" else f"`{name}`" for name in settings]
    yield from head("", *names)
    kinds = {"prefill": "prefill of 512", "decode": "decode", "batch": "16 sequences", "processor": "CPU ms of rank 0"}
    for kind, title in kinds.items():
        first, *others = settings.values()
        ratios = [f"{with_spread(each, kind, 1)}; {with_spread(each, f'{kind} ratio')} ×" for each in others]
        yield row(title, with_spread(first, kind, 1), *ratios)


def sparse_attention(*found: Result) -> Lines:
    models = [{"v32": "V3.2", "glm": "GLM-5"}[each["model"]] for each in found]
    columns = [f"{name} {kind}" for name in models for kind in ("dense", "full", "shared")]
    yield from head("context", *columns)
    for length in found[0]["contexts"]:
        figures = []
        for each in (one["contexts"][length] for one in found):
            figures.append(f"{with_spread(each, 'dense ms', 1)} ms")
            figures += [
                f"{each['medians'][f'{kind} ms']:.1f}; {with_spread(each, f'{kind} speedup')} ×"
                for kind in ("full", "shared")
            ]
        yield row(f"{int(length):,}", *figures)


def serve(found: Result) -> Lines:
    yield from head("", "tokens/s", "first token, ms", "first token of the last client, ms")
    names = [name.removesuffix(" tokens/s") for name in found["medians"] if name.endswith(" tokens/s")]
    for name in names:
        times = (with_spread(found, f"{name} {what}", 0, 1e3) for what in ("first", "last first"))
        whole = found["medians"][f"{name} whole"]
        left = "" if whole == 1 else f", {1 - whole:.0%} of them without an answer in time"
        yield row(f"{name} clients{left}", with_spread(found, f"{name} tokens/s", 1), *times)
    library = with_spread(found, "library", 1), with_spread(found, "of the library")
    yield row("`generate`, 16 prompts", library[0], f"the server has {library[1]} of it", "")
    if "second of first" in found["medians"]:
        turns = [with_spread(found, f"{turn} turn", 0, 1e3) for turn in ("first", "second")]
        part = with_spread(found, "second of first", 3)
        tokens = found["medians"]["turn tokens"]
        yield row(f"a conversation of {tokens:,.0f} tokens, first turn", "", turns[0], "")
        yield row("its second turn", "", turns[1], f"{part} of the first")


def first_token(found: Result) -> Lines:
    yield from head("", "seconds", "beyond torch", "CPU seconds until the end")
    for name in found["medians"]:
        if f"{name}, beyond torch" in found["medians"]:
            columns = name, f"{name}, beyond torch", f"{name}, CPU"
            yield row(name, *(with_spread(found, column, 3) for column in columns))


@dataclass(frozen=True)
class Table:
    """A table of the page: the benchmarks behind it, its lines from their results, its caption's end."""

    benchmarks: tuple[str, ...]
    lines: Callable[..., Lines]
    says: str = "Medians of the rounds, least and greatest in brackets."


TABLES: dict[str, Table] = {
    "kernels": Table(("kernels",), kernels),
    "runtime": Table(("runtime",), runtime),
    "runtime-qwen3": Table(("runtime-qwen3",), runtime),
    "context": Table(("context",), context, "Tokens/s; medians of the rounds, least and greatest in brackets."),
    "context-32k": Table(("context-32k",), context, "Tokens/s; one round."),
    "convert": Table(("convert",), convert),
    "calibrate": Table(("calibrate",), calibrate, "One run; linears scaled from some rows and tokens to all."),
    "attention": Table(("attention",), attention),
    "sampling": Table(("sampling",), sampling),
    "ranks": Table(("ranks",), ranks, "Tokens/s; ratios to one process, for the processor those of all ranks."),
    "sparse-attention": Table(("sparse-attention-v32", "sparse-attention-glm"), sparse_attention),
    "serve": Table(("serve",), serve),
    "serve-random": Table(("serve-random",), serve),
    "first-token": Table(("first-token",), first_token),
}


if __name__ == "__main__":
    main()
