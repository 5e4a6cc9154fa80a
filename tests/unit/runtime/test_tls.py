"""TLS on HTTP: files that cannot be used, and which servers are believed."""

from __future__ import annotations

import ssl
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from pdserve.runtime.direct_http import open_url
from pdserve.runtime.errors import StartupError
from pdserve.runtime.tls import TlsFiles, Trust
from pdserve.tests.certificates import Certificates
from pdserve.tests.http_server import serving


class _Hello(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def https(files: TlsFiles) -> Iterator[str]:
    """A server on 127.0.0.1 that shows the certificate of `files`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certfile, files.keyfile or None)
    with serving(_Hello) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        yield server.url.replace("http://", "https://")


def hello(url: str, files: TlsFiles) -> bytes:
    with open_url(url, 10.0, Trust(files)) as response:
        return response.read()


# ---- files that cannot be used --------------------------------------------------------------------------


def refusal(**files: object) -> str:
    """The one line that refuses these files."""
    with pytest.raises(StartupError) as caught:
        TlsFiles(**{name: str(path) for name, path in files.items()}).check()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_good_files_say_nothing(certificates: Certificates, tmp_path: Path) -> None:
    files = certificates.issue("127.0.0.1")
    files.check()
    TlsFiles().check()
    TlsFiles(ca_certs=certificates.ca_certs).check()
    both = tmp_path / "both.pem"
    both.write_bytes(Path(files.certfile).read_bytes() + Path(files.keyfile).read_bytes())
    TlsFiles(certfile=str(both)).check()


def test_a_key_without_its_certificate(certificates: Certificates) -> None:
    keyfile = certificates.issue("127.0.0.1").keyfile
    assert refusal(keyfile=keyfile) == f"--ssl-keyfile {keyfile}: give its certificate too, by --ssl-certfile"


def test_a_certificate_without_its_key(certificates: Certificates) -> None:
    certfile = certificates.issue("127.0.0.1").certfile
    assert refusal(certfile=certfile).startswith(f"--ssl-certfile {certfile}: a certificate and its key")


@pytest.mark.parametrize("name", ["certfile", "keyfile", "ca_certs"])
def test_a_file_that_is_not_there(name: str, certificates: Certificates) -> None:
    files = certificates.issue("127.0.0.1")
    given = {"certfile": files.certfile, "keyfile": files.keyfile, name: "/no/such.pem"}
    assert refusal(**given) == f"--ssl-{name.replace('_', '-')} /no/such.pem: No such file or directory"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    assert refusal(ca_certs=tmp_path) == f"--ssl-ca-certs {tmp_path}: Is a directory"


def test_the_key_of_another_certificate(certificates: Certificates) -> None:
    one, other = certificates.issue("127.0.0.1"), certificates.issue("127.0.0.1")
    message = refusal(certfile=one.certfile, keyfile=other.keyfile)
    assert message.endswith(f"--ssl-keyfile {other.keyfile}: the key is not that certificate's")


def test_what_is_no_pem(certificates: Certificates, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no certificate")
    assert "both in PEM format" in refusal(certfile=text, keyfile=certificates.issue("h").keyfile)
    assert refusal(ca_certs=text) == f"--ssl-ca-certs {text}: it holds no certificate in PEM format"


def test_an_encrypted_key_asks_nobody(certificates: Certificates, tmp_path: Path) -> None:
    files = certificates.issue("127.0.0.1")
    key = serialization.load_pem_private_key(Path(files.keyfile).read_bytes(), None)
    encrypted = tmp_path / "encrypted.pem"
    encrypted.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"passphrase"),
        )
    )
    assert "the key is encrypted" in refusal(certfile=files.certfile, keyfile=encrypted)


# ---- who is believed ------------------------------------------------------------------------------------


def test_a_server_is_believed_for_its_name_and_its_ca(certificates: Certificates) -> None:
    with https(certificates.issue("127.0.0.1")) as url:
        assert hello(url, TlsFiles(ca_certs=certificates.ca_certs)) == b"hello"
        for ca_certs in ("", Certificates.new(Path(certificates.ca_certs).parent / "other").ca_certs):
            with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
                hello(url, TlsFiles(ca_certs=ca_certs))


def test_another_name_is_not_believed(certificates: Certificates) -> None:
    with https(certificates.issue("router.example")) as url, pytest.raises(urllib.error.URLError, match="IP"):
        hello(url, TlsFiles(ca_certs=certificates.ca_certs))


def test_on_this_host_our_own_certificate_is_enough(certificates: Certificates) -> None:
    ours = certificates.issue("router.example")
    with https(ours) as url:
        assert hello(url, ours) == b"hello"
        assert hello(url.replace("127.0.0.1", "localhost"), ours) == b"hello"


def test_on_this_host_a_strangers_certificate_is_not(certificates: Certificates) -> None:
    ours, theirs = certificates.issue("router.example"), certificates.issue("127.0.0.1")
    with https(theirs) as url:
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            hello(url, ours)
        both = TlsFiles(certfile=ours.certfile, keyfile=ours.keyfile, ca_certs=certificates.ca_certs)
        assert hello(url, both) == b"hello", "that CA is trusted here"


def test_our_own_certificate_is_for_this_host_alone(certificates: Certificates) -> None:
    trust = Trust(certificates.issue("router.example"))
    assert trust.of("http://127.0.0.1:1") is None
    assert trust.of("https://[") is None
    beside, elsewhere = trust.of("https://127.0.0.1:1"), trust.of("https://router.example")
    assert beside is not None
    assert elsewhere is not None
    assert not beside.check_hostname
    for url in ("https://192.0.2.1", "https://router.example:8000", "https://[2001:db8::1]"):
        assert trust.of(url) is elsewhere
    assert elsewhere.check_hostname
    assert trust.of("https://[::1]:1") is beside


def test_only_the_first_certificate_of_the_chain_is_ours(tmp_path: Path) -> None:
    """What another one of the same CA shows is not ours, though the file names that CA."""
    root = trustme.CA()
    middle = root.create_child_ca()
    ours, theirs = middle.issue_cert("a.example"), middle.issue_cert("b.example")
    paths = []
    for name, leaf in (("ours", ours), ("theirs", theirs)):
        path = tmp_path / f"{name}.pem"
        path.write_bytes(b"".join(blob.bytes() for blob in (leaf.private_key_pem, *leaf.cert_chain_pems)))
        paths.append(str(path))
    with https(TlsFiles(certfile=paths[0])) as url:
        assert hello(url, TlsFiles(certfile=paths[0])) == b"hello"
    with https(TlsFiles(certfile=paths[1])) as url, pytest.raises(urllib.error.URLError):
        hello(url, TlsFiles(certfile=paths[0]))
