"""What `pip install` brings: the package with its model and licences, and nothing of the checkout's else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import BytesParser
from pathlib import Path

import pytest

import pdserve

pytestmark = pytest.mark.process

ROOT = Path(pdserve.__file__).resolve().parent
MODEL = "pdserve/assets/tiny-python/"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """Built without the network, from a copy: setuptools leaves its work in the folder that it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, folder / "source", ignore=left_out)
    options = ["--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(folder)]
    build = [sys.executable, "-m", "pip", "wheel", *options, str(folder / "source")]
    subprocess.run(build, check=True, timeout=100)
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as opened:
        yield opened


@pytest.fixture
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return BytesParser().parsebytes(wheel.read(name))


def test_it_holds_every_module_but_the_simulation(wheel: zipfile.ZipFile) -> None:
    top = {path.name for path in ROOT.iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    sources = [*ROOT.glob("*.py"), *(file for name in top for file in (ROOT / name).rglob("*.py"))]
    expected = {f"pdserve/{file.relative_to(ROOT)}" for file in sources}
    expected = {name for name in expected if not name.startswith("pdserve/simulation/")}
    assert {name for name in wheel.namelist() if name.endswith(".py")} == expected
    assert "pdserve/tests/conftest.py" not in expected


def test_it_holds_the_shipped_model_and_that_it_is_typed(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {f"{MODEL}{path.name}" for path in (ROOT / "assets" / "tiny-python").iterdir()} <= names
    assert "pdserve/py.typed" in names
    others = {name.split("/")[1] for name in names if name.startswith("pdserve/")}
    assert not others & {"tests", "scripts", "docs", "build"}


def test_it_says_what_it_is(wheel: zipfile.ZipFile, metadata: Message) -> None:
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"].startswith("Apache-2.0")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert set(metadata.get_all("License-File", [])) == {"LICENSE", "assets/tiny-python/LICENSE"}
    texts = [wheel.read(name) for name in wheel.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
    assert [b"Apache License" in text for text in texts] == [True]
    classifiers = metadata.get_all("Classifier", [])
    for minor in (11, 12, 13):
        assert f"Programming Language :: Python :: 3.{minor}" in classifiers


def test_its_base_needs_no_torch_and_its_extras_do(metadata: Message) -> None:
    required = metadata.get_all("Requires-Dist", [])
    assert not [line for line in required if line.startswith("torch") and "extra ==" not in line]
    for extra, mooncake in (
        ("cpu", "mooncake-transfer-engine-non-cuda"),
        ("cuda", "mooncake-transfer-engine-cuda13"),
    ):
        of_extra = [line for line in required if f'extra == "{extra}"' in line]
        assert any(line.startswith("torch>=") for line in of_extra)
        assert any(line.startswith(f"{mooncake}>=") for line in of_extra)
