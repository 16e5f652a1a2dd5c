"""Recipes: how they are read, which setting wins, and what no engine could load."""

from __future__ import annotations

from pathlib import Path

import pytest

from npuq.choices import RECIPES
from npuq.convert.plan.assignments import Assignment, check_recipe, resolve
from npuq.errors import RecipeError
from npuq.formats.checkpoint import Checkpoint
from npuq.formats.schemes import Scheme
from npuq.formats.sources.opening import open_weights
from npuq.models.config import ModelConfig
from npuq.models.inventory import take_inventory
from npuq.models.roles import Role
from npuq.quant.scales import Method
from npuq.recipes.reading import load_recipe


@pytest.fixture(scope="module")
def inventory(v3_source):
    with Checkpoint.open(v3_source) as checkpoint:
        return take_inventory(ModelConfig.from_dict(checkpoint.config), open_weights(checkpoint).weights)


@pytest.fixture
def assign(inventory, tmp_path):
    """Resolve a recipe given as YAML and apply the engines' rules."""

    def run(text: str) -> dict[str, Assignment]:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        recipe = load_recipe(path)
        assignments = resolve(recipe, inventory.specs, LAYERS)
        check_recipe(recipe, inventory.specs, assignments)
        return assignments

    return run


LAYERS = 3  # decoder layers of v3_source

EXPERTS = "{roles: [routed_expert, mtp_routed_expert], scheme: w8a8}"


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes_pass_their_own_rules_and_survive_being_stored(name, inventory, tmp_path):
    recipe = load_recipe(name)
    check_recipe(recipe, inventory.specs, resolve(recipe, inventory.specs, LAYERS))
    stored = tmp_path / "recipe.yaml"
    stored.write_text(recipe.to_yaml())
    assert load_recipe(stored) == recipe


def test_default_recipe(inventory):
    assignments = resolve(load_recipe("w4a8"), inventory.specs, LAYERS)
    schemes = {}
    for name, spec in inventory.specs.items():
        schemes.setdefault(spec.role, set()).add(assignments[name].scheme)
    eight = {Role.ATTENTION, Role.DENSE_MLP, Role.SHARED_EXPERT}
    eight |= {Role.MTP_ATTENTION, Role.MTP_SHARED_EXPERT, Role.MTP_ROUTED_EXPERT}
    for role, found in schemes.items():
        expected = Scheme.W4A8 if role is Role.ROUTED_EXPERT else Scheme.W8A8 if role in eight else Scheme.FLOAT
        assert found == {expected}, role
    assert {a.method for a in assignments.values()} == {Method.MSE}


def test_for_each_setting_the_first_rule_that_gives_it_wins(assign):
    found = assign(
        f"""
        name: mixed
        method: minmax
        rules:
          - {{layers: "1", roles: routed_expert, method: mse}}
          - {{layers: 2-5, roles: routed_expert, scheme: W4A8_DYNAMIC}}
          - {EXPERTS}
          - {{names: "*self_attn.o_proj*", scheme: w8a8, method: mse}}
          - {{layers: [0], scheme: float}}
        """
    )
    expert = "model.layers.{}.mlp.experts.0.up_proj.weight".format
    assert found[expert(1)] == Assignment(Scheme.W8A8, Method.MSE, 3)
    assert found[expert(2)] == Assignment(Scheme.W4A8, Method.MINMAX, 2)
    assert found["model.layers.2.self_attn.o_proj.weight"] == Assignment(Scheme.W8A8, Method.MSE, 4)
    assert found["model.layers.2.self_attn.q_b_proj.weight"] == Assignment(Scheme.FLOAT, Method.MINMAX, 0)


def test_layers_counted_from_either_end(assign, tmp_path):
    """As Huawei's recipes keep the first and last layers' experts in 8 bits; MTP layers are none of the last."""
    rules = "rules: [{layers: 'first 1, last 1', scheme: w8a8}, {roles: routed_expert, scheme: w4a8}, {scheme: w8a8}]"
    found = assign(rules)
    experts = {name: found[name].scheme for name in found if ".mlp.experts.0.up_proj." in name}
    assert {name.split(".")[2]: scheme for name, scheme in experts.items()} == {
        "1": Scheme.W4A8,
        "2": Scheme.W8A8,
        "3": Scheme.W8A8,
    }
    assert [found[name].rule for name in experts] == [2, 1, 3]
    path = tmp_path / "written.yaml"
    path.write_text(load_recipe(tmp_path / "mine.yaml").to_yaml())
    assert "layers: 0,last 1" in path.read_text()
    assert load_recipe(path).rules == load_recipe(tmp_path / "mine.yaml").rules


def test_a_rule_without_roles_or_names_speaks_of_linears_only(assign):
    found = assign("rules: [{scheme: w8a8}]")
    assert found["model.layers.0.input_layernorm.weight"].scheme is Scheme.FLOAT
    assert found["model.layers.0.self_attn.kv_b_proj.weight"].scheme is Scheme.FLOAT
    assert found["model.layers.0.self_attn.o_proj.weight"].scheme is Scheme.W8A8


@pytest.mark.parametrize(
    ("rules", "names"),
    [
        ("{roles: [dense_mlp], scheme: w4a8}", ["rule 1", "model.layers.0.mlp.", "W4A8_DYNAMIC"]),
        ("{roles: [mtp_routed_expert], scheme: w4a8}", ["rule 1", "model.layers.3.mlp.experts.0.", "W8A8_DYNAMIC"]),
        ("{roles: [kv_b], scheme: w8a8}", ["rule 1", "kv_b_proj", "must stay FLOAT"]),
        ("{roles: [router], scheme: w8a8}", ["rule 1", "mlp.gate.weight", "must stay FLOAT"]),
        ("{names: '*norm*', scheme: w8a8}", ["rule 1", "layernorm", "must stay FLOAT"]),
        ("{roles: [head], scheme: w8a8}", ["rule 1", "lm_head.weight", "must stay FLOAT"]),
        ("{roles: [embedding], scheme: w8a8}", ["rule 1", "embed_tokens", "must stay FLOAT"]),
        (
            "{names: ['*q_a_proj*'], scheme: w8a8}",
            ["no rule", "kv_a_proj_with_mqa", "q_a_proj and kv_a_proj_with_mqa"],
        ),
        (
            "{names: ['model.layers.0.mlp.up_proj*'], scheme: w8a8}",
            ["rule 1", "model.layers.0.mlp.up_proj.weight", "gate_proj and up_proj"],
        ),
        (
            "{names: ['*layers.1.mlp.experts.*.down_proj*'], scheme: w4a8}",
            ["down_proj", "all experts of a layer need one scheme"],
        ),
        (
            "{names: ['*layers.2.mlp.experts.3.*'], scheme: w4a8}",
            ["model.layers.2.mlp.experts.3.", "all experts of a layer need one scheme"],
        ),
    ],
)
def test_what_no_engine_could_load_is_refused_by_tensor_and_rule(assign, rules, names):
    with pytest.raises(RecipeError) as caught:
        assign(f"name: odd\nrules: [{rules}, {EXPERTS}]")
    message = str(caught.value)
    assert "\n" not in message and "'odd'" in message
    for name in names:
        assert name in message


def test_float_experts_are_for_our_own_runtime_only(assign):
    with pytest.raises(RecipeError, match=r"no rule.*FLOAT routed experts.*target: npuq"):
        assign("rules: [{roles: [attention], scheme: w8a8}]")
    assign("target: npuq\nrules: [{roles: [attention], scheme: w8a8}]")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rules: []\nmethood: mse", ["unknown key 'methood'", "did you mean 'method'?"]),
        ("rules: [{role: [attention], scheme: w8a8}]", ["rule 1", "unknown key 'role'", "'roles'"]),
        ("rules: [{roles: [routed_experts], scheme: w8a8}]", ["unknown role 'routed_experts'", "'routed_expert'"]),
        ("rules: [{scheme: W4A16}]", ["unknown scheme 'W4A16'", "did you mean 'W4A8'"]),
        ("rules: [{scheme: w8a8, method: gtpq}]", ["unknown method 'gtpq'", "did you mean 'gptq'"]),
        ("method: rotate+mes\nrules: []", ["unknown method 'mes'", "did you mean 'mse'"]),
        ("method: magic\nrules: []", ["unknown method 'magic'", "minmax, mse, gptq, rotate, smooth, auto"]),
        ("method: gptq+rotate\nrules: []", ["'gptq' can only be the last"]),
        ("method: rotate+auto\nrules: []", ["'auto' is a whole chain"]),
        ("rules: [{scheme: w8a8, method: rotate}]", ["unknown method 'rotate'", "minmax, mse, gptq"]),
        ("target: engine\nrules: []", ["unknown target 'engine'", "'engines'"]),
        ("rules: [{layers: 7-3, scheme: w8a8}]", ["rule 1", "7-3", "0-3,7"]),
        ("rules: [{layers: all, scheme: w8a8}]", ["rule 1", "'all'", "0-3,7"]),
        ("rules: [{layers: last 0, scheme: w8a8}]", ["rule 1", "'last 0'", "last 7"]),
        ("rules: [{roles: [attention]}]", ["rule 1", "neither a scheme nor a method"]),
        ("rules: {scheme: w8a8}", ["'rules' must be a list"]),
        ("rules: [w8a8]", ["rule 1", "a rule is a mapping"]),
        ("[1, 2]", ["a recipe is a mapping"]),
        ("rules: [", ["not valid YAML"]),
        ("name: [a]\nrules: []", ["'name' must be"]),
        ("rules: [{names: 3, scheme: w8a8}]", ["'names' must be text"]),
    ],
)
def test_malformed_recipes_name_the_file_and_the_nearest_valid_word(tmp_path, text, said):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    for words in said:
        assert words in message


def test_unknown_names_and_files():
    with pytest.raises(RecipeError, match="no recipe named 'w4a9'; did you mean 'w4a8'"):
        load_recipe("w4a9")
    with pytest.raises(RecipeError, match=r"no/such\.yaml: no such recipe file"):
        load_recipe(Path("no/such.yaml"))


def test_method_replaces_the_recipes_own():
    assert load_recipe("w4a8", "minmax").method is Method.MINMAX
    with pytest.raises(RecipeError, match="unknown method 'mseq'; did you mean 'mse'"):
        load_recipe("w4a8", "mseq")
