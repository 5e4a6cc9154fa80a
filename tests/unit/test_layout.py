"""The repository root is the package: its list of folders, its imports, and what must not be in it."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import pdserve

ROOT = Path(pdserve.__file__).resolve().parent
NOT_INSTALLED = {"pdserve.simulation"}
NOT_PACKAGES = {"tests", "scripts", "docs", "assets", "build", "dist"}


def is_source(path: Path) -> bool:
    top, *_ = path.relative_to(ROOT).parts
    return not (top.startswith(".") or top in NOT_PACKAGES or top.endswith(".egg-info"))


def packages() -> Iterator[Path]:
    """Every folder of ours with an ``__init__.py``."""
    yield ROOT
    for top in ROOT.iterdir():
        if top.is_dir() and is_source(top):
            yield from (path.parent for path in top.rglob("__init__.py"))


def sources() -> Iterator[Path]:
    for top in ROOT.iterdir():
        if is_source(top):
            yield from top.rglob("*.py") if top.is_dir() else [top] if top.suffix == ".py" else []


def run_python(code: str, *, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=cwd, capture_output=True, text=True, timeout=100, check=False
    )


def test_every_folder_of_the_package_is_in_the_list() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = [".".join(["pdserve", *folder.relative_to(ROOT).parts]) for folder in packages()]
    assert sorted([*listed, *NOT_INSTALLED]) == sorted(found)
    assert len(set(listed)) == len(listed)


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {path.parent for path in sources()}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_every_module_says_what_it_is() -> None:
    silent = [path for path in sources() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


def test_no_module_is_a_drawer_of_odds_and_ends() -> None:
    names = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
    assert [path for path in sources() if path.name in names] == []


def loads_code(tree: ast.AST) -> bool:
    """Whether a module can read pickles: `pickle` and its kin, `torch.load`, `numpy.load` of objects."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names) if any(name.name.split(".")[0] in PICKLES for name in names):
                return True
            case ast.ImportFrom(module=str(module), level=0) if module.split(".")[0] in PICKLES:
                return True
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load")):
                return True
            case ast.Call(keywords=keywords) if any(key.arg == "allow_pickle" for key in keywords):
                return True
            case ast.Call(func=ast.Attribute(attr="recv_pyobj" | "send_pyobj")):
                return True
    return False


PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}


def test_nothing_reads_pickles() -> None:
    assert [path for path in sources() if loads_code(ast.parse(path.read_text()))] == []


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from pickle import loads", "torch.load(path)", "np.load(path, allow_pickle=True)"],
)
def test_a_pickle_would_be_noticed(code: str) -> None:
    assert loads_code(ast.parse(code))


def makes_zmq_socket(tree: ast.AST) -> bool:
    """`context.socket(zmq.DEALER)` and the like."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(attr="socket"), args=[ast.Attribute(value=ast.Name("zmq")), *_]):
                return True
    return False


def test_zmq_sockets_are_made_where_they_take_the_clusters_keys() -> None:
    """Each of these demands keys of whoever makes a link; the guard's own sockets are in-process."""
    makers = {"links/node_client.py", "messages/channel.py", "messages/link_guard.py"}
    found = {path for path in sources() if makes_zmq_socket(ast.parse(path.read_text()))}
    assert {str(path.relative_to(ROOT)) for path in found} == makers
    for path in found:
        assert ".secure_" in path.read_text() or "_ZAP_ADDRESS" in path.read_text()


@pytest.mark.parametrize("code", ["context.socket(zmq.DEALER)", "zmq.Context.instance().socket(zmq.PULL)"])
def test_a_zmq_socket_elsewhere_would_be_noticed(code: str) -> None:
    assert makes_zmq_socket(ast.parse(code))
    assert not makes_zmq_socket(ast.parse("socket.socket(socket.AF_INET)"))


@pytest.mark.process
def test_no_path_of_this_checkout_is_committed() -> None:
    found = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "grep", "-I", "-l", "-F", str(ROOT)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode not in (0, 1):
        pytest.skip("no git repository")
    assert found.stdout == ""


# `kernels/` must not shadow Hugging Face's package of that name, which transformers looks for.


def test_transformers_is_imported_beside_our_kernels() -> None:
    spec = importlib.util.find_spec("kernels")
    assert spec is None or not Path(str(spec.origin)).is_relative_to(ROOT / "kernels")
    importlib.import_module("transformers")


@pytest.mark.process
def test_transformers_is_imported_from_the_checkout() -> None:
    code = """if True:
        import importlib.util, sys
        spec = importlib.util.find_spec("kernels")
        print(spec.origin if spec else "")
        import transformers
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip().startswith(str(ROOT / "kernels"))


@pytest.mark.process
def test_what_the_base_install_serves_needs_no_torch() -> None:
    code = """if True:
        import importlib, pkgutil, sys
        import pdserve.cli, pdserve.doctor
        for name in (
            *("client", "bench", "router", "front"),
            *("api", "links", "models", "messages", "runtime"),
        ):
            package = importlib.import_module(f"pdserve.{name}")
            for module in pkgutil.walk_packages(package.__path__, f"pdserve.{name}."):
                importlib.import_module(module.name)
        print(sorted({"torch", "transformers", "safetensors", "mooncake"} & sys.modules.keys()))
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
