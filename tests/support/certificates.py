"""Certificates for tests, made by openssl: authorities, and certificates that they sign."""

from __future__ import annotations

import subprocess
from pathlib import Path

# Since Python 3.13, `ssl.create_default_context` verifies strictly by RFC 5280, which requires
# keyUsage of an authority and authorityKeyIdentifier of what it signs.
_EXTENSIONS = "subjectAltName=DNS:localhost,IP:127.0.0.1\nauthorityKeyIdentifier=keyid"


class Authority:
    """One certificate authority with its files in `directory`; `file` is its own certificate.

    Private authorities are often made without `key_usage`.
    """

    def __init__(self, directory: Path, name: str, *, key_usage: bool = True) -> None:
        directory.mkdir(exist_ok=True)
        self._directory, self._name = directory, name
        self.file = directory / f"{name}.pem"
        self._key = directory / f"{name}.key"
        _openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-noenc", "-days", "2", "-subj", f"/CN={name}", "-keyout", str(self._key)),
            *("-addext", "basicConstraints=critical,CA:TRUE"),
            *(("-addext", "keyUsage=critical,keyCertSign") if key_usage else ()),
            *("-out", str(self.file)),
        )

    def sign(self, name: str) -> tuple[Path, Path]:
        """A new certificate for localhost, and its key. The same name replaces the files."""
        certificate = self._directory / f"{name}.pem"
        key = self._directory / f"{name}.key"
        request = self._directory / f"{name}.csr"
        extensions = self._directory / f"{name}.ext"
        fresh = certificate.with_suffix(".new")
        extensions.write_text(_EXTENSIONS)
        _openssl(
            *("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-noenc", "-subj", f"/CN={name}", "-keyout", str(key), "-out", str(request)),
        )
        _openssl(
            *("x509", "-req", "-in", str(request), "-CA", str(self.file), "-CAkey", str(self._key)),
            *("-CAcreateserial", "-days", "2", "-extfile", str(extensions), "-out", str(fresh)),
        )
        fresh.rename(certificate)
        return certificate, key


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=30)
