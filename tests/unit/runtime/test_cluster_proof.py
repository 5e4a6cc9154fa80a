"""What a proof of the cluster secret is good for: one request, once, for a while."""

from __future__ import annotations

import base64

import pytest

from pdserve.runtime.cluster_proof import RequestProofs, entry_proof, is_nonce, request_proof

SECRET, OTHER = "s" * 32, "o" * 32
REQUEST = ("POST", "/workers", b'{"url": "http://h:1"}')
NOW = 1000.0


def judged(proofs: RequestProofs, nonce: str, proof: str, now: float = NOW) -> str:
    return proofs.judge(nonce, proof, *REQUEST, now)


def test_a_proof_is_good_once() -> None:
    proofs = RequestProofs(SECRET, life_s=30.0)
    nonce = proofs.nonce(NOW)
    proof = request_proof(SECRET, nonce, *REQUEST)
    assert is_nonce(nonce)
    assert judged(proofs, nonce, proof) == "proven"
    assert judged(proofs, nonce, proof) == "stale", "replayed"
    again = proofs.nonce(NOW)
    assert again != nonce
    assert judged(proofs, again, proof) == "wrong", "of another nonce"


@pytest.mark.parametrize(
    "request_",
    [
        ("DELETE", "/workers", REQUEST[2]),
        ("POST", "/workers/x", REQUEST[2]),
        ("POST", "/workers", b'{"url": "http://h:2"}'),
        ("POST", "/workers", b""),
    ],
)
def test_a_proof_is_good_for_its_request_alone(request_: tuple[str, str, bytes]) -> None:
    proofs = RequestProofs(SECRET, life_s=30.0)
    nonce = proofs.nonce(NOW)
    assert judged(proofs, nonce, request_proof(SECRET, nonce, *request_)) == "wrong"
    assert judged(proofs, nonce, request_proof(SECRET, nonce, *REQUEST)) == "proven", "the nonce is not lost"


@pytest.mark.parametrize("proof", ["", "00", "é" * 64, "A" * 64])
def test_what_is_no_proof_is_wrong(proof: str) -> None:
    proofs = RequestProofs(SECRET, life_s=30.0)
    assert judged(proofs, proofs.nonce(NOW), proof) == "wrong"


def test_another_secret_proves_nothing() -> None:
    proofs = RequestProofs(SECRET, life_s=30.0)
    nonce = proofs.nonce(NOW)
    assert judged(proofs, nonce, request_proof(OTHER, nonce, *REQUEST)) == "wrong"
    assert judged(proofs, nonce, entry_proof(SECRET, nonce, REQUEST[2])) == "wrong", "for another use"


def test_a_nonce_ages() -> None:
    proofs = RequestProofs(SECRET, life_s=10.0)
    nonce = proofs.nonce(NOW)
    proof = request_proof(SECRET, nonce, *REQUEST)
    assert judged(proofs, nonce, proof, NOW + 10.1) == "stale"
    assert judged(proofs, nonce, proof, NOW + 9.9) == "proven"
    assert judged(proofs, nonce, proof, NOW + 10.0) == "stale", "it is remembered for as long as it is fresh"


def test_a_nonce_is_of_this_process_and_written_as_it_was_given() -> None:
    proofs = RequestProofs(SECRET, life_s=30.0)
    nonce = proofs.nonce(NOW)
    content = base64.urlsafe_b64decode(nonce)
    later = base64.urlsafe_b64encode(b"\x7f" + content[1:]).decode()
    other_bits = nonce[:-2] + chr(ord(nonce[-2]) + 1) + nonce[-1]
    assert base64.urlsafe_b64decode(other_bits) == content, "the last bits of base64 that say nothing"
    for foreign in (RequestProofs(SECRET, life_s=30.0).nonce(NOW), later, other_bits, "", "x", "é", "A" * 76):
        assert judged(proofs, foreign, request_proof(SECRET, foreign, *REQUEST)) == "stale"


def test_nonces_that_are_remembered_are_bounded() -> None:
    proofs = RequestProofs(SECRET, life_s=10.0, max_spent=3)

    def prove(now: float) -> str:
        nonce = proofs.nonce(now)
        return judged(proofs, nonce, request_proof(SECRET, nonce, *REQUEST), now)

    assert [prove(NOW + i) for i in range(4)] == ["proven", "proven", "proven", "busy"]
    assert prove(NOW + 10.5) == "proven", "the first is too old to be used again"
    assert prove(NOW + 10.5) == "busy"
    for _ in range(10):
        nonce = proofs.nonce(NOW)
        assert judged(proofs, nonce, "00", NOW + 10.5) in ("stale", "wrong"), "these cost nothing"


def test_the_proof_of_an_entry_is_of_its_nonce_and_all_of_it() -> None:
    proof = entry_proof(SECRET, "n" * 16, b"{}")
    others = [
        entry_proof(OTHER, "n" * 16, b"{}"),
        entry_proof(SECRET, "m" * 16, b"{}"),
        entry_proof(SECRET, "n" * 16, b"{ }"),
    ]
    assert proof not in others
    assert not any(is_nonce(text) for text in ("", "n" * 15, "n" * 16 + "\n", "n n" * 8, "n" * 257, "é" * 16))
