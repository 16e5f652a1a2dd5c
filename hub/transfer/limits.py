"""Limits of a hub's answers. A file's content is limited by its listed size."""

from __future__ import annotations

from typing import Final

# The limit of one JSON answer; a page of a listing takes a thousandth.
MOST_JSON_BYTES: Final = 64 << 20
MOST_PAGES: Final = 1000
MOST_REDIRECTS: Final = 10
