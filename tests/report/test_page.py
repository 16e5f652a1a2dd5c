"""The page: complete, escaped, alone in the world, and written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_support import CALIBRATION, EVALUATION, edit_json

from npuq.errors import ReportError
from npuq.report import Facts, read_facts, write_report
from npuq.report.coverage_figure import _ticks
from npuq.report.figures import figures
from npuq.report.page import render
from npuq.report.summary import largest_errors, tiles, unreached

Run = Callable[..., tuple[int, str, str]]

SECTIONS = [
    "evaluation",
    "layers",
    "experts",
    "linears",
    "largest",
    "coverage",
    "smoothing",
    "cache",
    "sizes",
    "scales",
    "provenance",
]


class Page(HTMLParser):
    """What a page holds: section ids, what it would load, and its text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.anchors: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self._inside = tag
        if tag == "section":
            self.sections.append(values["id"] or "")
        if tag == "a":
            self.anchors.append(values["href"] or "")
        self.loads += [value for name in ("src", "srcset", "action") if (value := values.get(name)) is not None]
        if tag == "link":
            self.loads.append(values["href"] or "")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data


@pytest.fixture
def facts(calibrated: Path) -> Facts:
    return read_facts(calibrated)


def plain_page(facts: Facts) -> Page:
    return Page(render(facts))


# ---- what is on it ---------------------------------------------------------------------------------------------------


def test_every_section_and_a_link_to_each(facts: Facts) -> None:
    page = plain_page(facts)
    assert page.sections == SECTIONS
    assert page.anchors == [f"#{name}" for name in SECTIONS]
    text = " ".join(page.text.split())
    for piece in (
        "tiny-w4a8",
        "66.500",
        "0.00131",
        "97.70 %",
        "mse" if facts.recipe is None else "scheme: W4A8_DYNAMIC",
    ):
        assert piece in text, piece
    assert "calibration.txt: 1,024 tokens in 8 samples of 128" in text
    assert "cd" * 32 in render(facts)
    assert "against the transformed weights" in text


def test_only_what_is_known(artifact: Path) -> None:
    page = plain_page(read_facts(artifact))
    assert page.sections == [
        name for name in SECTIONS if name not in ("evaluation", "layers", "coverage", "smoothing", "cache")
    ]


def test_a_foreign_artifact(foreign: Path) -> None:
    page = plain_page(read_facts(foreign))
    assert page.sections == ["sizes", "scales", "provenance"]
    assert "not made by npuq" in page.text


def test_it_loads_nothing(facts: Facts) -> None:
    content = render(facts)
    page = Page(content)
    assert page.loads == []
    assert not set(page.tags) & {"link", "iframe", "img", "object", "embed", "base", "form"}
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', content)
    assert policy is not None
    assert policy[1].startswith("default-src 'none';")
    assert "http" not in policy[1]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_draws_it(facts: Facts, tmp_path: Path) -> None:
    """Chromium, with no name resolved, runs plotly under the page's own policy and draws every figure."""
    page = write_report(facts, tmp_path / "report.html")
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=20000", "--enable-logging=stderr"]
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=300)
    drawn = re.findall(r'id="figure-(\d+)" class="plotly-graph-div js-plotly-plot"', done.stdout)
    assert sorted(map(int, drawn)) == list(range(len(figures(facts))))
    assert "CONSOLE" not in done.stderr


def test_names_are_text(calibrated: Path) -> None:
    evil = calibrated.rename(calibrated.parent / "<script>alert(1)<")
    edit_json(
        evil / "npuq/manifest.json",
        lambda manifest: (
            manifest["source"].update(name="</code><img src=x>"),
            manifest["calibration"].update(name="</script><script>alert(2)</script>"),
        ),
    )
    content = render(read_facts(evil))
    page = Page(content)
    assert page.tags.count("script") == plain_page(read_facts(evil)).tags.count("script")
    assert "img" not in page.tags
    assert "<script>alert" not in content
    assert "</code><img" not in content
    assert "</script><script>alert" not in content
    assert "wiki & <b>more</b>.txt" in page.text
    assert "<b>more" not in content  # in the figures' legends neither


# ---- its numbers -----------------------------------------------------------------------------------------------------


def heat(figure: Any) -> tuple[list[Any], list[str], list[list[float | None]]]:
    trace = figure.data[0]
    return list(trace.x), list(trace.y), [list(row) for row in trace.z]


def test_the_figure_of_experts(facts: Facts, calibrated: Path) -> None:
    entries = json.loads((calibrated / "npuq/manifest.json").read_text())["linears"]
    made = figures(facts)
    assert [name for name in made if name.startswith("experts")] == [
        "experts W4A8, output error",
        "experts W4A8, weight error",
        "experts W8A8, weight error",  # the MTP layer's, which nothing calibrated
    ]
    for name, layers, key in (
        ("experts W4A8, output error", [1, 2, 3], "output_error"),
        ("experts W4A8, weight error", [1, 2, 3], "relative_error"),
        ("experts W8A8, weight error", [4], "relative_error"),
    ):
        experts, rows, values = heat(made[name])
        assert (experts, rows) == (list(range(16)), [str(layer) for layer in layers])
        for layer, row in zip(layers, values, strict=True):
            for expert, value in zip(experts, row, strict=True):
                prefix = f"model.layers.{layer}.mlp.experts.{expert}"
                parts = [entries[f"{prefix}.{part}_proj.weight"].get(key) for part in ("gate", "up", "down")]
                if (layer, expert, key) == (2, 3, "output_error"):
                    assert (value, parts) == (None, [None] * 3)
                else:
                    assert value == pytest.approx(math.hypot(*parts) / math.sqrt(3))


def test_the_figure_of_other_linears(facts: Facts, calibrated: Path) -> None:
    entries = json.loads((calibrated / "npuq/manifest.json").read_text())["linears"]
    for measure, key in (("output error", "output_error"), ("weight error", "relative_error")):
        projections, rows, values = heat(figures(facts)[f"linears W8A8, {measure}"])
        assert rows == ["0", "1", "2", "3", "4"]
        column = projections.index("shared down_proj")
        assert [row[column] for row in values] == [
            None,
            *(entries[f"model.layers.{i}.mlp.shared_experts.down_proj.weight"].get(key) for i in range(1, 5)),
        ]


def test_the_figure_of_smoothing(facts: Facts) -> None:
    assert heat(figures(facts)["smoothing"]) == (
        ["input_layernorm", "experts.down_proj"],
        ["0", "2"],
        [[0.5, None], [0.25, 0.0]],
    )


def test_the_figure_of_the_cache(facts: Facts) -> None:
    (line,) = figures(facts)["cache"].data
    assert (list(line.x), list(line.y)) == ([0, 10], [0.006, 0.007])


def test_the_figure_of_coverage(facts: Facts) -> None:
    figure = figures(facts)["coverage"]
    experts, rows, values = heat(figure)
    assert (len(experts), rows) == (16, ["1", "2", "10"])  # layer 0 is dense
    assert values[1][:4] == [2.0, 3.0, pytest.approx(math.log10(128)), None]
    marks = {trace.name: list(zip(trace.y, trace.x, strict=True)) for trace in figure.data[1:]}
    assert marks == {"blended (2)": [("2", 0), ("10", 0)], "data-free (1)": [("2", 3)]}


def test_the_figure_of_layers(facts: Facts) -> None:
    lines = {trace.name: (list(trace.x), list(trace.y)) for trace in figures(facts)["layers"].data}
    assert lines == {
        "on the calibration set": ([0, 1, 2, 10], [0.011, 0.021, 0.031, 0.041]),
        "accumulated, on wiki &amp; &lt;b&gt;more&lt;/b&gt;.txt, context 256": ([0, 1], [0.01, 0.03]),
        "of the layer alone, on wiki &amp; &lt;b&gt;more&lt;/b&gt;.txt, context 256": ([0, 1], [0.01, 0.02]),
    }


def test_errors_of_layers_know_no_kv_cache(calibrated: Path) -> None:
    before = [trace.name for trace in figures(read_facts(calibrated))["layers"].data]
    int8 = {**EVALUATION, "kv_cache_dtype": "int8"}
    edit_json(calibrated / "npuq/manifest.json", lambda manifest: manifest["evaluations"].append(int8))
    facts = read_facts(calibrated)
    assert [trace.name for trace in figures(facts)["layers"].data] == before
    assert "more</b>.txt (int8 KV cache), context 256" in " ".join(tile.remark for tile in tiles(facts))


def test_the_figure_of_sizes(facts: Facts) -> None:
    after, before = figures(facts)["sizes"].data
    assert sum(after.customdata) == facts.output_bytes
    assert sum(before.customdata) == facts.source_bytes
    assert after.y[-1] == "routed_expert (W4A8)"
    assert after.y[0].endswith(" smaller ones")


def test_the_figure_of_scales(facts: Facts) -> None:
    for trace in figures(facts)["scales"].data:
        assert sum(trace.y) == pytest.approx(1.0)


def test_tiles_and_lists(facts: Facts, made_artifact: Path) -> None:
    outputs = [x.output_error for x in facts.linears if x.role == "routed_expert" and x.output_error is not None]
    assert len(outputs) == 3 * (3 * 16 - 1)
    assert [(tile.title, tile.value) for tile in tiles(facts)] == [
        ("Size", "22.7 MB"),
        ("Output error", f"{math.hypot(*outputs) / math.sqrt(len(outputs)):.2%}"),
        ("Perplexity", "66.500"),
        ("KL to the source", "0.0013"),
        ("Calibration", "1,024 tokens"),
    ]
    plain = tiles(read_facts(made_artifact))
    assert (plain[1].title, plain[1].value) == ("Weight error", f"{facts.roles[0].relative_error:.2%}")
    assert len(plain) == 2
    assert tiles(facts)[2].remark.startswith("+0.76% from the source's")
    assert tiles(facts)[4].remark == "3 experts reached too little"
    largest = largest_errors(facts.linears)
    assert [linear.scheme for linear in largest] == ["W4A8_DYNAMIC"] * 5 + ["W8A8_DYNAMIC"] * 5
    assert largest[0].relative_error == max(linear.relative_error or 0 for linear in facts.linears)
    assert facts.coverage is not None
    assert unreached(facts.coverage) == [(2, "blended", [0]), (2, "data-free", [3]), (10, "blended", [0])]


def test_calibration_that_reached_no_expert(calibrated: Path) -> None:
    """A model whose calibrated layers are dense, and one whose experts all got nothing."""
    empty = {**CALIBRATION, "layers": {"0": CALIBRATION["layers"]["0"]}}
    edit_json(calibrated / "npuq/manifest.json", lambda manifest: manifest.update(calibration=empty))
    facts = read_facts(calibrated)
    assert "coverage" not in figures(facts)
    assert "coverage" in plain_page(facts).sections
    nothing = {"expert_tokens": [0, 0], "fallbacks": {"0": "data-free", "1": "data-free"}, "output_error": 0.1}
    edit_json(calibrated / "npuq/manifest.json", lambda manifest: manifest["calibration"].update(layers={"1": nothing}))
    assert heat(figures(read_facts(calibrated))["coverage"])[2] == [[None, None]]


@given(st.integers(1, 10**7), st.integers(0, 10**7))
def test_ticks(low: int, more: int) -> None:
    ticks = _ticks(low, low + more)
    assert ticks[0] <= low
    assert low + more <= ticks[-1]
    assert 2 <= len(ticks) <= 9
    assert ticks == sorted({*ticks})


# ---- writing it ------------------------------------------------------------------------------------------------------


def test_an_older_report_is_replaced_whole(facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "report.html"
    write_report(facts, page)
    before = page.read_bytes()
    page.write_bytes(before + b"<!-- older -->")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ReportError, match=r"report\.html: cannot be written: No space left on device"):
            write_report(facts, page)
    assert page.read_bytes() == before + b"<!-- older -->"
    assert [path.name for path in tmp_path.glob("*report*")] == ["report.html"]
    write_report(facts, page)
    assert page.read_bytes() == before
    assert [path.name for path in tmp_path.glob("*report*")] == ["report.html"]


def test_what_is_no_report_stays(facts: Facts, tmp_path: Path) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("<!doctype html><p>mine")
    with pytest.raises(ReportError, match="is no report of npuq's"):
        write_report(facts, mine)
    assert mine.read_text() == "<!doctype html><p>mine"
    for other in (tmp_path, Path("/dev/null")):
        with pytest.raises(ReportError, match="is a directory or a device"):
            write_report(facts, other)
    with pytest.raises(ReportError, match="no such directory"):
        write_report(facts, tmp_path / "nowhere/report.html")


def test_without_plotly(facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.io", None)
    with pytest.raises(ReportError, match=r"pip install 'npuq\[report\]'"):
        write_report(facts, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_the_command(run: Run, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("report", calibrated) == (0, "report.html\n", "")
    assert Page(Path("report.html").read_text(encoding="utf-8")).sections == SECTIONS
    assert run("report", calibrated, "-o", "other.html", "--quiet") == (0, "", "")
    assert Path("other.html").read_bytes() == Path("report.html").read_bytes()


def test_json_needs_no_plotly_and_writes_nothing(
    run: Run, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.io", None)
    monkeypatch.chdir(tmp_path)
    code, out, err = run("report", calibrated, "--json")
    assert (code, err, list(tmp_path.glob("*.html"))) == (0, "", [])
    values = json.loads(out)
    assert values["evaluations"] == [EVALUATION]
    assert values["coverage"]["layers"][1]["expert_tokens"] == [128] * 16
    assert len(values["linears"]) == len(read_facts(calibrated).linears)


def test_bad_input_is_one_line(run: Run, calibrated: Path, example_fp8: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    for arguments in ((example_fp8, "-o", tmp_path / "a.html"), (calibrated, "-o", mine), (calibrated, "-o", tmp_path)):
        code, out, err = run("report", *arguments)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert err.startswith("npuq: error: ")
    assert not (tmp_path / "a.html").exists()
