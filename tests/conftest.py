"""Fixtures shared by several test files, and how long property tests run."""

import pytest
from hypothesis import settings

from mbperf.lesson import get_data

# No deadline for one example: on a shared machine the clock says nothing about the code. "fuzz" is
# `make fuzz`, with 100 times as many examples as hypothesis takes by itself.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.register_profile("fuzz", deadline=None, max_examples=10_000)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def digits():
    """x_train, y_train, x_valid, y_valid of the embedded digits; read only."""
    return get_data("embedded")
