"""Settings: where a value comes from, and what a bad one says."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from pdserve.runtime.command_line import (
    add_flags,
    arguments_of,
    forwarded_flags,
    node_config,
    resolve,
    router_config,
)
from pdserve.runtime.config import FLAGS, SHIPPED_MODEL, NodeConfig, ProcessRole, RouterConfig, Routing
from pdserve.runtime.errors import StartupError
from pdserve.runtime.flag import Flag
from pdserve.runtime.timing import UNSCALED

ALL = frozenset({"up", "router", "prefill", "decode"})
NODES = frozenset({"prefill", "decode"})
WriteConfig = Callable[[str], Path]


def given(role: str, *arguments: str) -> dict[str, Any]:
    """What the command line of `role` gave (`up` takes the flags of every role)."""
    parser = argparse.ArgumentParser()
    add_flags(parser, ALL if role == "up" else frozenset({role}))
    return vars(parser.parse_args(arguments))


def config_of(role: ProcessRole, values: Mapping[str, Any]) -> RouterConfig | NodeConfig:
    assert role != "up"
    return router_config(values) if role == "router" else node_config(role, values)


def refusal(role: ProcessRole, values: Mapping[str, Any]) -> str:
    """The one line that refuses `values`."""
    with pytest.raises(StartupError) as caught:
        config_of(role, values)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def write_config(tmp_path: Path) -> WriteConfig:
    def write(text: str) -> Path:
        path = tmp_path / "pdserve.yaml"
        path.write_text(text)
        return path

    return write


def test_an_owner_s_part_of_a_config_holds_nothing_else() -> None:
    config = config_of("router", given("router", "--max-attempts", "5", "--api-key", "hidden"))
    assert Routing.of(config) == Routing(max_attempts=5)
    assert "hidden" not in repr(Routing.of(config))


# ---- the table of flags ------------------------------------------------------------------------------

# As it was promised: names with their aliases, who takes it, default, choices, whether it repeats.
TABLE: tuple[tuple[str, frozenset[str], object, str, bool], ...] = (
    ("--model --model-path", NODES | {"router"}, str(SHIPPED_MODEL), "", False),
    ("--served-model-name", NODES | {"router"}, (), "", True),
    ("--host", NODES | {"router"}, "127.0.0.1", "", False),
    ("--port", NODES | {"router"}, None, "", False),
    ("--api-key", NODES | {"router"}, (), "", True),
    ("--ssl-keyfile", NODES | {"router"}, "", "", False),
    ("--ssl-certfile", NODES | {"router"}, "", "", False),
    ("--ssl-ca-certs", NODES | {"router"}, "", "", False),
    ("--dtype", NODES, "auto", "auto float32 bfloat16 float16", False),
    ("--deterministic", NODES, False, "", False),
    ("--max-model-len", NODES | {"router"}, None, "", False),
    ("--page-size --block-size", NODES, 16, "", False),
    ("--kv-cache-gb", NODES, None, "", False),
    ("--chunked-prefill-size --max-num-batched-tokens", NODES, 2048, "", False),
    ("--max-running-requests --max-num-seqs", NODES, 64, "", False),
    ("--num-prefill", frozenset({"up"}), 1, "", False),
    ("--num-decode", frozenset({"up"}), 1, "", False),
    ("--nodes-nice", frozenset({"up"}), 5, "", False),
    ("--tensor-parallel-size --tp-size --tp -tp", NODES, 1, "", False),
    ("--num-threads", NODES, None, "", False),
    ("--transfer-backend --disaggregation-transfer-backend", NODES, "mooncake", "mooncake nixl shm", False),
    ("--transport", NODES, "tcp", "tcp rdma", False),
    ("--ib-device", NODES, "", "", False),
    ("--router", NODES, (), "", True),
    ("--prefill", frozenset({"router"}), (), "", True),
    ("--decode", frozenset({"router"}), (), "", True),
    ("--colocated", frozenset({"decode"}), False, "", False),
    ("--log-level", NODES | {"router"}, "info", "debug info warning error", False),
    ("--log-format", NODES | {"router"}, "text", "text json", False),
)


@pytest.mark.parametrize(("names", "roles", "default", "choices", "repeatable"), TABLE)
def test_every_flag_of_the_table_is_there(
    names: str, roles: frozenset[str], default: object, choices: str, repeatable: bool
) -> None:
    first, *aliases = names.split()
    (flag,) = (flag for flag in FLAGS if flag.names[0] == first)
    assert set(aliases) <= set(flag.names)
    assert flag.roles == roles
    assert flag.default == default
    assert flag.choices == tuple(choices.split())
    assert flag.repeatable is repeatable


def test_each_name_belongs_to_one_flag() -> None:
    names = [name for flag in FLAGS for name in flag.names]
    assert len(names) == len(set(names))


def example(flag: Flag, index: int = 0) -> str:
    """A value that `flag` takes and that is not its default."""
    if flag.choices:
        return next(choice for choice in flag.choices if choice != flag.default)
    if flag.kind in (int, float):
        return str(7 + index)
    return f"http://10.0.0.1:{9000 + index}" if flag.repeatable else f"value-{index}"


ALIASES = [
    pytest.param(flag, alias, id=alias) for flag in FLAGS for alias in flag.names[1:] if flag.kind is not bool
]


@pytest.mark.parametrize(("flag", "alias"), ALIASES)
def test_an_alias_is_the_flag_itself(flag: Flag, alias: str) -> None:
    (role, *_) = flag.roles
    by_alias = given(role, alias, example(flag))
    assert by_alias == given(role, flag.names[0], example(flag))
    assert flag.field in by_alias


@pytest.mark.parametrize("name", ["--no-enable-prefix-caching", "--disable-radix-cache"])
def test_the_prefix_cache_is_switched_off_in_both_dialects(name: str) -> None:
    assert node_config("prefill", given("prefill", name)).disable_prefix_cache
    assert not node_config("prefill", given("prefill")).disable_prefix_cache


def test_the_configs_hold_exactly_the_flags_of_their_roles() -> None:
    for config_type, roles in ((RouterConfig, {"router"}), (NodeConfig, {"prefill", "decode"})):
        own = {"role", "cluster_secret", "foreign_flags"}
        fields = {field.name for field in dataclasses.fields(config_type)} - own
        assert fields == {flag.field for flag in FLAGS if flag.roles & roles}


# ---- defaults -----------------------------------------------------------------------------------------


def test_without_flags_the_shipped_model_is_served_under_its_name() -> None:
    router = router_config({})
    assert (router.model, router.served_model_name) == (str(SHIPPED_MODEL), ("tiny-python",))
    assert (router.host, router.port, router.api_key) == ("127.0.0.1", None, ())
    assert node_config("prefill", {}).port is None
    assert node_config("decode", {}).num_threads >= 1


def test_another_model_is_served_under_its_path_as_given() -> None:
    assert router_config(given("router", "../my-model")).served_model_name == ("../my-model",)
    named = router_config(given("router", "../my-model", "--served-model-name", "mine"))
    assert (named.model, named.served_model_name) == ("../my-model", ("mine",))


def test_the_model_is_positional_or_a_flag() -> None:
    assert router_config(given("router", "a")).model == "a"
    assert router_config(given("router", "--model-path", "a")).model == "a"
    assert router_config(given("router", "a", "--model", "a")).model == "a"
    assert "'a'" in refusal("router", given("router", "a", "--model", "b"))
    assert "'b'" in refusal("router", given("router", "a", "--model", "b"))


def test_port_0_is_kept() -> None:
    assert router_config(given("router", "--port", "0")).port == 0


def test_repeatable_flags_add_up() -> None:
    arguments = ("--api-key", "one", "--api-key", "two", "--prefill", "http://a:1", "--prefill", "http://b:2")
    config = router_config(given("router", *arguments))
    assert config.api_key == ("one", "two")
    assert config.prefill == ("http://a:1", "http://b:2")
    assert config.decode == ()


# ---- the YAML file ------------------------------------------------------------------------------------


def test_flags_override_the_role_block_overrides_the_top_overrides_the_default(
    write_config: WriteConfig,
) -> None:
    path = write_config(
        """
        page-size: 32
        max-num-seqs: 5
        chunked_prefill_size: 512
        decode: {max-running-requests: 6, chunked-prefill-size: 256}
        """
    )
    prefill = node_config("prefill", given("prefill", "--config", str(path)))
    assert (prefill.page_size, prefill.max_running_requests, prefill.chunked_prefill_size) == (32, 5, 512)
    decode = node_config("decode", given("decode", "--config", str(path), "--chunked-prefill-size", "128"))
    assert (decode.page_size, decode.max_running_requests, decode.chunked_prefill_size) == (32, 6, 128)
    assert decode.transport == "tcp"


def test_a_top_level_key_of_another_role_is_passed_over(write_config: WriteConfig) -> None:
    path = write_config("max-attempts: 7\nnum-decode: 2\n")
    assert router_config({"config": path}).max_attempts == 7
    assert node_config("decode", {"config": path}).page_size == 16
    assert resolve("up", {"config": path})["num_decode"] == 2


@pytest.mark.parametrize("value", ["http://r:1", "[http://r:1]"])
def test_router_is_a_flag_when_it_is_no_block(write_config: WriteConfig, value: str) -> None:
    assert node_config("decode", {"config": write_config(f"router: {value}")}).router == ("http://r:1",)


def test_router_is_a_block_when_it_is_a_mapping(write_config: WriteConfig) -> None:
    path = write_config("router: {port: 9000}\nprefill: {router: [http://r:1]}\n")
    assert router_config({"config": path}).port == 9000
    prefill = node_config("prefill", {"config": path})
    assert (prefill.port, prefill.router) == (None, ("http://r:1",))


def test_an_empty_block_says_nothing(write_config: WriteConfig) -> None:
    path = write_config("router:\nprefill:\ndecode:\n")
    assert router_config({"config": path}) == router_config({})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("pages: 3", "'pages'"),
        ("decode: {max-attempts: 3}", "'max-attempts'"),
        ("page-size: big", "page-size: 'big' is not int"),
        ("page-size: true", "page-size: True is not int"),
        ("page-size:", "page-size: None is not int"),
        ("colocated: 1", "colocated: 1 is not bool"),
        ("dtype: float8", "float32 | bfloat16"),
        ("api-key: [1]", "api-key: 1 is not str"),
        ("- page-size", "mapping of flag names"),
        ("", "mapping of flag names"),
        ("a: [", "is not YAML"),
        ("a: \x07", "is not YAML"),
        ("page-size: 0", "--page-size 0"),
        ("kv-cache-gb: .nan", "--kv-cache-gb nan"),
        ("api-key: ''", "--api-key is empty"),
        ("api-key: a b", "--api-key: visible ASCII"),
        ("api-key: [fine, schlüssel]", "--api-key: visible ASCII"),
        ('api-key: "a\\n"', "--api-key: visible ASCII"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(write_config: WriteConfig, text: str, named: str) -> None:
    assert named in refusal("decode", {"config": write_config(text)})


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "absent.yaml") in refusal("router", {"config": tmp_path / "absent.yaml"})
    assert str(tmp_path) in refusal("router", {"config": tmp_path})
    (tmp_path / "latin.yaml").write_bytes(b"host: \xff\xfe\xfa\n")
    assert "latin.yaml is not YAML" in refusal("router", {"config": tmp_path / "latin.yaml"})


def test_a_float_may_be_written_as_an_integer(write_config: WriteConfig) -> None:
    assert node_config("decode", {"config": write_config("kv-cache-gb: 2")}).kv_cache_gb == 2


# ---- bad values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "arguments", "named"),
    [
        ("decode", "--page-size 0", "--page-size 0: 1 or more"),
        ("decode", "--chunked-prefill-size -1", "--chunked-prefill-size -1"),
        ("decode", "--max-num-seqs 0", "--max-running-requests 0"),
        ("decode", "--max-model-len 0", "--max-model-len 0"),
        ("decode", "--num-threads 0", "--num-threads 0"),
        ("decode", "--kv-cache-gb 0", "--kv-cache-gb 0.0: a number above 0"),
        ("decode", "--kv-cache-gb nan", "--kv-cache-gb nan"),
        ("decode", "--kv-cache-gb inf", "--kv-cache-gb inf"),
        ("decode", "--time-scale 0", "--time-scale 0.0: 0.01 to 100 is expected"),
        ("router", "--time-scale nan", "--time-scale nan: 0.01 to 100 is expected"),
        ("decode", "--port 65536", "--port 65536: 0 to 65535"),
        ("decode", "--port -1", "--port -1"),
        ("decode", "--host ::1", "--host ::1: nodes take IPv4"),
        ("decode", "--advertise-host fe80::1", "--advertise-host fe80::1"),
        ("decode", "--router 127.0.0.1:8000", "--router 127.0.0.1:8000: a URL is expected, such as http://"),
        ("prefill", "--max-queued-prefills 0", "--max-queued-prefills 0"),
        ("router", "--prefill a:1", "--prefill a:1: a URL"),
        ("router", "--decode a:1", "--decode a:1: a URL"),
        ("router", "--max-attempts 0", "--max-attempts 0"),
        ("router", "--max-queued-requests 0", "--max-queued-requests 0"),
        ("router", "--request-timeout 0", "--request-timeout 0.0"),
        ("router", "--drain-timeout -2", "--drain-timeout -2.0"),
        ("router", "--api-key=", "--api-key is empty"),
        ("router", "--host=", "--host is empty"),
    ],
)
def test_a_bad_value_names_its_flag_and_what_is_expected(
    role: ProcessRole, arguments: str, named: str
) -> None:
    assert named in refusal(role, given(role, *arguments.split()))


@pytest.mark.parametrize(
    ("role", "arguments", "named"),
    [
        ("decode", "--router http://[", "--router http://[: a URL is expected"),
        ("decode", "--router http://:99999", "--router http://:99999: a URL is expected"),
        ("decode", "--router http://a:99999", "--router http://a:99999: a URL is expected"),
        ("decode", "--router http://a:x", "--router http://a:x: a URL is expected"),
        ("decode", "--router http://a:0", "--router http://a:0: a URL is expected"),
        ("decode", "--router http://", "--router http://: a URL is expected"),
        ("decode", "--router http:a", "--router http:a: a URL is expected"),
        ("decode", "--router http://a?b=c", "--router http://a?b=c: a URL is expected"),
        ("decode", "--router http://a..b", "'a..b' is no name"),
        ("router", "--prefill http://-a", "'-a' is no name"),
        ("router", "--decode http://user:pw@a:1", "--decode: a URL without user and password"),
        ("decode", "--advertise-host a:8000/", "--advertise-host a:8000/: a name or an address"),
        ("decode", "--advertise-host http://a", "--advertise-host http://a: a name or an address"),
        ("prefill", "--ib-device mlx5_0", "--ib-device mlx5_0: --transport tcp uses no RDMA device; give"),
        ("prefill", "--transport rdma --transfer-backend shm", "--transfer-backend shm has no wire"),
        ("router", "--max-model-len 1", "--max-model-len 1: 2 or more"),
        ("decode", "--num-threads 1000000", "--num-threads 1000000: this host has "),
    ],
)
def test_f16_a_value_that_cannot_mean_anything_is_refused(
    role: ProcessRole, arguments: str, named: str
) -> None:
    message = refusal(role, given(role, *arguments.split()))
    assert named in message
    assert "pw" not in message.split("password")[0]  # a secret is not shown


@pytest.mark.parametrize(
    "url", ["http://a", "https://a.b:1/llm", "http://10.0.0.1:80", "http://[::1]:8000", "http://a_b-c.d."]
)
def test_a_url_that_can_be_asked_is_kept(url: str) -> None:
    assert node_config("decode", given("decode", "--router", url)).router == (url,)


# ---- flags for children -------------------------------------------------------------------------------

FORWARDED: tuple[tuple[str, ...], ...] = (
    (),
    ("model", "--host", "0.0.0.0", "--port", "9000", "--api-key", "a", "--api-key=-b"),
    ("--model=-odd", "--served-model-name", "a name with spaces", "--max-model-len", "128"),
    ("--dtype", "float32", "--kv-cache-gb", "0.125", "--page-size", "8", "--no-enable-prefix-caching"),
    ("--colocated", "--poison-reserved-pages", "--transfer-backend", "shm", "--router", "http://a:1"),
    ("--no-colocated", "--prefill", "http://a:1", "--prefill", "http://b:2", "--max-attempts", "9"),
    ("--num-prefill", "2", "--num-decode", "3", "--num-threads", "2", "--log-format", "json"),
)


@pytest.mark.parametrize("arguments", FORWARDED)
@pytest.mark.parametrize("role", ["router", "prefill", "decode"])
def test_a_child_resolves_what_its_parent_was_given(role: ProcessRole, arguments: tuple[str, ...]) -> None:
    ours = given("up", *arguments)
    assert resolve(role, given(role, *forwarded_flags(ours, role))) == resolve(role, ours)


def test_a_flag_overrides_the_file_in_the_child_too(write_config: WriteConfig) -> None:
    path = write_config("colocated: true\npage-size: 8\n")
    ours = given("up", "--config", str(path), "--no-colocated")
    theirs = node_config("decode", given("decode", *forwarded_flags(ours, "decode")))
    assert (theirs.colocated, theirs.page_size) == (False, 8)


def test_what_the_parent_decides_itself_is_dropped() -> None:
    ours = given("up", "--host", "0.0.0.0", "--port", "9000", "--page-size", "8")
    assert forwarded_flags(ours, "decode", dropped=("host", "port")) == ["--page-size=8"]


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_deterministic_computes_in_float32(dtype: str) -> None:
    config = node_config("decode", {"deterministic": True, "dtype": dtype})
    assert (config.deterministic, config.dtype) == (True, "float32")


def test_deterministic_in_another_dtype_is_refused() -> None:
    with pytest.raises(StartupError, match="float32, not in bfloat16; leave --dtype out, or give float32"):
        node_config("prefill", {"deterministic": True, "dtype": "bfloat16"})


# ---- options of a program --------------------------------------------------------------------------------


def test_options_become_arguments() -> None:
    options = {
        "num_decode": 2,
        "tp_size": 2,  # SGLang's name
        "kv-cache-gb": 1,
        "colocated": False,
        "deterministic": True,
        "disable_radix_cache": False,
        "prefill": ["http://a", "http://b"],
        "dtype": None,
    }
    assert arguments_of(options, ALL) == [
        "--num-decode=2",
        "--tensor-parallel-size=2",
        "--kv-cache-gb=1",
        "--no-colocated",
        "--deterministic",
        "--prefill=http://a",
        "--prefill=http://b",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_decoders": 2}, "there is no option 'num_decoders'"),
        ({"num_decode": "2"}, "num_decode='2': int is expected"),
        ({"num_decode": True}, "num_decode=True: int is expected"),
        ({"colocated": 1}, "colocated=1: bool is expected"),
        ({"dtype": "int4"}, "dtype='int4': auto | float32"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(StartupError, match=re.escape(message)):
        arguments_of(options, ALL)


@pytest.mark.parametrize(
    ("role", "flag", "value"),
    [
        ("router", "--stream-interval", "0"),
        ("router", "--force-stream-interval", "0"),
        ("router", "--max-sessions", "0"),
        ("router", "--session-timeout", "0"),
        ("decode", "--session-cache-fraction", "1.5"),
        ("decode", "--crash-after-outputs", "-1"),
    ],
)
def test_values_out_of_range_are_refused_by_name(role: ProcessRole, flag: str, value: str) -> None:
    assert refusal(role, given(role, flag, value)).startswith(f"{flag} ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--allowed-origins", '["https://a.example", "http://b.example:81"]'],
        ["--allowed-origins", "https://a.example", "--allowed-origins=http://b.example:81"],
    ],
)
def test_allowed_origins_are_repeated_or_a_json_list(arguments: list[str]) -> None:
    assert router_config(given("router", *arguments)).allowed_origins == (
        "https://a.example",
        "http://b.example:81",
    )


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--allowed-origins", "app.example"),
        ("--allowed-origins", "https://app.example/"),
        ("--allowed-origins", "[1]"),
        ("--root-path", "llm"),
        ("--root-path", "/llm/"),
    ],
)
def test_what_is_no_origin_or_no_path_is_refused_by_name(flag: str, value: str) -> None:
    assert refusal("router", given("router", flag, value)).startswith(f"{flag} {value}: ")


def test_m_several_names_of_the_model(tmp_path: Path) -> None:
    config = router_config(given("router", "../my-model", "--served-model-name", "a", "b", "b", "a", "c"))
    assert config.served_model_name == ("a", "b", "c")
    again = router_config(given("router", "--served-model-name=a", "--served-model-name=b", "--model=m"))
    assert again.served_model_name == ("a", "b")
    flags = forwarded_flags(given("up", "m", "--served-model-name", "a", "b"), "router")
    assert router_config(given("router", *flags)).served_model_name == ("a", "b")
    file = tmp_path / "names.yaml"
    file.write_text("served-model-name: [x, y]")
    assert router_config(given("router", "--config", str(file))).served_model_name == ("x", "y")
    assert node_config("decode", given("decode", "--served-model-name", "a", "b")).served_model_name == (
        "a",
        "b",
    )
    with pytest.raises(StartupError, match="--served-model-name is empty"):
        router_config(given("router", "--served-model-name", "a", ""))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StartupError, match="give MODEL before it, or by --model"):
        router_config(given("router", "--served-model-name", "a", str(tmp_path)))


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_time_is_scaled_for_all_processes_alike(role: Literal["prefill", "decode"]) -> None:
    arguments = given("up", "--time-scale=0.5")
    assert "--time-scale=0.5" in forwarded_flags(arguments, role)
    assert node_config(role, arguments).timing == router_config(arguments).timing == UNSCALED.scaled(0.5)


def test_what_is_for_tests_alone_is_not_in_the_help() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, frozenset({"decode"}))
    assert "--time-scale" not in parser.format_help()
