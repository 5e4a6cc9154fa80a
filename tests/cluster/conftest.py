"""One cluster for all end-to-end tests of a session; each test ends by checking that nothing is left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve import Engine
from pdserve.bench.local_cluster import LocalCluster
from pdserve.runtime.cluster_secret import SECRET_VARIABLE, new_secret
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.tests.cluster.helpers import clean_cluster
from pdserve.tests.cluster.reference import Reference
from pdserve.tests.nursery import nursery

# fp32, so that answers can be compared; NaN in reserved pages, so that a page that did not travel shows;
# small chunks, so that prompts of the tests have several.
FLAGS = ["--deterministic", "--poison-reserved-pages", "--chunked-prefill-size", "64"]
FLAGS += ["--enable-return-hidden-states"]

# One secret for every process of a test, also for those that join a cluster by hand.
os.environ.setdefault(SECRET_VARIABLE, new_secret())


@pytest.fixture(scope="session", autouse=True)
def _nursery() -> Iterator[None]:
    """Processes of the tests' clusters are forked. The three binaries (test_launch_order.py), a program of a
    user's (test_engine.py) and `scripts/run`, which start some of every kind, execute theirs."""
    with nursery():
        yield


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    log_path = tmp_path_factory.mktemp("cluster") / "log"
    with clean_cluster([str(SHIPPED_MODEL), *FLAGS], log_path) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: LocalCluster) -> Iterator[LocalCluster]:
    """The cluster, idle before and after: no page locked, reserved, exposed or quarantined."""
    yield shared_cluster
    shared_cluster.wait_idle(timeout_s=15.0)


@pytest.fixture
def engine(cluster: LocalCluster) -> Iterator[Engine]:
    with Engine(url=cluster.url) as engine:
        yield engine


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    return tmp_path / "cluster.log"


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference(SHIPPED_MODEL)
