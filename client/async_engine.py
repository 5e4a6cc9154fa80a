"""The calls of an engine, each a coroutine that may be awaited in any event loop."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias, TypedDict, TypeVar, Unpack, overload
from urllib.parse import urlencode

import msgspec

from ..runtime.errors import UnreachableError
from .connection import Connection, close_stream, next_event

T = TypeVar("T")

Answer: TypeAlias = dict[str, Any]
"""`{"text", "output_ids", "meta_info"}`, as `/generate` answers."""

Answers: TypeAlias = Any
"""One Answer for one prompt, a list of them for a batch (or when `n` > 1)."""

Prompts: TypeAlias = str | Sequence[str]
TokenIds: TypeAlias = Sequence[int] | Sequence[Sequence[int]]

UpdateMode: TypeAlias = Literal["wait", "abort", "retract"]

DEFAULT_GROUP = "weight_update_group"
_CALL_TIMEOUT_S = 60.0
_SCORING: Mapping[str, Any] = {"max_new_tokens": 1, "temperature": 0.0}


class GenerateFields(TypedDict, total=False):
    """What `generate` takes besides; names and meaning are SGLang's. Lists are as long as the batch."""

    input_ids: TokenIds | None  # instead of a prompt
    return_logprob: bool
    logprob_start_len: int  # -1: no logprobs of the prompt
    top_logprobs_num: int
    token_ids_logprob: TokenIds  # whose logprobs are told, too; with return_logprob
    return_text_in_logprobs: bool
    return_hidden_states: bool  # nodes need --enable-return-hidden-states
    rid: str | list[str]
    priority: int
    session_params: Mapping[str, Any] | Sequence[Mapping[str, Any]]  # id, rid, offset, replace, …
    incremental_streaming_output: bool  # events hold what is new, not all so far


class Outcome(NamedTuple):
    """What became of a control call."""

    success: bool
    message: str


class GroupRanks(msgspec.Struct, frozen=True):
    """What became of joining a trainer's group."""

    success: bool
    message: str
    ranks: dict[str, int] = {}  # node URL -> its rank


class ProfileFiles(msgspec.Struct, frozen=True):
    """What became of a profile."""

    success: bool
    message: str
    traces: dict[str, list[str]]  # node URL -> Chrome traces, on the node
    merged: str  # one of all, on the router; empty if they could not be merged


class _OutcomeBody(msgspec.Struct):
    success: bool
    message: str = ""


class AsyncEngine:
    """Every method raises RequestError when the cluster refuses a request, with the HTTP status and the name
    of the parameter, and UnreachableError when it does not answer (any more)."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    # ---- generation ---------------------------------------------------------------------------------

    @overload
    async def generate(
        self,
        prompt: Prompts | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        stream: Literal[False] = False,
        **fields: Unpack[GenerateFields],
    ) -> Answers: ...

    @overload
    async def generate(
        self,
        prompt: Prompts | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        stream: Literal[True],
        **fields: Unpack[GenerateFields],
    ) -> AsyncGenerator[Answer, None]: ...

    async def generate(
        self,
        prompt: Prompts | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        stream: bool = False,
        **fields: Unpack[GenerateFields],
    ) -> Answers | AsyncGenerator[Answer, None]:
        """Continues one prompt or a batch. With `stream` an iterator of events; leaving it early, or
        cancelling who waits, cancels the request on every node."""
        if unknown := fields.keys() - GenerateFields.__annotations__.keys():
            raise TypeError(f"generate() takes no {', '.join(sorted(unknown))}")
        body: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
        body |= {"sampling_params": sampling_params or {}, "stream": stream}
        if prompt is not None:
            body["text"] = prompt
        return self._events(body) if stream else await self._json("POST", "/generate", body, None)

    async def prompt_logprobs(
        self, prompt: Prompts | None = None, input_ids: TokenIds | None = None, logprob_start_len: int = 0
    ) -> list[Any]:
        """The log-probability that the model gives each token of a prompt, after those before it, from
        position `logprob_start_len` on; None for position 0. For a batch a list of such lists."""
        answers = await self.generate(
            prompt,
            _SCORING,
            return_logprob=True,
            logprob_start_len=logprob_start_len,
            input_ids=input_ids,
        )
        if isinstance(answers, list):
            return [_input_logprobs(answer) for answer in answers]
        return _input_logprobs(answers)

    async def score(
        self,
        query: str | Sequence[int],
        items: Sequence[str] | Sequence[Sequence[int]],
        label_token_ids: Sequence[int],
        apply_softmax: bool = False,
        item_first: bool = False,
    ) -> list[list[float]]:
        """How probable each label is as the token behind `query + item` (behind `item + query` with
        `item_first`): a row for each item, a column for each label; with `apply_softmax` rows add up to 1.

        A label is scored as the last token of a prompt, so what precedes it is computed once.
        """
        rows = [_joined(query, item, item_first) for item in items]
        return list(
            await asyncio.gather(*(self._label_scores(row, label_token_ids, apply_softmax) for row in rows))
        )

    async def _label_scores(
        self, context: str | list[int], labels: Sequence[int], apply_softmax: bool
    ) -> list[float]:
        ids = await self.tokenize(context) if isinstance(context, str) else context
        rows = await self.prompt_logprobs(
            input_ids=[[*ids, label] for label in labels], logprob_start_len=len(ids)
        )
        logprobs = [row[0] for row in rows]
        if not apply_softmax:
            return [math.exp(logprob) for logprob in logprobs]
        top = max(logprobs)
        weights = [math.exp(logprob - top) for logprob in logprobs]
        return [weight / sum(weights) for weight in weights]

    async def encode(self, prompt: Prompts | None = None, input_ids: TokenIds | None = None) -> Any:  # noqa: ANN401  a dict, or a list of them for a batch
        """The last token's hidden state, scaled to length 1: `{"embedding", "meta_info"}`, or for a batch a
        list of them."""
        body = {"text": prompt} if input_ids is None else {"input_ids": input_ids}
        return await self._json("POST", "/encode", body, None)

    async def tokenize(self, text: str) -> list[int]:
        answer: dict[str, list[int]] = await self._json("POST", "/tokenize", {"prompt": text})
        return answer["tokens"]

    # ---- sessions -----------------------------------------------------------------------------------

    async def open_session(
        self, capacity_of_str_len: int = 0, session_id: str = "", timeout: float | None = None
    ) -> str:
        """Its id. `capacity_of_str_len`: the most tokens that it keeps; 0: as many as any. `timeout`: seconds
        that it may be idle."""
        body = {"capacity_of_str_len": capacity_of_str_len, "session_id": session_id, "timeout": timeout}
        opened: str = await self._json("POST", "/open_session", body)
        return opened

    async def close_session(self, session_id: str) -> Outcome:
        """Its tokens are forgotten, and its KV is kept no longer than that of others."""
        return await self._outcome("/close_session", {"session_id": session_id})

    # ---- facts --------------------------------------------------------------------------------------

    async def get_server_info(self) -> dict[str, Any]:
        """Of the router, and of each node under "prefill" and "decode"."""
        info: dict[str, Any] = await self._json("GET", "/server_info")
        return info

    async def get_model_info(self) -> dict[str, Any]:
        info: dict[str, Any] = await self._json("GET", "/model_info")
        return info

    async def get_load(self) -> list[dict[str, Any]]:
        """One row for each node."""
        rows: list[dict[str, Any]] = await self._json("GET", "/get_load")
        return rows

    # ---- control ------------------------------------------------------------------------------------

    async def flush_cache(self, timeout_s: float = 0.0) -> Outcome:
        """Drops every prefix cache once the nodes are idle, which they may wait for until `timeout_s`."""
        return await self._outcome(f"/flush_cache?timeout={timeout_s:g}", {}, timeout_s + _CALL_TIMEOUT_S)

    async def abort_request(self, rid: str = "", abort_all: bool = False) -> Outcome:
        """Ends the request with exactly this `rid`, or every one, with finish reason "abort". Idempotent."""
        return await self._outcome("/abort_request", {"rid": rid or None, "abort_all": abort_all})

    async def pause_generation(
        self, mode: Literal["abort", "retract", "in_place", "keep", "wait"] = "abort"
    ) -> Outcome:
        """Nothing is computed until `continue_generation`, and no deadline runs out. Running requests end as
        aborted, begin again later from their tokens ("retract"), stay where they are ("in_place", vLLM's
        "keep"), or end first ("wait"); new ones wait."""
        return await self._outcome("/pause_generation", {"mode": mode}, None)

    async def continue_generation(self) -> Outcome:
        """Idempotent."""
        return await self._outcome("/continue_generation", {})

    async def update_weights_from_disk(
        self, model_path: str | Path, weight_version: str | None = None, abort_all_requests: bool = False
    ) -> Outcome:
        """Loads a checkpoint on every node, or on none; running requests end first (or are aborted)."""
        body = {
            "model_path": str(model_path),
            "weight_version": weight_version,
            "abort_all_requests": abort_all_requests,
        }
        return await self._outcome("/update_weights_from_disk", body, None)

    async def update_weights_from_tensor(
        self,
        named_tensors: Mapping[str, Any] | bytes,
        weight_version: str | None = None,
        mode: UpdateMode = "wait",
    ) -> Outcome:
        """Some or all tensors, by the checkpoint's names, as torch tensors or as the bytes of a safetensors
        file. See docs/control_plane.md for `mode`."""
        if not isinstance(named_tensors, bytes):
            from safetensors.torch import save  # torch is the caller's: an engine itself needs none

            named_tensors = save({name: tensor.contiguous() for name, tensor in named_tensors.items()})
        query = urlencode({"mode": mode} | ({"weight_version": weight_version} if weight_version else {}))
        return await self._outcome(f"/update_weights_from_tensor?{query}", named_tensors, None)

    async def update_weights_from_ipc(
        self, name: str, weight_version: str | None = None, mode: UpdateMode = "wait"
    ) -> Outcome:
        """From a safetensors file in /dev/shm of each node's host; it must stay as it is until the answer."""
        body = {"name": name, "weight_version": weight_version, "mode": mode}
        return await self._outcome("/update_weights_from_ipc", body, None)

    async def update_weights_from_gpu(
        self, memory: Mapping[str, Any], weight_version: str | None = None, mode: UpdateMode = "wait"
    ) -> Outcome:
        """From memory of a GPU of each node's host; it must stay as it is until the answer. `memory`: `gpu`,
        `names`, `dtypes` and `shapes` of /update_weights_from_ipc, see docs/examples/gpu_bucket.py."""
        body = {**memory, "weight_version": weight_version, "mode": mode}
        return await self._outcome("/update_weights_from_ipc", body, None)

    async def init_weights_update_group(
        self,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str = DEFAULT_GROUP,
        backend: str = "gloo",
    ) -> GroupRanks:
        """Every node joins the trainer's process group; rank 0 joins meanwhile. Answers with their ranks."""
        body = {
            "master_address": master_address,
            "master_port": master_port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group_name,
            "backend": backend,
        }
        path = "/init_weights_update_group"
        status, content = await self._connection.bring(self._connection.ask("POST", path, body, None))
        return self._decoded(path, status, content, GroupRanks)

    async def update_weights_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str = DEFAULT_GROUP,
        load_format: str | None = None,
        weight_version: str | None = None,
        mode: UpdateMode = "wait",
    ) -> Outcome:
        """What the trainer's rank 0 broadcasts next, on the group; it broadcasts meanwhile."""
        body = {
            "names": names,
            "dtypes": dtypes,
            "shapes": shapes,
            "group_name": group_name,
            "load_format": load_format,
            "weight_version": weight_version,
            "mode": mode,
        }
        return await self._outcome("/update_weights_from_distributed", body, None)

    async def destroy_weights_update_group(self, group_name: str = DEFAULT_GROUP) -> Outcome:
        return await self._outcome("/destroy_weights_update_group", {"group_name": group_name})

    async def update_weights_from_peer(
        self, peer: str, weight_version: str | None = None, mode: UpdateMode = "wait"
    ) -> Outcome:
        """From the weights that the node at this URL serves, of this cluster or of another one."""
        body = {"peer": peer, "weight_version": weight_version, "mode": mode}
        return await self._outcome("/update_weights_from_peer", body, None)

    async def save_sharded_model(
        self, path: str | Path, pattern: str | None = None, max_size: int | None = None
    ) -> Outcome:
        """The weights that serve as a checkpoint that `--model` loads, in a new folder on a node's host."""
        body = {"path": str(path), "pattern": pattern, "max_size": max_size}
        return await self._outcome("/save_sharded_model", body, None)

    async def save_remote_model(self, url: str) -> Outcome:
        """The weights that serve as a checkpoint that `--model` loads, where fsspec puts it by this URL."""
        return await self._outcome("/save_remote_model", {"url": url}, None)

    async def get_weights_by_name(self, name: str, truncate_size: int = 100) -> Any:  # noqa: ANN401  numbers, nested
        """The first rows of a tensor."""
        return await self._json(
            "POST", "/get_weights_by_name", {"name": name, "truncate_size": truncate_size}
        )

    async def check_weights(self) -> dict[str, Any]:
        """Checksums of each node's weights; `success` is false when the nodes differ."""
        path = "/check_weights"
        ask = self._connection.ask("POST", path, {"action": "checksum"}, None)
        status, content = await self._connection.bring(ask)
        return self._decoded(path, status, content, dict[str, Any])

    async def release_memory_occupation(self, tags: Sequence[str] | None = None) -> Outcome:
        """Gives memory back to the host once nodes are idle: of "weights", "kv_cache", "graphs", or all."""
        return await self._outcome("/release_memory_occupation", {} if tags is None else {"tags": tags}, None)

    async def resume_memory_occupation(self, tags: Sequence[str] | None = None) -> Outcome:
        """Takes it again; requests that came meanwhile go on once everything is back."""
        return await self._outcome("/resume_memory_occupation", {} if tags is None else {"tags": tags}, None)

    async def get_internal_state(self) -> list[dict[str, Any]]:
        """One row for each node: its settings, requests by state, memory, log level, …"""
        answer: dict[str, Any] = await self._json("GET", "/get_internal_state")
        rows: list[dict[str, Any]] = answer["internal_states"]
        return rows

    async def set_internal_state(self, server_args: Mapping[str, int | float | None]) -> Outcome:
        """Changes flags that may be changed while nodes run."""
        return await self._outcome("/set_internal_state", {"server_args": dict(server_args)})

    async def configure_logging(
        self,
        *,
        log_requests: bool | None = None,
        log_requests_level: int | None = None,
        log_level: str | None = None,
    ) -> Outcome:
        """What is None stays as it is. `log_level` is of every process, the others are of the router."""
        body = {
            "log_requests": log_requests,
            "log_requests_level": log_requests_level,
            "log_level": log_level,
        }
        return await self._outcome("/configure_logging", body)

    async def slow_down(self, forward_sleep_time: float | None) -> Outcome:
        """Every node sleeps so many seconds before each forward; None: no more."""
        return await self._outcome("/slow_down", {"forward_sleep_time": forward_sleep_time})

    async def freeze_gc(self) -> Outcome:
        """The garbage collectors of all processes leave alone what lives now."""
        return await self._outcome("/freeze_gc", {})

    async def start_profile(
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
        """Records forwards on all nodes at once, `num_steps` of them (default: 32, at most 256)."""
        body = {
            "output_dir": None if output_dir is None else str(output_dir),
            "num_steps": num_steps,
            "profile_by_stage": profile_by_stage,
            "activities": activities,
            "record_shapes": record_shapes,
            "with_stack": with_stack,
            "profile_id": profile_id,
        }
        return await self._outcome("/start_profile", body)

    async def stop_profile(self) -> ProfileFiles:
        """The traces of each node, and all of them in one file on one clock."""
        path = "/stop_profile"
        status, content = await self._connection.bring(self._connection.ask("POST", path, {}, None))
        return self._decoded(path, status, content, ProfileFiles)

    # ---- HTTP ---------------------------------------------------------------------------------------

    async def _events(self, body: object) -> AsyncGenerator[Answer, None]:
        """Pulled from the connection's loop one by one; what ends this generator ends the request."""
        events = self._connection.stream("/generate", body)
        try:
            while (event := await self._connection.bring(next_event(events))) is not None:
                yield event
        finally:
            self._connection.begin(close_stream(events))

    async def _json(
        self, method: str, path: str, body: object = None, timeout_s: float | None = _CALL_TIMEOUT_S
    ) -> Any:  # noqa: ANN401  JSON is what it is
        status, content = await self._connection.bring(self._connection.ask(method, path, body, timeout_s))
        return self._decoded(path, status, content, Any) if status < 400 else self._no_answer(path, status)

    async def _outcome(self, path: str, body: object, timeout_s: float | None = _CALL_TIMEOUT_S) -> Outcome:
        status, content = await self._connection.bring(self._connection.ask("POST", path, body, timeout_s))
        answer = self._decoded(path, status, content, _OutcomeBody)
        return Outcome(answer.success, answer.message)

    def _decoded(self, path: str, status: int, content: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(content, type=kind)
        except msgspec.DecodeError:
            self._no_answer(path, status)

    def _no_answer(self, path: str, status: int) -> NoReturn:
        raise UnreachableError(f"{self._connection.url}{path}: status {status}, and no answer of pdserve")


def _input_logprobs(answer: Answer) -> list[float | None]:
    return [logprob for logprob, *_ in answer["meta_info"]["input_token_logprobs"]]


def _joined(query: str | Sequence[int], item: str | Sequence[int], item_first: bool) -> str | list[int]:
    if isinstance(query, str) and isinstance(item, str):
        return item + query if item_first else query + item
    if isinstance(query, str) or isinstance(item, str):
        raise TypeError("query and items must both be text, or both token ids")
    return [*item, *query] if item_first else [*query, *item]
