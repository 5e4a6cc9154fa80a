"""A client that leaves stops the work on both nodes and leaves no page behind."""

from __future__ import annotations

import http.client
import json
from urllib.parse import urlsplit

from pdserve.bench.local_cluster import LocalCluster

NUM_CLIENTS = 50


def open_stream(url: str, seed: int) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    target = urlsplit(url)
    connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
    body = {
        "prompt": [seed % 200 + 5, *range(5, 5 + 3 * seed)],
        "max_tokens": 1000,
        "ignore_eos": True,
        "stream": True,
        "seed": seed,
    }
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection, connection.getresponse()


def test_fifty_clients_killed_in_mid_stream(cluster: LocalCluster) -> None:
    streams = [open_stream(cluster.url, seed) for seed in range(1, NUM_CLIENTS + 1)]
    for number, (connection, response) in enumerate(streams):
        assert response.status == 200
        if number % 3:  # most after some tokens, some before the first
            for _ in range(number % 5 + 1):
                while not response.readline().startswith(b"data: "):
                    pass
        connection.sock.close()
        response.close()
        connection.close()
    cluster.wait_idle(timeout_s=5.0)
    cluster.flush()


def test_client_leaves_before_the_first_token(cluster: LocalCluster) -> None:
    target = urlsplit(cluster.url)
    for _ in range(5):
        connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
        body = {"prompt": list(range(5, 1500)), "max_tokens": 200, "ignore_eos": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        connection.close()
    cluster.wait_idle(timeout_s=5.0)
    cluster.flush()
