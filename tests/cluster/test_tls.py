"""A cluster that speaks TLS: its processes find one another under a certificate that names none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pdserve import Engine
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.runtime.direct_http import open_url
from pdserve.runtime.errors import StartupError
from pdserve.runtime.tls import TlsFiles, Trust
from pdserve.tests.certificates import Certificates


def test_router_and_nodes_speak_tls_alone(certificates: Certificates, tmp_path: Path) -> None:
    files = certificates.issue("llm.example")
    options: dict[str, Any] = {
        "ssl_certfile": files.certfile,
        "ssl_keyfile": files.keyfile,
        "kv_cache_gb": 0.05,
    }
    with Engine(SHIPPED_MODEL, log_path=tmp_path / "log", **options) as engine:
        assert engine.url.startswith("https://127.0.0.1:")
        answer = engine.generate("def add(a, b):", {"max_new_tokens": 4, "ignore_eos": True})
        assert len(answer["output_ids"]) == 4
        for worker in engine.get_server_info()["decode"]:
            assert worker["url"].startswith("https://")
            with open_url(f"{worker['url']}/live", 10.0, Trust(files)) as response:
                assert response.status == 200
            with pytest.raises(ConnectionError):
                open_url(worker["url"].replace("https", "http") + "/live", 10.0)
        for ca_certs, why in (("", "certificate verify failed"), (certificates.ca_certs, "mismatch")):
            with pytest.raises(StartupError, match=why):
                Engine(url=engine.url, ssl_ca_certs=ca_certs)
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_files_that_cannot_be_used_start_nothing(certificates: Certificates) -> None:
    with pytest.raises(StartupError, match="--ssl-ca-certs /no/such: No such file"):
        Engine(url="https://127.0.0.1:1", ssl_ca_certs="/no/such")
    assert TlsFiles(certfile=certificates.issue("a").certfile).scheme == "https"
