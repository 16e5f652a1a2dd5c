"""Typed access to config.json: a value of the wrong type or outside every model's range is an error with its key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ..errors import CheckpointError

# Far above any model: a config's sizes are enumerated and multiplied, and must not fill memory before the tensors
# refute them.
MAX_SIZE: Final = 1 << 24
MAX_LAYERS: Final = 1000
# Of all layers together; released models have up to 24,000.
MAX_EXPERTS: Final = 1 << 18
MAX_POSITIONS: Final = 1 << 21


class ConfigReader:
    """The values of a config by key. An absent or null value takes the default, or is an error without a default. With
    `nullable` false, null is an error in any case: other readers do not take it for absence.
    """

    def __init__(self, config: Mapping[str, Any]):
        self._config = config

    def size(self, key: str, default: int | None = None, most: int = MAX_SIZE, *, nullable: bool = True) -> int:
        """Read a whole number from 1 to `most`."""
        value = self.count(key, default, most, nullable=nullable)
        if value < 1:
            raise CheckpointError(f"config.json: {key} must be at least 1, not {value}")
        return value

    def count(self, key: str, default: int | None = None, most: int = MAX_SIZE, *, nullable: bool = True) -> int:
        """Read a whole number from 0 to `most`."""
        value = self._get(key, default, nullable)
        if type(value) is not int or value < 0:
            raise CheckpointError(f"config.json: {key} must be a whole number, not {shown(value)}")
        if value > most:
            raise CheckpointError(
                f"config.json: {key} {shown(value)} is more than any model has; npuq reads up to {most}"
            )
        return value

    def number(self, key: str, default: float | None = None, least: float = -1e30, most: float = 1e30) -> float:
        """Read a number from `least` to `most`."""
        value = self._get(key, default, True)
        # JSON has no infinity and no NaN, but Python reads both; NaN is in no range.
        if isinstance(value, bool) or not isinstance(value, int | float) or not -1e30 <= value <= 1e30:
            raise CheckpointError(f"config.json: {key} must be a finite number, not {shown(value)}")
        if not least <= value <= most:
            raise CheckpointError(f"config.json: {key} must be from {least:g} to {most:g}, not {shown(value)}")
        return float(value)

    def flag(self, key: str, default: bool, *, nullable: bool = True) -> bool:
        """Read a truth value."""
        value = self._get(key, default, nullable)
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {key} must be true or false, not {shown(value)}")
        return value

    def choice(self, key: str, choices: tuple[str, ...], default: str) -> str:
        """Read one of `choices`."""
        value = self._get(key, default, True)
        if value not in choices:
            raise CheckpointError(f"config.json: {key} {shown(value)} is unknown; npuq knows {', '.join(choices)}")
        return str(value)

    def fixed(self, key: str, only: str | bool) -> None:
        """Check that the config has no other value than `only`."""
        if isinstance(only, str):
            self.choice(key, (only,), only)
        elif self.flag(key, only) is not only:
            raise CheckpointError(
                f"config.json: {key} {str(not only).lower()} is not supported; no released model has it"
            )

    def text(self, key: str) -> str | None:
        """Read a text; None where there is none."""
        value = self._config.get(key)
        if value is not None and not isinstance(value, str):
            raise CheckpointError(f"config.json: {key} must be a text, not {shown(value)}")
        return value

    def words(self, key: str) -> list[str] | None:
        """Read a list of texts; None where there is none."""
        value = self._config.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise CheckpointError(f"config.json: {key} must be a list of texts, not {shown(value)}")
        return value

    def only(self, key: str, value: int) -> None:
        """Check that the config has no other number than `value`, which it may leave out."""
        found = self.count(key, value)
        if found != value:
            raise CheckpointError(
                f"config.json: {key} must be {value}, not {found}; no loader of the family computes another"
            )

    def numbers(self, key: str, most: int) -> list[int]:
        """Read a list of whole numbers from 0 to `most`; empty where there is none."""
        values = self._config.get(key)
        if values is None:
            return []
        if not isinstance(values, list) or not all(type(value) is int and 0 <= value <= most for value in values):
            raise CheckpointError(
                f"config.json: {key} must be a list of whole numbers from 0 to {most}, not {shown(values)}"
            )
        return values

    def has_key(self, key: str) -> bool:
        """True where the config has the key, also with the value null."""
        return key in self._config

    def has_value(self, key: str) -> bool:
        """True where the config has a value other than null for the key."""
        return self._config.get(key) is not None

    def _get(self, key: str, default: Any, nullable: bool) -> Any:
        value = self._config.get(key)
        if value is None and key in self._config and not nullable:
            raise CheckpointError(
                f"config.json: {key} is null, which loaders do not take for its default; give a value"
            )
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"config.json: {key} is missing")
        return value


def shown(value: Any) -> str:
    """The beginning of a value's text, for a message of one line."""
    if type(value) is int and value.bit_length() > 128:  # Python refuses to print thousands of digits
        return f"a number of {value.bit_length()} bits"
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
