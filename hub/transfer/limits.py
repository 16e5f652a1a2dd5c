"""How much npuq reads of what a hub says, of any hub. Content is limited by what the hub's listing says of it."""

from __future__ import annotations

from typing import Final

# Of one answer in JSON: a page of a listing is a thousandth of it.
MOST_JSON_BYTES: Final = 64 << 20
MOST_PAGES: Final = 1000
MOST_REDIRECTS: Final = 10
