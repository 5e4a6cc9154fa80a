"""The tables of docs/control_plane.md are true, and no control call is missing from them."""

from __future__ import annotations

from pathlib import Path

from pdserve.bench.local_cluster import LocalCluster
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.scripts.tools.control_table import CALLS, FLAGS, ROLES, Bench, run, statuses_in_docs
from pdserve.tests.cluster.helpers import request

# All of them take minutes: scripts/dev control_table.
STATES_OF = {"decode": ("busy", "twice")}
PATHS = ("/flush_cache?timeout=0", "/update_weights_from_disk", "/release_memory_occupation")


def test_a_slice_of_the_table(log_path: Path) -> None:
    with LocalCluster([str(SHIPPED_MODEL), *FLAGS], log_path=log_path) as cluster:
        rows = run(
            Bench(cluster),
            lambda call, role, state: call.right.path in PATHS and state in STATES_OF.get(role, ("twice",)),
        )
    documented = statuses_in_docs()
    assert len(rows) == len(PATHS) * len(ROLES)
    for key, row in rows.items():
        assert row.statuses.items() <= documented[key].items(), key
    assert "Traceback" not in log_path.read_text()


def test_every_control_route_has_a_row(cluster: LocalCluster) -> None:
    urls = {worker["role"]: worker["url"] for worker in cluster.workers()} | {"router": cluster.url}
    other_names = {"/weights_checker", "/reset_prefix_cache", "/sleep", "/wake_up"}
    tabled = {call.right.path.partition("?")[0] for call in CALLS} | other_names
    for url in urls.values():
        paths = request(url, "/openapi.json").json["paths"]
        controls = {
            path
            for path, methods in paths.items()
            if any("admin" in method.get("tags", ()) for method in methods.values())
        }
        assert len(controls) > 15
        assert controls - tabled == set()
