"""Options and examples of all commands: one name, one meaning, and a help that says it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import click
import pytest

from npuq.choices import METHODS, RECIPES
from npuq.cli.examples import EXAMPLES
from npuq.cli.main import COMMANDS, group
from npuq.cli.options.loading import LOADING
from npuq.recipes.reading import load_recipe

# What an option is besides its name may differ here, and why.
DIFFER = {
    "--device": "convert names a kind of accelerator, the others the place of an NPU",
    "--revision": "push makes branches alone",
    "--recipe": "convert has no default where a source is quantized already",
}


def commands() -> Iterator[tuple[str, click.Command]]:
    for name in COMMANDS:
        command = group.get_command(click.Context(group), name)
        assert command is not None
        yield name, command


def options() -> dict[str, dict[str, click.Option]]:
    """Option name → command → option."""
    found: dict[str, dict[str, click.Option]] = {}
    for name, command in commands():
        for option in command.params:
            if isinstance(option, click.Option):
                for word in (*option.opts, *option.secondary_opts):
                    found.setdefault(word, {})[name] = option
    return found


def test_an_option_of_several_commands_is_one_option() -> None:
    """The same name in the code, kind of value, placeholder, and whether it may be repeated."""
    unlike = {}
    for word, uses in options().items():
        kinds = {
            (option.name, type(option.type).__name__, option.metavar, option.is_flag, option.multiple)
            for option in uses.values()
        }
        choices = {tuple(option.type.choices) for option in uses.values() if isinstance(option.type, click.Choice)}
        if (len(kinds) > 1 or len(choices) > 1) and word not in DIFFER:
            unlike[word] = kinds | choices
    assert unlike == {}
    assert all(len(options()[word]) > 1 for word in DIFFER)


def test_one_thing_has_one_name() -> None:
    """A parameter of the code that several commands have is one option in all of them."""
    named: dict[str, set[str]] = {}
    for word, uses in options().items():
        for option in uses.values():
            assert option.name is not None
            named.setdefault(option.name, set()).add(word)
    assert {name: words for name, words in named.items() if len(words) > 1} == {
        "output": {"-o", "--output"},
        "private": {"--private", "--public"},
    }


def test_options_are_words_with_dashes() -> None:
    for word in options():
        assert re.fullmatch(r"--[a-z]+(-[a-z]+)*|-[a-z]", word), word


def test_every_option_says_what_it_does() -> None:
    """A sentence, and the default behind it in brackets as click writes it."""
    for word, uses in options().items():
        for name, option in uses.items():
            assert option.help, (name, word)
            assert re.search(r"\.( \[default: [^]]+\])?$", option.help), (name, word, option.help)
            assert option.help.count("default:") == option.help.count("[default:"), (name, word)


def test_commands_of_one_kind_have_the_options_of_that_kind() -> None:
    found = {name: {option.name for option in command.params} for name, command in commands()}
    for name in ("generate", "serve", "chat"):
        assert set(LOADING) <= found[name]
    # Those that fetch a repository, or read all of a model.
    for name in ("convert", "verify", "inspect", "push", "pull", "evaluate", "report"):
        assert {"progress", "quiet"} <= found[name], name
    assert all("as_json" in names for names in found.values())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_examples_that_fit_and_parse(name: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = dict(commands())[name]
    text = command.get_help(click.Context(command, info_name=name, terminal_width=80))
    shown = text.split("\n  Examples:\n")[1]
    assert re.findall(r"^    \$ (.*)$", shown, re.MULTILINE) == list(EXAMPLES[name])
    assert max(map(len, shown.splitlines())) <= 110
    monkeypatch.chdir(tmp_path)
    for file in ("text.jsonl", "prompts.jsonl", "eval.txt", "keys.txt", "questions.txt"):
        (tmp_path / file).touch()
    for line in EXAMPLES[name]:
        words = shlex.split(line.partition(" < ")[0])
        if words[0] == "torchrun":  # --parallel asks for ranks, and no example has it
            words = words[words.index("npuq") :]
        assert words[:2] == ["npuq", name]
        command.make_context(name, words[2:])


def test_examples_are_of_commands() -> None:
    assert EXAMPLES.keys() == COMMANDS.keys()
    assert all(len(lines) > 1 for lines in EXAMPLES.values())


def test_the_shell_completes_recipes_and_methods_that_there_are() -> None:
    for recipe in RECIPES:
        for method in METHODS:
            load_recipe(recipe, method)
