# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator

import pytest

from testbed.public import Public, public_homeserver
from testbed.sets import Cluster, Homeservers, two_homeservers, workers


@pytest.fixture(scope="session")
def homeservers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Homeservers]:
    with two_homeservers(tmp_path_factory.mktemp("homeservers")) as servers:
        yield servers


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with workers(tmp_path_factory.mktemp("cluster")) as servers:
        yield servers


@pytest.fixture(scope="session")
def public(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Public]:
    with public_homeserver(tmp_path_factory.mktemp("public")) as servers:
        yield servers
