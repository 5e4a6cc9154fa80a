"""The OpenAPI page is valid, and what the server answers is what the page says: schemathesis asks."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pdserve.tests.unit.api.conftest import Api

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


async def test_every_parameter_of_a_path_is_declared(api: Api) -> None:
    _, page = await api.get("/openapi.json")
    for path, methods in page["paths"].items():
        for method, operation in methods.items():
            declared = {parameter["name"] for parameter in operation.get("parameters", [])}
            assert declared >= set(re.findall(r"{(\w+)}", path)), (method, path)


@pytest.mark.process
async def test_answers_are_as_the_page_says(api: Api, tmp_path: Path) -> None:
    """A few generated requests of each operation, others every day; the seed is in what a failure shows."""
    api.generator.prompt_hidden_states = np.ones(4, np.float32).tobytes()
    seed = time.strftime("%Y%m%d")
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("schemathesis")),
        *("run", f"{api.url}/openapi.json", "--phases", "fuzzing", "--mode", "all", "--max-examples", "3"),
        *("--checks", ",".join(CHECKS), "--seed", seed, "--generation-database", "none", "--no-color"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=tmp_path,
    )
    printed, _ = await process.communicate()
    assert process.returncode == 0, printed.decode()
