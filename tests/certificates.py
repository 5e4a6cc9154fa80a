"""Certificates of a CA that is made for a test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trustme

from pdserve.runtime.tls import TlsFiles


@dataclass(frozen=True)
class Certificates:
    ca: trustme.CA
    folder: Path

    @classmethod
    def new(cls, folder: Path) -> Certificates:
        folder.mkdir(parents=True, exist_ok=True)
        made = cls(trustme.CA(), folder)
        made.ca.cert_pem.write_to_path(made.ca_certs)
        return made

    @property
    def ca_certs(self) -> str:
        return str(self.folder / "ca.pem")

    def issue(self, *names: str) -> TlsFiles:
        """A certificate for these host names or addresses, and its key."""
        leaf = self.ca.issue_cert(*names)
        number = len(list(self.folder.iterdir()))
        certfile, keyfile = self.folder / f"{number}.pem", self.folder / f"{number}.key"
        leaf.private_key_pem.write_to_path(str(keyfile))
        for place, blob in enumerate(leaf.cert_chain_pems):
            blob.write_to_path(str(certfile), append=place > 0)
        return TlsFiles(certfile=str(certfile), keyfile=str(keyfile))
