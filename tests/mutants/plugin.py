"""A pytest plugin that applies the mutant that IFX_MUTANT names before any test is collected."""

from __future__ import annotations

import os

from tests.mutants.catalogue import MUTANTS


def pytest_configure() -> None:
    """Apply it."""
    next(mutant for mutant in MUTANTS if mutant.name == os.environ["IFX_MUTANT"]).apply()
