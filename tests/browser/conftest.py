"""One lab and one browser for all browser tests; skipped where there is no Chromium."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from .lab import Lab


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The system's Chromium."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    from .lab import PROGRAM, chromium

    if not PROGRAM:
        pytest.skip("there is no Chromium: not on PATH, nor Chrome in its place")

    with chromium() as found:
        yield found


@pytest.fixture(scope="session")
def lab(browser) -> Iterator[Lab]:
    """A running lab; its answers are under a prefix of their own."""
    from .lab import lab

    with lab(LLMSTREAM_PREFIX=f"browser-{uuid.uuid4().hex[:8]}") as running:
        yield running
