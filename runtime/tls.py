"""TLS on HTTP: what a server of ours shows to its clients, and which servers a client of ours believes."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from functools import cached_property
from ipaddress import ip_address
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import psutil

from .errors import StartupError

_END_OF_CERTIFICATE = "-----END CERTIFICATE-----"


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Paths of PEM files; empty where there is none."""

    certfile: str = ""  # a server's: its own certificate, then those that lead to a CA's
    keyfile: str = ""  # the certificate's; empty: it is in `certfile` too
    ca_certs: str = ""  # who signs the certificates of servers that are asked; empty: whom the system trusts

    @property
    def scheme(self) -> str:
        """Of the URLs of a server with these files."""
        return "https" if self.certfile else "http"

    def check(self) -> None:
        """Raises StartupError, one line, for files that cannot be used."""
        if self.keyfile and not self.certfile:
            raise StartupError(f"--ssl-keyfile {self.keyfile}: give its certificate too, by --ssl-certfile")
        for flag, path in (
            ("--ssl-certfile", self.certfile),
            ("--ssl-keyfile", self.keyfile),
            ("--ssl-ca-certs", self.ca_certs),
        ):
            if path:
                _require_readable(flag, path)
        if self.certfile:
            self._check_chain()
        if self.ca_certs:
            try:
                ssl.create_default_context(cafile=self.ca_certs)
            except ssl.SSLError as error:
                raise StartupError(
                    f"--ssl-ca-certs {self.ca_certs}: it holds no certificate in PEM format"
                ) from error

    def _check_chain(self) -> None:
        given = f"--ssl-certfile {self.certfile}"
        if self.keyfile:
            given += f" and --ssl-keyfile {self.keyfile}"
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                self.certfile, self.keyfile or None, _refuse_to_decrypt
            )
        except ssl.SSLError as error:
            reason = {
                "KEY_VALUES_MISMATCH": "the key is not that certificate's",
                "KEY_TYPE_MISMATCH": "the key is not that certificate's",
                "EE_KEY_TOO_SMALL": "the key is too short to be safe",
            }.get(error.reason or "", "a certificate and its key are expected, both in PEM format")
            raise StartupError(f"{given}: {reason}") from error


class Trust:
    """Which https servers are believed: those with a certificate for the URL's name, signed by one of
    `ca_certs` or by whom the system trusts.

    A server at an address of this host is known by our own certificate instead, where we have one, or by any
    that `ca_certs` signed: the processes that `pdserve up` starts reach one another by addresses that a
    public certificate does not name.
    """

    def __init__(self, files: TlsFiles) -> None:
        """Raises nothing for files that were checked."""
        self._files = files

    def of(self, url: str) -> ssl.SSLContext | None:
        """To connect to the server at `url` with; None where that is not https, or no URL at all. Does not
        block: what name is this host's, other than localhost, is not asked."""
        try:
            parts = urlsplit(url)
        except ValueError:  # a bracket that is not closed
            return None
        if parts.scheme != "https":
            return None
        host = parts.hostname or ""
        if self._files.certfile and (host == "localhost" or _is_of_this_host(host)):
            return self._beside
        return self._by_name

    @cached_property
    def _by_name(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self._files.ca_certs or None)

    @cached_property
    def _beside(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it need not be signed by itself
        own, end, _ = Path(self._files.certfile).read_text().partition(_END_OF_CERTIFICATE)
        context.load_verify_locations(cadata=own[own.index("-----BEGIN CERTIFICATE") :] + end)
        if self._files.ca_certs:
            context.load_verify_locations(cafile=self._files.ca_certs)
        return context


NO_TLS = TlsFiles()
SYSTEM_TRUST = Trust(NO_TLS)


def _is_of_this_host(host: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:  # a name
        return False
    own = (entry.address for entries in psutil.net_if_addrs().values() for entry in entries)
    return address.is_loopback or str(address) in own


def _require_readable(flag: str, path: str) -> None:
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise StartupError(f"{flag} {path}: {error.strerror}") from error


def _refuse_to_decrypt() -> NoReturn:
    raise StartupError("--ssl-keyfile: the key is encrypted, and nobody is there to type its passphrase")
