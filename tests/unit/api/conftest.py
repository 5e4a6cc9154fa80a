"""A real server on a free port around a FakeGenerator, and a small byte-level tokenizer."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry, generate_latest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer

from pdserve.api.app import build_router_app
from pdserve.api.generation import ModelCard
from pdserve.api.http.bodies import BodyLimits
from pdserve.api.http.in_flight import InFlightRequests
from pdserve.api.http.server import serve
from pdserve.api.text.request_log import RequestLog
from pdserve.api.text.sampling import GenerationDefaults
from pdserve.api.text.timelines import Timeline, Timelines
from pdserve.api.text.tokenization import Tokenizer
from pdserve.messages.timeline import SpanClock
from pdserve.runtime.process import NO_KEYS, AccessKeys
from pdserve.tests.deadline import DEADLINE_S
from pdserve.tests.unit.api.fakes import FakeAdmin, FakeGenerator, FakeSessions

CHAT_TEMPLATE = """{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

TEXT = "The quick brown fox jumps over the lazy dog. Été, 你好, 🙂 and naïve café."
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_level_backend() -> RustTokenizer:
    backend = RustTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT.replace("你好", "").replace("🙂", "")] * 4, trainer)
    backend.add_tokens([AddedToken("<tool call>", special=False, normalized=False)])
    return backend


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(
        byte_level_backend(),
        special_tokens={"eos_token": "<|im_end|>"},
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture
def card(tokenizer: Tokenizer) -> ModelCard:
    return ModelCard(
        name="org/tiny",
        path="/models/tiny",
        model_type="qwen3",
        architectures=("Qwen3ForCausalLM",),
        vocab_size=tokenizer.vocab_size,
        max_model_len=256,
        eos_token_ids=(2,),
        created=1_700_000_000,
        aliases=("tiny", "tiny-lora"),
        embedding_size=4,
    )


@dataclass
class Api:
    """A running server, its fakes, and a client."""

    url: str
    generator: FakeGenerator
    admin: FakeAdmin
    in_flight: InFlightRequests
    exported: list[Timeline]
    http: aiohttp.ClientSession

    async def post(self, path: str, body: object, **headers: str) -> tuple[int, Any]:
        async with self.http.post(self.url + path, json=body, headers=headers) as answer:
            return answer.status, await answer.json()

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.http.get(self.url + path) as answer:
            return answer.status, await answer.json()

    async def stream(self, path: str, body: object) -> str:
        """The whole raw stream."""
        async with self.http.post(self.url + path, json=body) as answer:
            assert answer.status == 200, await answer.text()
            assert answer.headers["content-type"].startswith("text/event-stream")
            return (await answer.read()).decode()


def chunks(raw: str) -> list[dict[str, Any]]:
    """The chunks of a well-formed stream: data lines only, ended by [DONE]."""
    events = raw.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") and "\n" not in event for event in events[:-1])
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds; the test fails if it never does."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 (anything may make it true)
            await asyncio.sleep(0.002)


@pytest.fixture
def keys() -> AccessKeys:
    return NO_KEYS


@pytest.fixture
def is_loopback() -> bool:
    return True


@pytest.fixture
def is_open_cluster() -> bool:
    return False


@pytest.fixture
def root_path() -> str:
    return ""


@pytest.fixture
def allowed_origins() -> tuple[str, ...]:
    return ()


@pytest.fixture
def allow_pickled_tensors() -> bool:
    return False


@pytest.fixture
def seed() -> int | None:
    return None


@pytest.fixture
def limits() -> BodyLimits:
    return BodyLimits(max_bytes=20_000)


@pytest_asyncio.fixture
async def api(
    tokenizer: Tokenizer,
    card: ModelCard,
    keys: AccessKeys,
    is_loopback: bool,
    is_open_cluster: bool,
    limits: BodyLimits,
    root_path: str,
    allowed_origins: tuple[str, ...],
    seed: int | None,
    allow_pickled_tensors: bool,
) -> AsyncIterator[Api]:
    generator = FakeGenerator(tokenizer.encode(" quick brown fox jumps"))
    admin = FakeAdmin()
    in_flight = InFlightRequests()
    registry = CollectorRegistry()
    exported: list[Timeline] = []
    admin.metrics = lambda: generate_latest(registry).decode()
    app = build_router_app(
        card=card,
        tokenizer=tokenizer,
        generation_defaults=GenerationDefaults(temperature=0.6, top_p=0.9),
        generator=generator,
        view=admin,
        membership=admin,
        control=admin,
        weights=admin,
        sessions=FakeSessions(),
        operator=admin,
        request_log=RequestLog(),
        registry=registry,
        in_flight=in_flight,
        timelines=Timelines(SpanClock.start(), registry, card.name, exported.append),
        keys=keys,
        is_loopback=is_loopback,
        is_open_cluster=is_open_cluster,
        limits=limits,
        root_path=root_path,
        allowed_origins=allowed_origins,
        seed=seed,
        allow_pickled_tensors=allow_pickled_tensors,
    )
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = asyncio.create_task(serve(app, listener, in_flight=in_flight))
    async with aiohttp.ClientSession() as http:
        yield Api(url, generator, admin, in_flight, exported, http)
    assert len(in_flight) == 0
    server.cancel()  # at once; test_server.py ends one properly
    await asyncio.wait({server})
    listener.close()
