"""The command line: what each command takes, and that a failed start is one line and no orphan."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from pdserve import cli, doctor
from pdserve.runtime import hub
from pdserve.runtime.cluster_secret import SECRET_VARIABLE
from pdserve.runtime.command_line import add_flags
from pdserve.runtime.config import FLAGS, SHIPPED_MODEL
from pdserve.runtime.errors import StartupError
from pdserve.runtime.listen import bind_http
from pdserve.runtime.process import usable_cores
from pdserve.runtime.supervisor import Child, Supervisor
from pdserve.runtime.timing import Timing
from pdserve.tests.certificates import Certificates

COMMANDS = ("up", "demo", "router", "prefill", "decode", "bench", "doctor")


@pytest.fixture(autouse=True)
def process_as_it_was(logging_as_it_was: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands configure logging and take signals; pytest gets its own back. Its timeouts come by SIGALRM."""
    monkeypatch.setattr(cli, "ignore_stray_signals", lambda: None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def unsupported_model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((SHIPPED_MODEL / name).read_bytes())
    config = json.loads((SHIPPED_MODEL / "config.json").read_text())
    config.update(model_type="mamba", architectures=["MambaForCausalLM"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# ---- in this process ----------------------------------------------------------------------------------


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return int(caught.value.code or 0)


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--help") == 0
    shown = capsys.readouterr().out
    assert all(f"    {command}" in shown for command in COMMANDS)
    assert "node-front" not in shown
    assert "tp-worker" not in shown


def test_the_version_is_that_of_the_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"pdserve {importlib.metadata.version('pdserve')}\n"


def test_serve_is_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--num-decode", "0", "--port", "0"]) == 1
    assert capsys.readouterr().err.startswith("pdserve up: --num-decode 0: 1 or more is expected")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(command, "--help") == 0
    assert f"pdserve {command}" in capsys.readouterr().out


@pytest.mark.parametrize("role", ["router", "prefill", "decode"])
def test_the_help_of_a_role_has_its_flags_and_no_other(role: str, capsys: pytest.CaptureFixture[str]) -> None:
    exit_code(role, "--help")
    words = capsys.readouterr().out.replace(",", " ").split()
    for flag in FLAGS:
        is_shown = role in flag.roles and not flag.is_hidden
        assert (flag.names[0] in words) == is_shown, flag.names[0]
    assert "--config" in words
    assert "--parent-pid" not in words, "is no business of people"


def test_up_takes_the_flags_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    exit_code("up", "--help")
    words = capsys.readouterr().out.replace(",", " ").split()
    shown = [flag.names[0] for flag in FLAGS if not flag.is_hidden]
    assert [name for name in shown if name not in words] == []


@pytest.mark.parametrize("role", ["router", "prefill", "decode"])
def test_a_role_has_a_binary_of_its_own(
    role: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name=f"pdserve-{role}")
    monkeypatch.setattr(sys, "argv", [f"pdserve-{role}", "--help"])
    with pytest.raises(SystemExit) as caught:
        entry.load()()
    assert caught.value.code == 0
    assert f"usage: pdserve-{role} " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [f"pdserve-{role}", "/no/such/model", "--port", "0"])
    assert entry.load()() == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "COMMAND"),
        (("launch",), "'launch'"),
        (("router", "--no-such-flag"), "--no-such-flag"),
        (("decode", "--dtype", "int4"), "--dtype"),
        (("decode", "--port", "http"), "--port"),
        (("prefill", "--colocated"), "--colocated"),
    ],
)
def test_a_wrong_command_line_is_a_usage_error(
    arguments: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*arguments) == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that cannot start."""
    assert cli.main(arguments) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    return line


@pytest.mark.parametrize("command", ["up", "router", "prefill", "decode"])
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--config", "/no/such.yaml"), "--config /no/such.yaml: No such file or directory"),
        (("--host", "192.0.2.1"), "cannot listen on 192.0.2.1:"),
        (("--port", "70000"), "--port 70000"),
        (("a", "--model", "b"), "two models were given"),
    ],
)
def test_a_start_that_fails_is_one_line(
    command: str, arguments: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"pdserve {command}: " in (line := failure(capsys, command, *arguments))
    assert named in line


@pytest.mark.parametrize("command", ["router", "prefill", "decode"])
def test_a_model_that_is_not_there_is_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = failure(capsys, command, "/no/such/model", "--port", "0")
    assert line.startswith(f"pdserve {command}: no model at /no/such/model: ")


@pytest.mark.parametrize("command", ["router", "prefill", "decode"])
def test_a_model_that_is_not_supported_is_named(
    command: str, unsupported_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "mamba" in failure(capsys, command, str(unsupported_model), "--port", "0").lower()


def test_a_folder_without_a_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(tmp_path) in failure(capsys, "decode", str(tmp_path), "--port", "0")
    assert str(tmp_path) in failure(capsys, "router", str(tmp_path), "--port", "0")


@pytest.mark.parametrize("arguments", [("--num-decode", "0"), ("--num-prefill", "0")])
def test_a_cluster_needs_nodes(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{' '.join(arguments)}: 1 or more is expected" in failure(capsys, "up", "--port", "0", *arguments)


def test_nodes_step_back_and_never_forward(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--nodes-nice -1: 0 to 19 is expected" in failure(capsys, "up", "--port", "0", "--nodes-nice=-1")


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_router", interrupted)
    assert cli.main(["router"]) == 130


@pytest.mark.parametrize(
    "arguments",
    [
        ("router",),
        ("prefill",),
        ("decode",),
        ("node-front", "--role", "decode", "--zmq-address", "tcp://h:1", "--listen-fd", "3", "--url", "u"),
        ("tp-worker", "--role", "decode", "--rank", "1", "--pipe-fd", "3"),
    ],
)
def test_every_process_that_is_spawned_dies_with_its_parent(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends_with(parent_pid: int, number: signal.Signals) -> None:
        # A rank has nothing to finish, and SIGTERM would not end a frozen one.
        assert number == (signal.SIGKILL if arguments[0] == "tp-worker" else signal.SIGTERM)
        raise KeyboardInterrupt(parent_pid)

    monkeypatch.setattr(cli, "die_with_parent", ends_with)
    with pytest.raises(KeyboardInterrupt, match="77"):
        cli.main([*arguments, "--parent-pid", "77"])


@pytest.mark.parametrize("command", ["up", "router"])
def test_an_unknown_flag_is_refused_with_a_near_one(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--max-modellen=32k"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith("unrecognized arguments: --max-modellen=32k; did you mean --max-model-len?")


# ---- the children of `up` -----------------------------------------------------------------------------


class NoChildrenError(StartupError):
    """Ends `up` where it would start its processes."""


def children(monkeypatch: pytest.MonkeyPatch, *arguments: str, port: str = "--port=0") -> list[Child]:
    """The processes that `up` would start; with `port` empty on the default one."""
    started: list[Child] = []

    def take(wanted: Sequence[Child], timing: Timing, on_reaped: object, owner_pid: int | None) -> None:
        del timing, on_reaped
        assert owner_pid is None
        started.extend(wanted)
        raise NoChildrenError("taken")

    monkeypatch.setattr(cli, "Supervisor", take)
    assert cli.main(["up", *([port] if port else []), *arguments]) == 1
    return started


def values(child: Child) -> dict[str, Any]:
    """What a child's own command line would give it."""
    role, *arguments = child.arguments
    parser = argparse.ArgumentParser()
    add_flags(parser, frozenset({role}))
    parser.add_argument("--listen-fd", type=int)
    return vars(parser.parse_args(arguments))


def test_up_starts_one_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    router, prefill, decode = children(monkeypatch, "--page-size", "8", "--max-attempts", "5")
    assert [child.name for child in (router, prefill, decode)] == ["router", "prefill 0", "decode 0"]
    assert router.listener is not None
    assert router.listener.fileno() == values(router)["listen_fd"]
    assert values(router)["max_attempts"] == 5
    assert "page_size" not in values(router)
    for node in (prefill, decode):
        assert (values(node)["page_size"], values(node)["port"]) == (8, 0)
        assert values(node)["num_threads"] == max(1, usable_cores() // 2)
        assert values(node)["router"][0].startswith("http://127.0.0.1:")
    assert router.grace_s > 60, "its drain is not cut short"


def test_up_says_once_what_has_no_effect(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = children(monkeypatch, "--trust-remote-code", "--swap-space", "4")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "without effect" in line]
    assert "--trust-remote-code" in line
    assert "--swap-space" in line
    assert "swap-space" not in repr(started)


def test_up_looks_names_on_the_hub_up_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, str, str, bool]] = []

    def download(name: str, revision: str, cache_dir: str, *, with_weights: bool) -> str:
        asked.append((name, revision, cache_dir, with_weights))
        return f"/cache/{name}"

    monkeypatch.setattr(hub, "download", download)
    arguments = ("--tokenizer", "some/Tokenizer", "--revision", "v1", "--download-dir", str(tmp_path))
    for child in children(monkeypatch, "some/Model", *arguments):
        given = values(child)
        assert (given["model"], given["tokenizer"]) == ("/cache/some/Model", "/cache/some/Tokenizer")
        assert given["served_model_name"] == ["some/Model"]
        assert "model_positional" not in given
    cache = str(tmp_path)
    assert asked == [("some/Model", "v1", cache, True), ("some/Tokenizer", "v1", cache, False)]


@pytest.mark.parametrize(("command", "with_weights"), [("router", False), ("decode", True)])
def test_a_process_of_its_own_looks_its_model_up(
    command: str, with_weights: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def download(name: str, revision: str, cache_dir: str, *, with_weights: bool) -> str:
        raise StartupError(f"asked for {name} {with_weights}")

    monkeypatch.setattr(hub, "download", download)
    assert failure(capsys, command, "some/Model") == f"pdserve {command}: asked for some/Model {with_weights}"


def test_up_starts_as_many_as_were_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = [child.name for child in children(monkeypatch, "--num-prefill", "2", "--num-decode", "3")]
    assert names == ["router", "prefill 0", "prefill 1", "decode 0", "decode 1", "decode 2"]
    (tmp_path / "c.yaml").write_text("num-prefill: 2\n")
    names = [child.name for child in children(monkeypatch, "--config", str(tmp_path / "c.yaml"))]
    assert names == ["router", "prefill 0", "prefill 1", "decode 0"]


def test_nodes_step_back_behind_the_router(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [child.nice for child in children(monkeypatch, "--nodes-nice", "10")] == [0, 10, 10]
    assert [child.nice for child in children(monkeypatch)] == [0, 5, 5]


def test_children_get_api_keys_but_not_in_their_command_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    started = children(monkeypatch, "--api-key", "secret-1", "--api-key=secret-2")
    assert [child.keys.api for child in started] == [("secret-1", "secret-2")] * 3
    assert "secret" not in repr(started)


@pytest.mark.parametrize(("host", "has_own"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_a_cluster_that_others_reach_has_an_admin_key(
    host: str, has_own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = children(monkeypatch, "--host", host)
    (admin,) = {child.keys.admin for child in started}
    assert bool(admin) == has_own
    given = children(monkeypatch, "--host", host, "--admin-api-key", "mine")
    assert {child.keys.admin for child in given} == {"mine"}
    assert "mine" not in repr(given)


@pytest.mark.parametrize("command", ["router", "decode"])
def test_a_child_takes_the_api_keys_of_its_parent(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[dict[str, Any]] = []

    def take_router(given: dict[str, Any]) -> int:
        taken.append(given)
        return 0

    def take_node(_: str, given: dict[str, Any]) -> int:
        return take_router(given)

    monkeypatch.setattr(cli, "die_with_parent", lambda parent_pid, number: None)
    monkeypatch.setattr(cli, "_router", take_router)
    monkeypatch.setattr(cli, "_node", take_node)
    monkeypatch.setenv("PDSERVE_KEYS", '{"api": ["a", "b"], "admin": "c"}')
    assert cli.main([command]) == 0
    assert "api_key" not in taken[0], "somebody else's variable"
    assert cli.main([command, "--parent-pid", "77"]) == 0
    assert taken[1]["api_key"] == ("a", "b")
    assert taken[1]["admin_api_key"] == "c"
    assert "PDSERVE_KEYS" not in os.environ


def test_a_colocated_cluster_has_no_prefill_node(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [child.name for child in children(monkeypatch, "--colocated")] == ["router", "decode 0"]


def test_nodes_find_a_router_that_listens_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    _, prefill, _ = children(monkeypatch, "--host", "0.0.0.0")
    assert values(prefill)["router"][0].startswith("http://127.0.0.1:")
    assert values(prefill)["host"] == "0.0.0.0"


def test_up_takes_the_next_port_when_the_default_one_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with bind_http("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(cli, "DEFAULT_PORTS", {"router": port})
        _, prefill, _ = children(monkeypatch, port="")
    assert f"port {port} is taken by another program: listening on port " in capsys.readouterr().err
    assert values(prefill)["router"] != [f"http://127.0.0.1:{port}"]


@pytest.mark.parametrize("command", ["up", "router", "prefill", "decode"])
def test_f14_a_port_that_was_asked_for_and_is_taken_ends_the_start(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    with bind_http("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}: " in failure(capsys, command, "--port", str(port))


def test_m_nobody_reads_what_up_says_and_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """`pdserve up | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        cli._say("pdserve is ready")
        cli._say("and says more")


def test_nobody_reads_all_of_what_doctor_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """`pdserve doctor | head`: no traceback, and nothing is wrong."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(doctor, "run_doctor", lambda *_: print("x" * 100_000))
        assert cli.main(["doctor"]) == 0


@pytest.mark.process
def test_a_cluster_that_does_not_get_ready_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A router alone, which takes a moment to answer at all."""

    class RouterAlone(Supervisor):
        def __init__(self, wanted: Sequence[Child], *others: Any) -> None:  # noqa: ANN401
            super().__init__(wanted[:1], *others)

        def wait_ready(self, why_not: Callable[[], str], timeout_s: float) -> bool:
            def until_it_answers() -> str:
                reason = why_not()
                return reason if reason.startswith("the router does not answer") else ""

            assert super().wait_ready(until_it_answers, timeout_s)
            return super().wait_ready(why_not, 0.0)

    monkeypatch.setattr(cli, "Supervisor", RouterAlone)
    assert cli.main(["up", "--port", "0"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "was not ready" in line]
    assert line.endswith("the cluster was not ready within 0 s: no decode node is registered")


# ---- as a process -------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_node_that_fails_after_its_front_was_started_takes_it_along(tmp_path: Path) -> None:
    """The backend refuses RDMA on a host without a device, when the front is already there."""
    if Path("/sys/class/infiniband").is_dir() and list(Path("/sys/class/infiniband").iterdir()):
        pytest.skip("this host has RDMA devices")
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "pdserve", "prefill", "--transport", "rdma", "--port", "0"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    output, errors = process.communicate(timeout=100)
    assert (process.returncode, output) == (1, "")
    (line,) = errors.splitlines()
    assert line.startswith("pdserve prefill: transport rdma was asked for")
    assert "--transport tcp" in line
    fronts = [
        front.info["cmdline"]
        for front in psutil.process_iter(["cmdline"])
        if (front.info["cmdline"] or [])[-2:] == ["--parent-pid", str(process.pid)]
    ]
    assert fronts == []


@pytest.mark.parametrize("command", ["up", "router", "prefill", "decode"])
def test_a_key_of_another_certificate_ends_the_start(
    capsys: pytest.CaptureFixture[str], command: str, certificates: Certificates
) -> None:
    certfile, keyfile = certificates.issue("a").certfile, certificates.issue("a").keyfile
    said = failure(capsys, command, "--ssl-certfile", certfile, "--ssl-keyfile", keyfile, "--port", "0")
    assert "the key is not that certificate's" in said


@pytest.mark.parametrize("command", ["router", "prefill", "decode"])
def test_other_hosts_may_come_with_a_secret_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    said = failure(capsys, command, "--host", "0.0.0.0", "--port", "0")
    assert "--host 0.0.0.0" in said
    assert "--cluster-secret-file" in said
    assert "--insecure-cluster" in said
