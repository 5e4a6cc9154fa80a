"""Flags of other servers' launch lines that change no answer here: accepted, and said to be without effect.

Those that would change answers (quantization, adapters, parsers of tool calls, …) are not among them: who
gives one must hear that it is not done.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .flag import field_of

FOREIGN_FIELD = "foreign_flags"  # in a namespace: those that were given


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignFlag:
    """`why`: what is done here instead. `values`: the only ones that mean nothing; any where it is empty."""

    names: tuple[str, ...]
    why: str
    takes_value: bool = False
    values: tuple[str, ...] = ()


def _switch(why: str, *names: str) -> ForeignFlag:
    return ForeignFlag(names=names, why=why)


def _valued(why: str, *names: str) -> ForeignFlag:
    return ForeignFlag(names=names, why=why, takes_value=True)


def _only(why: str, values: tuple[str, ...], *names: str) -> ForeignFlag:
    return ForeignFlag(names=names, why=why, takes_value=True, values=values)


FOREIGN_FLAGS: tuple[ForeignFlag, ...] = (
    _switch("no code of a checkpoint is ever run", "--trust-remote-code"),
    _switch("/metrics is always there", "--enable-metrics"),
    _switch("/sleep is always there", "--enable-sleep-mode"),
    _switch("--log-requests switches it on", "--disable-log-requests", "--no-enable-log-requests"),
    _switch("HTTP requests are not logged", "--disable-uvicorn-access-log"),
    _switch("no statistics are logged", "--disable-log-stats"),
    _valued("--log-level is of all messages", "--uvicorn-log-level", "--log-level-http"),
    _valued("no statistics are logged", "--decode-log-interval"),
    _switch("usage always tells cached tokens", "--enable-prompt-tokens-details", "--enable-cache-report"),
    _switch("/load is always there", "--enable-server-load-tracking"),
    _switch("is the default", "--enable-prefix-caching"),
    _switch(
        "prompts are computed in chunks of --chunked-prefill-size",
        "--enable-chunked-prefill",
        "--no-enable-chunked-prefill",
        "--enable-mixed-chunk",
    ),
    _valued("--chunked-prefill-size bounds a step", "--max-prefill-tokens"),
    _switch("no graphs are captured", "--enforce-eager", "--disable-cuda-graph"),
    _valued("no graphs are captured", "--cuda-graph-max-bs", "--max-seq-len-to-capture"),
    _switch("nothing is compiled", "--enable-torch-compile"),
    _valued("nothing is compiled", "--compilation-config", "-O"),
    _switch("there is none", "--disable-custom-all-reduce", "--disable-cascade-attn", "--enable-p2p-check"),
    _switch("the loop never waits for a forward", "--async-scheduling", "--disable-overlap-schedule"),
    _switch("there is no warm-up", "--skip-server-warmup"),
    _valued("a rank that hangs ends its node by itself", "--watchdog-timeout", "--dist-timeout"),
    _valued(
        "--kv-cache-gb sets the pool's size",
        "--gpu-memory-utilization",
        "--mem-fraction-static",
        "--max-total-tokens",
        "--num-gpu-blocks-override",
    ),
    _valued("nothing is swapped", "--swap-space"),
    _only("nothing is offloaded", ("0", "0.0"), "--cpu-offload-gb"),
    _valued("ranks are processes of their own", "--distributed-executor-backend"),
    _valued("one is used", "--api-server-count", "--max-parallel-loading-workers"),
    _valued("kernels are chosen by the machine", "--attention-backend", "--sampling-backend"),
    _valued("the oldest of the highest priority is first", "--schedule-policy", "--scheduling-policy"),
    _valued("there are no images", "--limit-mm-per-prompt"),
    _only("it is the only one", ("auto", "hf"), "--tokenizer-mode", "--config-format"),
    _only("it is the only one", ("auto", "generate"), "--runner", "--task"),
    _only("it is of --dtype", ("auto",), "--kv-cache-dtype"),
    _only("it is of --dtype", ("none",), "--quantization", "-q"),
    _only("one is all there is", ("1",), "--pipeline-parallel-size", "--pp-size", "-pp"),
    _only("--num-prefill and --num-decode start more", ("1",), "--data-parallel-size", "--dp-size", "-dp"),
)  # fmt: skip

_BY_FIELD: Mapping[str, ForeignFlag] = {field_of(name): flag for flag in FOREIGN_FLAGS for name in flag.names}


class _Collect(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        given: tuple[str, ...] = vars(namespace).get(self.dest, ())
        setattr(namespace, self.dest, (*given, option_string or self.option_strings[0]))


def declare_foreign_flags(parser: argparse.ArgumentParser) -> None:
    """To argparse, out of the help's sight. Those given are a tuple of names in `FOREIGN_FIELD`."""
    for flag in FOREIGN_FLAGS:
        parser.add_argument(
            *flag.names,
            dest=FOREIGN_FIELD,
            action=_Collect,
            nargs=None if flag.takes_value else 0,
            choices=flag.values or None,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


def foreign_names() -> Iterable[str]:
    return (name for flag in FOREIGN_FLAGS for name in flag.names)


def foreign_name(key: str, value: object) -> str | None:
    """Of a file's key or a program's option: the flag's name where it has no effect here with this value."""
    flag = _BY_FIELD.get(field_of(key))
    if flag is None:
        return None
    is_of_kind = flag.takes_value != isinstance(value, bool)
    if not is_of_kind or (flag.values and str(value) not in flag.values):
        return None
    return next(name for name in flag.names if field_of(name) == field_of(key))


def without_effect(given: Sequence[str]) -> str:
    """One line that names each of the flags given, once, and why it changes nothing."""
    why = {name: flag.why for flag in FOREIGN_FLAGS for name in flag.names}
    return "without effect here: " + ", ".join(f"{name} ({why[name]})" for name in dict.fromkeys(given))
