"""Tables of a Markdown page between two comments, which a script writes anew."""

from __future__ import annotations

import re

END = "<!-- end of the table -->"
_BEGIN = re.compile(r"^<!-- begin of the table: (.+) -->$", re.MULTILINE)


def names(page: str) -> list[str]:
    """The names of a page's tables, in their order. Raises ValueError where begins and ends do not alternate."""
    found = []
    for place in re.split(r"(?m)(?=^<!-- begin of the table: )", page):
        begins = _BEGIN.findall(place)
        if place.count(END) != len(begins):
            raise ValueError(f"the table {begins[0]!r} needs one end" if begins else "an end without a table")
        found += begins
    if len(set(found)) != len(found):
        raise ValueError("two tables have the same name")
    return found


def with_table(page: str, name: str, table: str) -> str:
    """The page with this table, whose lines all end."""
    begin = f"<!-- begin of the table: {name} -->\n"
    before, rest = page.split(begin)
    return f"{before}{begin}{table}{END}{rest.split(END, 1)[1]}"
