from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from pdserve.api.text.chat_template import ChatTemplate
from pdserve.api.text.tokenization import Tokenizer
from pdserve.runtime.errors import RequestError, StartupError
from pdserve.tests.unit.api.conftest import CHAT_TEMPLATE, byte_level_backend

TOKENIZER = Tokenizer(byte_level_backend())

QWEN_LIKE = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != 'system' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
    {%- endif %}
    {%- if loop.index > 9 %}{%- break %}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
{%- if enable_thinking is defined %}{{ {'thinking': enable_thinking, 'tag': '<é>'} | tojson }}{% endif %}"""
LLAMA_LIKE = """{{ bos_token }}{% for message in messages %}
{% set content = '[' + message['role'] + '] ' + message['content'] %}
{{ content }}{% if message.role == 'assistant' %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}

{% endfor %}"""
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": 'Hello <there> & "you"'}],
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": " Hi \n"},
        {"role": "assistant", "content": " Well then, "},
    ],
]


def checkpoint(folder: Path, **config: object) -> Path:
    byte_level_backend().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, QWEN_LIKE, LLAMA_LIKE], ids=["plain", "qwen", "llama"])
@pytest.mark.parametrize("chat", CHATS, ids=["user", "three"])
@pytest.mark.parametrize("mode", ["prompt", "none", "continue"])
def test_chats_render_as_transformers_does(
    tmp_path: Path, template: str, chat: list[dict[str, Any]], mode: str
) -> None:
    bos = {"__type": "AddedToken", "content": "<|endoftext|>", "special": True}
    folder = checkpoint(tmp_path, bos_token=bos, eos_token="<|im_end|>", chat_template=template)
    reference = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    expected = reference.apply_chat_template(
        chat,
        chat_template=template,
        tokenize=False,
        enable_thinking=False,
        add_generation_prompt=mode == "prompt",
        continue_final_message=mode == "continue",
    )
    ours = Tokenizer.from_directory(folder).apply_chat_template(
        chat,
        template_kwargs={"enable_thinking": False},
        add_generation_prompt=mode == "prompt",
        continue_final_message=mode == "continue",
    )
    assert ours == expected


def test_the_template_comes_from_its_file_a_list_or_the_config(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "from a list"}]
    folder = checkpoint(tmp_path, chat_template=named)
    assert Tokenizer.from_directory(folder).apply_chat_template(CHATS[0]) == "from a list"
    (folder / "chat_template.jinja").write_text("from its file")
    assert Tokenizer.from_directory(folder).apply_chat_template(CHATS[0]) == "from its file"


def test_a_template_that_is_given_counts_alone(tmp_path: Path) -> None:
    """`--chat-template`: a file, or the template itself."""
    folder = checkpoint(tmp_path, chat_template="{% broken")
    file = tmp_path / "other.jinja"
    file.write_text("{{ messages[0].role }} in a file")
    assert Tokenizer.from_directory(folder, str(file)).apply_chat_template(CHATS[0]).endswith(" in a file")
    assert Tokenizer.from_directory(folder, "{{ 1 + 1 }}").apply_chat_template(CHATS[0]) == "2"


@pytest.mark.parametrize(
    ("given_template", "named"), [("chatml", "chatml cannot be read"), ("{% if %}", "cannot be compiled")]
)
def test_a_template_that_is_given_and_is_none_ends_the_start(
    tmp_path: Path, given_template: str, named: str
) -> None:
    with pytest.raises(StartupError, match=f"--chat-template.*{named}") as error:
        Tokenizer.from_directory(checkpoint(tmp_path), given_template)
    assert "\n" not in str(error.value)


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(checkpoint(tmp_path))
    with pytest.raises(RequestError, match="no chat template") as caught:
        tokenizer.apply_chat_template(CHATS[0])
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[5].content + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0].content / 2 }}",
    ],
)
def test_what_a_template_refuses_is_the_clients_affair(template: str) -> None:
    with pytest.raises(RequestError, match="refused the messages") as caught:
        Tokenizer(byte_level_backend(), chat_template=template).apply_chat_template(CHATS[0])
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_a_developer_is_the_system_to_templates_that_know_no_developer() -> None:
    chat = [{"role": "developer", "content": "x"}]
    old = Tokenizer(byte_level_backend(), chat_template="{{ messages[0].role }}")
    assert old.apply_chat_template(chat) == "system"
    new = Tokenizer(byte_level_backend(), chat_template="{{ messages[0].role }}{# developer #}")
    assert new.apply_chat_template(chat) == "developer"


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_token_bytes_joined_are_the_text(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert b"".join(TOKENIZER.token_bytes(token_id) for token_id in ids) == text.encode()


def test_names_of_tokens() -> None:
    assert TOKENIZER.token_text(0) == "<|endoftext|>"
    partial = TOKENIZER.encode("🙂", add_special_tokens=False)[0]
    assert TOKENIZER.token_text(partial) == "bytes:\\xf0"
    assert TOKENIZER.token_bytes(partial) == b"\xf0"
    added = TOKENIZER.encode("<tool call>", add_special_tokens=False)
    assert [TOKENIZER.token_text(token_id) for token_id in added] == ["<tool call>"]
    assert TOKENIZER.token_bytes(10**6) == b""


async def test_long_texts_are_encoded_in_a_thread() -> None:
    text = "The quick brown fox. " * 500
    assert await TOKENIZER.encode_async(text) == TOKENIZER.encode(text)


@pytest.mark.parametrize(
    "source", ["{{ x|dictsort }}", "{{ x + 1 }}", "{{ x.a.b }}", "{{ raise_exception('no') }}"]
)
def test_whatever_a_chat_template_trips_over_is_the_requests_fault(source: str) -> None:
    template = ChatTemplate(source, {})
    with pytest.raises(RequestError, match="chat template refused the messages"):
        template.render([{"role": "user", "content": "Hi"}], template_kwargs={"x": [1]})


@pytest.mark.parametrize("broken", ["{% if %}", "{{ 'a' + }}", "{% for m in messages %}", b"\xff\xfe"])
def test_f15_a_broken_chat_template_refuses_chats_alone(tmp_path: Path, broken: str | bytes) -> None:
    folder = checkpoint(tmp_path)
    (folder / "chat_template.jinja").write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    tokenizer = Tokenizer.from_directory(folder)
    assert tokenizer.decode(tokenizer.encode("The fox")) == "The fox"
    with pytest.raises(RequestError, match="chat template is unreadable") as refused:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert (refused.value.status, refused.value.code) == (400, "no_chat_template")


@pytest.mark.parametrize("template", [7, [{"name": "default"}, 3], [{"name": "default", "template": 7}]])
def test_f15_a_template_of_another_type_refuses_chats_alone(tmp_path: Path, template: object) -> None:
    tokenizer = Tokenizer.from_directory(checkpoint(tmp_path, chat_template=template))
    with pytest.raises(RequestError, match="chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b'{"model": {"type": "Nothing"}}'])
def test_f15_an_unreadable_tokenizer_file_is_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    folder = checkpoint(tmp_path)
    (folder / name).write_bytes(content)
    if (name, content[:2]) == ("tokenizer_config.json", b'{"'):
        return  # an object, of which nothing is used
    with pytest.raises(StartupError, match=name) as error:
        Tokenizer.from_directory(folder)
    assert "\n" not in str(error.value)


async def test_a_long_text_is_refused_without_encoding_it_whole() -> None:
    longest = max(len(TOKENIZER.token_bytes(token_id)) for token_id in range(TOKENIZER.vocab_size))
    assert TOKENIZER.max_text_bytes(10) == 10 * longest
    assert await TOKENIZER.is_longer_than("x" * (10 * longest + 1), 10)
    assert await TOKENIZER.is_longer_than("🙂" * (10 * longest // 4 + 1), 10)
    assert not await TOKENIZER.is_longer_than("x" * 10, 10)
    single = max(map(TOKENIZER.token_bytes, range(TOKENIZER.vocab_size)), key=len)
    assert not await TOKENIZER.is_longer_than(single.decode(), 1)


@pytest.mark.parametrize("num_repeats", [1, 1_000, 10_000])
async def test_threads_and_batches_change_no_ids_and_no_text(num_repeats: int) -> None:
    text = "The quick brown fox. " * num_repeats
    ids = TOKENIZER.encode(text)
    assert ids == byte_level_backend().encode(text).ids == await TOKENIZER.encode_async(text)
    assert TOKENIZER.decode(ids) == text == await TOKENIZER.decode_async(ids)
