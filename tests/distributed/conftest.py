import pytest
from ranks import world_of


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Four processes that form worlds of one to four ranks."""
    with world_of(4, tmp_path_factory.mktemp("stores")) as ranks:
        yield ranks
