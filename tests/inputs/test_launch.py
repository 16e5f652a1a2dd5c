"""The variables of torchrun, which may say anything."""

from __future__ import annotations

import pytest

from npuq.errors import RankError
from npuq.inputs.launch import Launch

GIVEN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"}


def test_a_rank_is_read() -> None:
    launch = Launch.of(GIVEN)
    assert (launch.rank, launch.size, launch.local_rank) == (1, 4, 1)
    assert (launch.address, launch.port) == ("node7", 29500)
    assert launch.local_size == 4
    assert Launch.of({**GIVEN, "LOCAL_WORLD_SIZE": "2"}).local_size == 2


@pytest.mark.parametrize("given", [{}, {"WORLD_SIZE": "8"}, {"RANK": "3"}, {**GIVEN, "RANK": "0", "WORLD_SIZE": "1"}])
def test_a_process_alone(given: dict[str, str]) -> None:
    assert Launch.of(given) == Launch()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "4"),
        ("RANK", "-1"),
        ("RANK", ""),
        ("RANK", "1.0"),
        ("RANK", "٣"),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "9" * 5000),
        ("WORLD_SIZE", "99999"),
        ("LOCAL_RANK", "x\n\x1b[2J"),
        ("LOCAL_RANK", None),
        ("LOCAL_WORLD_SIZE", "5"),
        ("MASTER_ADDR", ""),
        ("MASTER_ADDR", "a b"),
        ("MASTER_ADDR", "a\x1b[2J"),
        ("MASTER_ADDR", None),
        ("MASTER_PORT", "0"),
        ("MASTER_PORT", "65536"),
        ("MASTER_PORT", None),
    ],
)
def test_anything_else_is_refused_in_a_line(name: str, value: str | None) -> None:
    given = {**GIVEN, name: value}
    with pytest.raises(RankError, match=f"variable {name} .*torchrun") as error:
        Launch.of({key: text for key, text in given.items() if text is not None})
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300
