"""The description that engines read, and the edits to config.json."""

import json
from pathlib import Path

import pytest

from npuq.errors import ArtifactError
from npuq.formats.artifact import DESCRIPTION_NAME, artifact_config, description, read_description, shard_name
from npuq.formats.schemes import Scheme

TYPES = {"a.weight": Scheme.W4A8, "a.scale_bias": Scheme.W4A8, "b.weight": Scheme.W8A8, "c.weight": Scheme.FLOAT}


def test_description_has_every_tensor_and_the_keys_engines_ask_for(tmp_path: Path) -> None:
    written = description(TYPES)
    assert written["ascend_quant_method"] == "ascend"
    assert written["group_size"] == 0
    assert written["model_quant_type"] == "W8A8_DYNAMIC"
    assert written["a.scale_bias"] == "W4A8_DYNAMIC"
    (tmp_path / DESCRIPTION_NAME).write_text(json.dumps(written))
    assert read_description(tmp_path) == TYPES


def test_a_directory_without_description_is_a_float_checkpoint(tmp_path: Path) -> None:
    assert read_description(tmp_path) is None


@pytest.mark.parametrize(("text", "message"), [("[]", "not a JSON object"), ('{"a.b": "W2"}', "unknown type 'W2'")])
def test_broken_descriptions_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / DESCRIPTION_NAME).write_text(text)
    with pytest.raises(ArtifactError, match=message):
        read_description(tmp_path)


def test_config_keeps_its_keys_and_loses_quantization_config_everywhere() -> None:
    source = {"a": 1, "quantization_config": {}, "text_config": {"b": 2, "quantization_config": {}}, "quantize": "old"}
    result = artifact_config(source, linear=Scheme.W8A8, experts=Scheme.W4A8, mtp_experts=Scheme.W8A8)
    assert result == {
        "a": 1,
        "text_config": {"b": 2},
        "quantize": "w8a8_dynamic",
        "moe_quantize": "w4a8_dynamic",
        "mtp_quantize": "w8a8_dynamic",
    }
    assert "quantization_config" in source["text_config"]
    plain = artifact_config(source, linear=Scheme.FLOAT, experts=Scheme.FLOAT, mtp_experts=None)
    assert plain == {"a": 1, "text_config": {"b": 2}}


def test_shard_names_are_those_of_hugging_face() -> None:
    assert shard_name(3, 12) == "model-00003-of-00012.safetensors"
