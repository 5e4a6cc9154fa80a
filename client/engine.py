"""`Engine`: a cluster of this program's own, or one that runs elsewhere, as an object.

    with Engine("path/to/model", num_decode=2) as engine:
        print(engine.generate("class Stack:", {"max_new_tokens": 32})["text"])

Plain methods block. `engine.aio` has the same ones to `await`, in any event loop.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
import weakref
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Unpack, overload

from ..runtime.cluster_process import ClusterProcess
from ..runtime.command_line import arguments_of
from ..runtime.errors import PdserveError, StartupError
from ..runtime.process import AccessKeys
from ..runtime.tls import TlsFiles, Trust
from .async_engine import (
    DEFAULT_GROUP,
    Answer,
    Answers,
    AsyncEngine,
    GenerateFields,
    GroupRanks,
    Outcome,
    ProfileFiles,
    Prompts,
    TokenIds,
    UpdateMode,
)
from .connection import Connection, close_stream, next_event

_ROLES = frozenset({"up", "router", "prefill", "decode"})


class Engine:
    """Starts `pdserve up` with `model_path` and `options` (its flags: `num_decode=2` is `--num-decode 2`;
    aliases of vLLM and SGLang count), or speaks to the router at `url`. Control calls need
    `admin_api_key` where the router has one. A router at an https URL is checked against the CAs of the file
    `ssl_ca_certs`, or against the system's.

    The cluster's processes end with `shutdown`, with the block, or with this process, whatever ends it. Their
    log goes to `log_path`, or to stderr; only warnings are shown unless `log_level` says otherwise.
    Raises StartupError, one line with the reason, when the cluster does not start or nobody answers at `url`.
    Methods may be called from any thread; they raise what `AsyncEngine`'s raise.
    """

    def __init__(
        self,
        model_path: str | Path | None = None,
        *,
        url: str | None = None,
        api_key: str = "",
        admin_api_key: str = "",
        ssl_ca_certs: str | Path = "",
        log_path: str | Path | None = None,
        **options: Any,  # noqa: ANN401  each flag has a type of its own, which is checked
    ) -> None:
        process = None
        tls = TlsFiles(ca_certs=str(ssl_ca_certs))
        tls.check()
        if url is None:
            # Others may reach it: control calls then need a key, which nobody else has to know.
            admin_api_key = admin_api_key or (secrets.token_urlsafe() if "host" in options else "")
            keys = AccessKeys((api_key,) if api_key else (), admin_api_key)
            tls = replace(tls, certfile=str(options.get("ssl_certfile", "")))
            process = _cluster(model_path, keys, log_path, {**options, "ssl_ca_certs": tls.ca_certs or None})
            url = process.start()
        elif options or model_path is not None or log_path is not None:
            raise StartupError("an engine with `url` starts no cluster: give neither a model nor its flags")
        why_it_ended = (lambda: "") if process is None else process.why_it_ended
        connection = Connection(url.rstrip("/"), admin_api_key or api_key, why_it_ended, Trust(tls))
        # At the latest when the interpreter exits.
        self._shut_down = weakref.finalize(self, _shut_down, connection, process, os.getpid())
        self._connection = connection
        self.aio = AsyncEngine(connection)
        if process is None:
            self._check_answers()

    @property
    def url(self) -> str:
        """Of the router."""
        return self._connection.url

    def shutdown(self) -> None:
        """Ends what runs, and the cluster if this engine started it. Idempotent."""
        self._shut_down()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.shutdown)

    def _check_answers(self) -> None:
        try:
            self.get_model_info()
        except PdserveError as error:
            self.shutdown()
            raise StartupError(f"no engine at {self.url}: {error}") from None

    # ---- generation ---------------------------------------------------------------------------------

    @overload
    def generate(
        self,
        prompt: Prompts | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        stream: Literal[False] = False,
        **fields: Unpack[GenerateFields],
    ) -> Answers: ...

    @overload
    def generate(
        self,
        prompt: Prompts | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        stream: Literal[True],
        **fields: Unpack[GenerateFields],
    ) -> Generator[Answer, None, None]: ...

    def generate(
        self,
        prompt: Prompts | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        stream: bool = False,
        **fields: Unpack[GenerateFields],
    ) -> Answers | Generator[Answer, None, None]:
        """See `AsyncEngine.generate`."""
        if not stream:
            return self._connection.run(self.aio.generate(prompt, sampling_params, **fields))
        events = self._connection.run(self.aio.generate(prompt, sampling_params, stream=True, **fields))
        return self._pulled(events)

    async def async_generate(
        self,
        prompt: Prompts | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        stream: bool = False,
        **fields: Unpack[GenerateFields],
    ) -> Answers | AsyncGenerator[Answer, None]:
        """SGLang's name of `aio.generate`."""
        if stream:
            return await self.aio.generate(prompt, sampling_params, stream=True, **fields)
        return await self.aio.generate(prompt, sampling_params, **fields)

    def prompt_logprobs(
        self, prompt: Prompts | None = None, input_ids: TokenIds | None = None, logprob_start_len: int = 0
    ) -> list[Any]:
        """See `AsyncEngine.prompt_logprobs`."""
        return self._connection.run(self.aio.prompt_logprobs(prompt, input_ids, logprob_start_len))

    def score(
        self,
        query: str | Sequence[int],
        items: Sequence[str] | Sequence[Sequence[int]],
        label_token_ids: Sequence[int],
        apply_softmax: bool = False,
        item_first: bool = False,
    ) -> list[list[float]]:
        """See `AsyncEngine.score`."""
        return self._connection.run(self.aio.score(query, items, label_token_ids, apply_softmax, item_first))

    def encode(self, prompt: Prompts | None = None, input_ids: TokenIds | None = None) -> Any:  # noqa: ANN401
        """See `AsyncEngine.encode`."""
        return self._connection.run(self.aio.encode(prompt, input_ids))

    def tokenize(self, text: str) -> list[int]:
        return self._connection.run(self.aio.tokenize(text))

    def _pulled(self, events: AsyncGenerator[Answer, None]) -> Generator[Answer, None, None]:
        try:
            while (event := self._connection.run(next_event(events))) is not None:
                yield event
        finally:
            self._connection.begin(close_stream(events))

    # ---- sessions -----------------------------------------------------------------------------------

    def open_session(
        self, capacity_of_str_len: int = 0, session_id: str = "", timeout: float | None = None
    ) -> str:
        """See `AsyncEngine.open_session`."""
        return self._connection.run(self.aio.open_session(capacity_of_str_len, session_id, timeout))

    def close_session(self, session_id: str) -> Outcome:
        """See `AsyncEngine.close_session`."""
        return self._connection.run(self.aio.close_session(session_id))

    # ---- facts --------------------------------------------------------------------------------------

    def get_server_info(self) -> dict[str, Any]:
        """See `AsyncEngine.get_server_info`."""
        return self._connection.run(self.aio.get_server_info())

    def get_model_info(self) -> dict[str, Any]:
        return self._connection.run(self.aio.get_model_info())

    def get_load(self) -> list[dict[str, Any]]:
        """One row for each node."""
        return self._connection.run(self.aio.get_load())

    # ---- control ------------------------------------------------------------------------------------

    def flush_cache(self, timeout_s: float = 0.0) -> Outcome:
        """See `AsyncEngine.flush_cache`."""
        return self._connection.run(self.aio.flush_cache(timeout_s))

    def abort_request(self, rid: str = "", abort_all: bool = False) -> Outcome:
        """See `AsyncEngine.abort_request`."""
        return self._connection.run(self.aio.abort_request(rid, abort_all))

    def pause_generation(
        self, mode: Literal["abort", "retract", "in_place", "keep", "wait"] = "abort"
    ) -> Outcome:
        """See `AsyncEngine.pause_generation`."""
        return self._connection.run(self.aio.pause_generation(mode))

    def continue_generation(self) -> Outcome:
        """See `AsyncEngine.continue_generation`."""
        return self._connection.run(self.aio.continue_generation())

    def update_weights_from_disk(
        self, model_path: str | Path, weight_version: str | None = None, abort_all_requests: bool = False
    ) -> Outcome:
        """See `AsyncEngine.update_weights_from_disk`."""
        return self._connection.run(
            self.aio.update_weights_from_disk(model_path, weight_version, abort_all_requests)
        )

    def update_weights_from_tensor(
        self,
        named_tensors: Mapping[str, Any] | bytes,
        weight_version: str | None = None,
        mode: UpdateMode = "wait",
    ) -> Outcome:
        """See `AsyncEngine.update_weights_from_tensor`."""
        call = self.aio.update_weights_from_tensor(named_tensors, weight_version, mode)
        return self._connection.run(call)

    def update_weights_from_ipc(
        self, name: str, weight_version: str | None = None, mode: UpdateMode = "wait"
    ) -> Outcome:
        """See `AsyncEngine.update_weights_from_ipc`."""
        return self._connection.run(self.aio.update_weights_from_ipc(name, weight_version, mode))

    def update_weights_from_gpu(
        self, memory: Mapping[str, Any], weight_version: str | None = None, mode: UpdateMode = "wait"
    ) -> Outcome:
        """See `AsyncEngine.update_weights_from_gpu`."""
        return self._connection.run(self.aio.update_weights_from_gpu(memory, weight_version, mode))

    def init_weights_update_group(
        self,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str = DEFAULT_GROUP,
        backend: str = "gloo",
    ) -> GroupRanks:
        """See `AsyncEngine.init_weights_update_group`."""
        call = self.aio.init_weights_update_group(
            master_address, master_port, rank_offset, world_size, group_name, backend
        )
        return self._connection.run(call)

    def update_weights_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str = DEFAULT_GROUP,
        load_format: str | None = None,
        weight_version: str | None = None,
        mode: UpdateMode = "wait",
    ) -> Outcome:
        """See `AsyncEngine.update_weights_from_distributed`."""
        call = self.aio.update_weights_from_distributed(
            names, dtypes, shapes, group_name, load_format, weight_version, mode
        )
        return self._connection.run(call)

    def destroy_weights_update_group(self, group_name: str = DEFAULT_GROUP) -> Outcome:
        """See `AsyncEngine.destroy_weights_update_group`."""
        return self._connection.run(self.aio.destroy_weights_update_group(group_name))

    def update_weights_from_peer(
        self, peer: str, weight_version: str | None = None, mode: UpdateMode = "wait"
    ) -> Outcome:
        """See `AsyncEngine.update_weights_from_peer`."""
        return self._connection.run(self.aio.update_weights_from_peer(peer, weight_version, mode))

    def save_sharded_model(
        self, path: str | Path, pattern: str | None = None, max_size: int | None = None
    ) -> Outcome:
        """See `AsyncEngine.save_sharded_model`."""
        return self._connection.run(self.aio.save_sharded_model(path, pattern, max_size))

    def save_remote_model(self, url: str) -> Outcome:
        """See `AsyncEngine.save_remote_model`."""
        return self._connection.run(self.aio.save_remote_model(url))

    def get_weights_by_name(self, name: str, truncate_size: int = 100) -> Any:  # noqa: ANN401  numbers, nested
        """See `AsyncEngine.get_weights_by_name`."""
        return self._connection.run(self.aio.get_weights_by_name(name, truncate_size))

    def check_weights(self) -> dict[str, Any]:
        """See `AsyncEngine.check_weights`."""
        return self._connection.run(self.aio.check_weights())

    def release_memory_occupation(self, tags: Sequence[str] | None = None) -> Outcome:
        """See `AsyncEngine.release_memory_occupation`."""
        return self._connection.run(self.aio.release_memory_occupation(tags))

    def resume_memory_occupation(self, tags: Sequence[str] | None = None) -> Outcome:
        """See `AsyncEngine.resume_memory_occupation`."""
        return self._connection.run(self.aio.resume_memory_occupation(tags))

    def get_internal_state(self) -> list[dict[str, Any]]:
        """See `AsyncEngine.get_internal_state`."""
        return self._connection.run(self.aio.get_internal_state())

    def set_internal_state(self, server_args: Mapping[str, int | float | None]) -> Outcome:
        """See `AsyncEngine.set_internal_state`."""
        return self._connection.run(self.aio.set_internal_state(server_args))

    def configure_logging(
        self,
        *,
        log_requests: bool | None = None,
        log_requests_level: int | None = None,
        log_level: str | None = None,
    ) -> Outcome:
        """See `AsyncEngine.configure_logging`."""
        call = self.aio.configure_logging(
            log_requests=log_requests, log_requests_level=log_requests_level, log_level=log_level
        )
        return self._connection.run(call)

    def slow_down(self, forward_sleep_time: float | None) -> Outcome:
        """See `AsyncEngine.slow_down`."""
        return self._connection.run(self.aio.slow_down(forward_sleep_time))

    def freeze_gc(self) -> Outcome:
        """See `AsyncEngine.freeze_gc`."""
        return self._connection.run(self.aio.freeze_gc())

    def start_profile(
        self,
        output_dir: str | Path | None = None,
        num_steps: int | None = None,
        *,
        profile_by_stage: bool = False,
        activities: Sequence[str] | None = None,
        record_shapes: bool = False,
        with_stack: bool = False,
        profile_id: str | None = None,
    ) -> Outcome:
        """See `AsyncEngine.start_profile`."""
        call = self.aio.start_profile(
            output_dir,
            num_steps,
            profile_by_stage=profile_by_stage,
            activities=activities,
            record_shapes=record_shapes,
            with_stack=with_stack,
            profile_id=profile_id,
        )
        return self._connection.run(call)

    def stop_profile(self) -> ProfileFiles:
        """See `AsyncEngine.stop_profile`."""
        return self._connection.run(self.aio.stop_profile())


def _cluster(
    model_path: str | Path | None,
    keys: AccessKeys,
    log_path: str | Path | None,
    options: Mapping[str, Any],
) -> ClusterProcess:
    given = dict(options)
    if model_path is not None:
        given["model"] = str(model_path)
    given.setdefault("log_level", "warning")
    given.setdefault("max_queue_wait", 0.0)  # who has a cluster of their own gives it all the work at once
    return ClusterProcess(
        arguments_of(given, _ROLES),
        None if log_path is None else Path(log_path),
        keys,
    )


def _shut_down(connection: Connection, process: ClusterProcess | None, owner_pid: int) -> None:
    if os.getpid() != owner_pid:
        return  # a fork of the program: the cluster is its parent's

    def end() -> None:
        connection.close()
        if process is not None:
            process.stop()

    if connection.is_own_thread:  # the last reference to the engine went away there
        threading.Thread(target=end, name="pdserve-shutdown").start()
    else:
        end()
