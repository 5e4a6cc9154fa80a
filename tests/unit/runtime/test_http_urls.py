from __future__ import annotations

import pytest

from pdserve.runtime.http_urls import url_fault


@pytest.mark.parametrize(
    "url", ["http://h", "https://h:1", "http://10.0.0.1:8100", "http://[::1]:8100", "http://a_b.c"]
)
def test_a_node_s_url(url: str) -> None:
    assert url_fault(url, of_node=True) == ""


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("", "a URL is expected"),
        ("h:8100", "a URL is expected"),
        ("file:///etc/passwd", "a URL is expected"),
        ("ftp://h", "a URL is expected"),
        ("http://", "a URL is expected"),
        ("http://[", "a URL is expected"),
        ("http://h:0", "a URL is expected"),
        ("http://h:65536", "a URL is expected"),
        ("http://h:x", "a URL is expected"),
        ("http://h?q", "a URL is expected"),
        ("http://h#f", "a URL is expected"),
        ("http://h:1 ", "a URL is expected"),
        ("http://h\r\nx: y", "a URL is expected"),
        ("http://user:pw@h:1", "without user and password"),
        ("http://a..b", "'a..b' is no name"),
        ("http://-a", "'-a' is no name"),
        (f"http://{'a' * 64}", "is no name"),
        ("http://h/path", "without a path"),
        ("http://h//", "without a path"),
    ],
)
def test_where_nobody_can_be_asked(url: str, fault: str) -> None:
    assert fault in url_fault(url, of_node=True)


def test_others_may_have_a_path() -> None:
    assert url_fault("http://proxy/llm") == ""
