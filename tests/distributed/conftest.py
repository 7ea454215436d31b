"""The ranks of a file's tests, of which none is left when the next file begins."""

import pytest
from ranks import end_server, world_of


@pytest.fixture(scope="module", autouse=True)
def _no_server_is_left():
    """It would keep the resource tracker alive, for whose end other tests wait."""
    yield
    end_server()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Four processes that form worlds of one to four ranks."""
    with world_of(4, tmp_path_factory.mktemp("stores")) as ranks:
        yield ranks
