"""Fixtures shared by several test files."""

import pytest

from mbperf.lesson import get_data


@pytest.fixture(scope="session")
def digits():
    """x_train, y_train, x_valid, y_valid of the embedded digits; read only."""
    return get_data("embedded")
