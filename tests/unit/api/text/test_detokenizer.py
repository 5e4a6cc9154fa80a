"""Streamed pieces joined are the whole text, whatever the ids, the vocabulary and the split."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as RustTokenizer

from pdserve.api.generation import ChoiceDelta
from pdserve.api.text.detokenizer import (
    ByteLevelDecoder,
    Detokenizer,
    StopStrings,
    TextOptions,
    WindowDecoder,
    text_decoder,
)
from pdserve.api.text.pieces import Output, OutputDelta, joined
from pdserve.api.text.tokenization import Tokenizer
from pdserve.messages.sampling import TokenLogprob
from pdserve.tests.unit.api.conftest import byte_level_backend


def byte_fallback_backend() -> RustTokenizer:
    """As Llama 2 and Mistral have it: metaspace pieces, and a token for every byte."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁the", "▁a", "the", "n", "▁▁▁", "é", "▁你", "好", ".", "\N{REPLACEMENT CHARACTER}"]
    backend = RustTokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    return backend


TOKENIZERS = {
    "byte-level": Tokenizer(byte_level_backend()),
    "byte-fallback": Tokenizer(byte_fallback_backend()),
}
KINDS = pytest.mark.parametrize("kind", TOKENIZERS)
token_ids = st.lists(st.integers(0, 10**6), max_size=60)
OUTPUT = Output(0, 0, 0)
stop_lists = st.lists(st.text("abn .<", min_size=1, max_size=4), min_size=1, max_size=4)


def in_vocabulary(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    return [token_id % tokenizer.vocab_size for token_id in ids]


def test_byte_level_vocabularies_are_recognised() -> None:
    assert isinstance(text_decoder(TOKENIZERS["byte-level"], skip_special_tokens=True), ByteLevelDecoder)
    assert isinstance(text_decoder(TOKENIZERS["byte-fallback"], skip_special_tokens=True), WindowDecoder)


@KINDS
@settings(max_examples=300, deadline=None)
@given(ids=token_ids, skip=st.booleans())
def test_pieces_joined_are_the_decoded_ids(kind: str, ids: list[int], skip: bool) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = in_vocabulary(tokenizer, ids)
    decoder = text_decoder(tokenizer, skip_special_tokens=skip)
    pieces = [decoder.push(token_id) for token_id in ids]
    assert "".join([*pieces, decoder.finish()]) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=100, deadline=None)
@given(ids=token_ids, skip=st.booleans())
def test_the_window_decoder_serves_any_vocabulary(ids: list[int], skip: bool) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = in_vocabulary(tokenizer, ids)
    decoder = WindowDecoder(tokenizer, skip)
    pieces = [decoder.push(token_id) for token_id in ids]
    assert "".join([*pieces, decoder.finish()]) == tokenizer.decode(ids, skip_special_tokens=skip)


@KINDS
@pytest.mark.parametrize("text", ["naïve 🙂", "你好 the", "🙂🙂 a", "é"])
def test_output_that_ends_inside_a_character_keeps_its_tail(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    for length in range(len(ids) + 1):
        detokenizer = Detokenizer(tokenizer, TextOptions(), OUTPUT)
        view = detokenizer.push(ChoiceDelta(0, tuple(ids[:length]), finish_reason="length"))
        assert view.content == tokenizer.decode(ids[:length])


def test_no_piece_comes_before_its_character_is_complete() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode("🙂", add_special_tokens=False)
    decoder = text_decoder(tokenizer, skip_special_tokens=True)
    assert [decoder.push(token_id) for token_id in ids] == ["", "", "", "🙂"]


# ---- stop strings -----------------------------------------------------------------------------------


def naive_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Grow the text by one character at a time and look at its end."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            stop = max(ended, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=500, deadline=None)
@given(pieces=st.lists(st.text("abn .", max_size=5), max_size=12), stops=stop_lists)
def test_stops_do_not_depend_on_the_split(pieces: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    shown = ""
    for piece in pieces:
        shown += matcher.push(piece)
        if matcher.matched is not None:
            break
    else:
        shown += matcher.finish()
    assert (shown, matcher.matched) == naive_stop("".join(pieces), stops)


@settings(max_examples=200, deadline=None)
@given(pieces=st.lists(st.text("ab", max_size=3), max_size=8), stops=stop_lists)
def test_no_more_is_held_back_than_may_become_a_stop(pieces: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    given_so_far = shown = ""
    for piece in pieces:
        given_so_far += piece
        shown += matcher.push(piece)
        if matcher.matched is not None:
            return
        held = given_so_far[len(shown) :]
        assert given_so_far == shown + held
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def run(tokenizer: Tokenizer, ids: Sequence[int], sizes: Sequence[int], options: TextOptions) -> OutputDelta:
    """The ids in deltas of these sizes, as one."""
    detokenizer = Detokenizer(tokenizer, options, OUTPUT)
    deltas = []
    position = 0
    for size in [*sizes, len(ids)]:
        part = tuple(ids[position : position + size])
        position += size
        logprobs = tuple(TokenLogprob(token_id, -1.0) for token_id in part)
        reason = "length" if position >= len(ids) else None
        deltas.append(detokenizer.push(ChoiceDelta(0, part, logprobs, reason)))  # type: ignore[arg-type]
        if deltas[-1].finish_reason is not None:
            assert detokenizer.is_finished
            break
    return joined(deltas)


@KINDS
@settings(max_examples=150, deadline=None)
@given(
    ids=st.lists(st.integers(0, 10**6), min_size=1, max_size=30),
    sizes=st.lists(st.integers(1, 5), max_size=10),
    stops=stop_lists,
    include=st.booleans(),
)
def test_text_ids_and_logprobs_do_not_depend_on_the_deltas(
    kind: str, ids: list[int], sizes: list[int], stops: list[str], include: bool
) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = in_vocabulary(tokenizer, ids)
    options = TextOptions(stops=tuple(stops), include_stop=include)
    whole = run(tokenizer, ids, [], options)
    assert run(tokenizer, ids, sizes, options) == whole
    assert [entry.token_id for entry in whole.logprobs] == list(whole.token_ids)
    assert len(whole.text_offsets) == len(whole.token_ids)
    if whole.finish_reason == "stop":
        assert isinstance(whole.matched, str)
        decoded = tokenizer.decode(whole.token_ids)
        assert whole.matched in decoded
        assert decoded.startswith(whole.content)
        assert whole.content.endswith(whole.matched) if include else whole.matched not in whole.content


def test_a_stop_ends_with_the_token_that_completes_it() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode("The quick brown fox", add_special_tokens=False)
    view = run(tokenizer, ids, [1] * len(ids), TextOptions(stops=("k bro",)))
    assert (view.content, view.finish_reason, view.matched) == ("The quic", "stop", "k bro")
    assert tokenizer.decode(view.token_ids) == "The quick brown"
    included = run(tokenizer, ids, [1] * len(ids), TextOptions(stops=("k bro",), include_stop=True))
    assert included.content == "The quick bro"


def test_stops_before_min_tokens_do_not_count() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode("The quick brown fox quick", add_special_tokens=False)
    view = run(tokenizer, ids, [1] * len(ids), TextOptions(stops=("quick",), min_tokens=3))
    assert view.content == "The quick brown fox "


@pytest.mark.parametrize("include", [False, True])
def test_the_text_of_a_stop_token_is_hidden_unless_wanted(include: bool) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = tuple(tokenizer.encode("The fox", add_special_tokens=False))
    options = TextOptions(include_stop=include, skip_special_tokens=False)
    view = Detokenizer(tokenizer, options, OUTPUT).push(ChoiceDelta(0, ids, (), "stop", matched=ids[-1]))
    assert view.token_ids == ids
    assert view.content == tokenizer.decode(ids if include else ids[:-1])
    assert view.matched == ids[-1]


def test_an_end_without_tokens_gives_what_was_held_back() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = tuple(tokenizer.encode("The quick", add_special_tokens=False))
    detokenizer = Detokenizer(tokenizer, TextOptions(stops=("quicker",)), OUTPUT)
    first = detokenizer.push(ChoiceDelta(0, ids))
    last = detokenizer.push(ChoiceDelta(0, (), (), "abort"))
    assert (first.content, last.content, last.finish_reason) == ("The ", "quick", "abort")


def test_offsets_say_where_a_token_begins() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode("The quick", add_special_tokens=False)
    view = run(tokenizer, ids, [1], TextOptions(stops=("zzz",)))
    assert view.text_offsets == (0, 3)


def test_f5_the_space_before_the_first_generated_word_is_kept() -> None:
    """``decode(prompt + ids)`` is ``decode(prompt)`` and the pieces; so echo and answer are one text."""
    tokenizer = TOKENIZERS["byte-fallback"]
    prompt = tokenizer.encode(" the")
    answer = tokenizer.encode(" a")
    shown = Detokenizer(tokenizer, TextOptions(stops=(" a",), include_stop=True), OUTPUT, prompt).push(
        ChoiceDelta(0, tuple(answer), (), "length")
    )
    assert (shown.content, shown.matched) == (" a", " a")
    assert tokenizer.decode([*prompt, *answer]) == tokenizer.decode(prompt) + shown.content


@settings(max_examples=300, deadline=None)
@given(
    words=st.lists(st.sampled_from(["▁the", "▁a", "the", "n", "▁你", "好", "é", "."]), min_size=2),
    data=st.data(),
)
def test_f5_pieces_are_what_the_ids_add_to_the_prompt(words: list[str], data: st.DataObject) -> None:
    tokenizer = TOKENIZERS["byte-fallback"]
    backend = byte_fallback_backend()
    ids = [backend.token_to_id(word) or 0 for word in words]
    cut = data.draw(st.integers(1, len(ids) - 1))
    decoder = text_decoder(tokenizer, skip_special_tokens=True, prompt_ids=ids[:cut])
    pieces = "".join([*(decoder.push(token_id) for token_id in ids[cut:]), decoder.finish()])
    assert tokenizer.decode(ids[:cut]) + pieces == tokenizer.decode(ids)


def test_f5_bytes_of_an_answer_do_not_join_those_of_the_prompt() -> None:
    tokenizer = TOKENIZERS["byte-fallback"]
    backend = byte_fallback_backend()
    prompt = [backend.token_to_id(token) or 0 for token in ("▁the", "<0xF0>", "<0x9F>")]
    decoder = text_decoder(tokenizer, skip_special_tokens=True, prompt_ids=prompt)
    answer = [backend.token_to_id(token) or 0 for token in ("<0xC3>", "<0xA9>", "▁a")]
    assert "".join([*map(decoder.push, answer), decoder.finish()]) == "é a"


def test_f11_a_stop_may_begin_before_min_tokens_and_end_behind() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = [tokenizer.encode(char)[0] for char in "xabcd"]
    for size in (1, 5):
        shown = run(tokenizer, ids, [size] * 5, TextOptions(stops=("abc",), min_tokens=3))
        assert (shown.content, shown.matched) == ("x", "abc")


def test_f11_a_stop_that_completes_before_min_tokens_does_not_count_later() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = [tokenizer.encode(char)[0] for char in "abxb"]
    shown = run(tokenizer, ids, [1] * 4, TextOptions(stops=("abc", "b"), min_tokens=3))
    assert (shown.content, shown.matched) == ("abx", "b")
