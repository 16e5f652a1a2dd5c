"""Each rule of loading is one that `npuq verify --engine` names; the engines' part is in the checks."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_rig.models import write_artifact
from engine_rig.rules import RULES, break_rule

import npuq
from npuq.choices import ENGINES
from npuq.engines.placement import check_placement
from npuq.errors import NpuqError


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rules")
    return {name: write_artifact(name, folder) for name in {rule.of for rule in RULES.values()}}


def told(engine: str, directory: Path) -> str:
    problems = npuq.verify(directory).problems
    try:
        problems += check_placement(directory, engine, 1, False)
    except NpuqError as error:
        problems += (str(error),)
    return "\n".join(problems)


@pytest.mark.parametrize("key", RULES)
def test_broken_rule_is_told(artifacts, tmp_path, key):
    rule = RULES[key]
    broken = break_rule(rule, artifacts[rule.of], tmp_path / "broken")
    for engine in ENGINES:
        assert (rule.told in told(engine, broken)) == (engine in rule.by), told(engine, broken)


def test_no_rule_is_told_of_an_artifact_as_it_is(artifacts):
    for engine in ENGINES:
        for artifact in artifacts.values():
            assert told(engine, artifact) == ""
