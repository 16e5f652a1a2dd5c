"""Checks that are the same for both engines: a class of tests, which each engine's file makes its own."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import pytest

from npuq.errors import ArtifactError

from . import parameter_lists, rotary
from .conformance import ConformanceError, compare, load
from .corruption import (
    corrupt,
    corruptions,
    mtp_corruptions,
    released_corruptions,
    released_mtp_corruptions,
    static_corruptions,
)
from .models import ARTIFACTS, CONFIGS, STATIC, V4, WITH_MTP
from .rules import LOADS, RULES, break_rule, ending

SEEN = (ConformanceError, ArtifactError, ValueError, KeyError, AssertionError, RuntimeError, NotImplementedError)


def _name(value: Any) -> str:
    return value if isinstance(value, str) else ""


class CommonChecks:
    """name: the engine, as `npuq verify --engine` has it. detected: how it calls an artifact's quantization."""

    name: str
    detected: str
    engine: ModuleType

    @pytest.mark.parametrize("key", RULES)
    def test_broken_rule(self, artifact, tmp_path, release, key):
        rule = RULES[key]
        broken = break_rule(rule, artifact(rule.of), tmp_path / "broken")
        end = ending(self.engine, broken, rule.mtp)
        assert re.search(rule.ends[release], end) if rule.ends[release] else end == LOADS, end

    @pytest.mark.parametrize("model", ARTIFACTS)
    def test_detection(self, artifact, model):
        assert self.engine.detect(artifact(model)) == self.detected

    @pytest.mark.parametrize(("what", "how"), static_corruptions(), ids=_name)
    def test_corruption_of_static_linears_is_seen(self, artifact, tmp_path, what, how):
        broken = corrupt(artifact("v3-static"), tmp_path / "broken", how)
        with pytest.raises(SEEN):
            compare(load(self.engine, broken, 1))

    @pytest.mark.parametrize(("what", "how"), mtp_corruptions(), ids=_name)
    def test_corruption_of_the_mtp_draft_is_seen(self, artifact, tmp_path, what, how):
        broken = corrupt(artifact("v3-mtp"), tmp_path / "broken", how)
        with pytest.raises(SEEN):
            compare(load(self.engine, broken, 1, mtp=True))

    @pytest.mark.parametrize(("what", "how"), corruptions(), ids=_name)
    def test_corruption_is_seen(self, artifact, tmp_path, what, how):
        broken = corrupt(artifact("v3-mtp"), tmp_path / "broken", how)
        with pytest.raises(SEEN):
            compare(load(self.engine, broken, 1))

    @pytest.mark.parametrize(
        ("what", "how", "mtp"),
        [(*case, False) for case in released_corruptions()] + [(*case, True) for case in released_mtp_corruptions()],
        ids=_name,
    )
    def test_corruption_of_deepseek_v4_is_seen(self, artifact, tmp_path, what, how, mtp):
        broken = corrupt(artifact(V4), tmp_path / "broken", how)
        with pytest.raises(SEEN):
            compare(load(self.engine, broken, 1, mtp=mtp))

    @pytest.mark.parametrize(
        ("model", "mtp"),
        # Kimi-K2 is of DeepSeek-V3's classes, GLM-5 of GLM-5.2's. There is no list of DeepSeek-V4's parameters.
        [(name, False) for name in (*CONFIGS, STATIC) if name not in ("kimi", "glm-5", V4)]
        + [(name, True) for name in WITH_MTP[1:] if name not in ("glm-5", V4)],
    )
    def test_the_list_of_needed_tensors(self, artifact, release, model, mtp):
        parameter_lists.check_needed(release, self.engine, artifact(model), mtp)

    @pytest.mark.parametrize("tensor", parameter_lists.SURPLUS)
    def test_tensors_without_a_parameter(self, artifact, tensor):
        parameter_lists.check_surplus(self.name, self.engine, artifact("v3-mtp"), tensor)

    @pytest.mark.parametrize("key", parameter_lists.VARIATIONS)
    def test_what_is_said_of_an_artifact_is_what_happens(self, artifact, release, tmp_path, key):
        parameter_lists.check_variation(release, self.engine, artifact, tmp_path / "varied", key)

    @pytest.mark.parametrize("model", ["v3-mtp", "glm-4.5"])
    @pytest.mark.parametrize("key", rotary.ROPES)
    def test_rotary_tables(self, artifact, tmp_path, key, model):
        rotary.check_rope(self.name, self.engine, artifact(model), tmp_path / "rope", key)
