"""Ranks that the tests of a session share: started on first use, stopped at the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from companion.parallel.launching import Ranks, ranks


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    """Two ranks; a busy machine may take a minute to start them."""
    with ranks(2, start_timeout=300) as found:
        yield found


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    """Four ranks."""
    with ranks(4, start_timeout=300) as found:
        yield found
