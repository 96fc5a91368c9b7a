"""Over TLS the host is asked at the address that was checked, under its own name, and must prove that name."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from pathlib import Path

import pytest
from abuse import HOST, Host, Names, assert_tells_nothing, local_fetcher, response, serving

from valley.errors import RefusedMediaError, UnreachableMediaError


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate that `media.example` signed for itself, and its key, as PEM files."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("certificates")
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "cert.pem", folder / "key.pem"


def tls_fetch(certificates: tuple[Path, Path], host: Host, name: str = HOST, **changes: object) -> tuple[bytes, list]:
    """What is fetched by https, and the names that the client asked the server for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificates)
    asked: list[str | None] = []
    context.sni_callback = lambda _, asked_for, __: asked.append(asked_for)

    async def run() -> bytes:
        async with serving(host, tls=context) as port:
            names = Names({HOST: [["127.0.0.1"]], "other.example": [["127.0.0.1"]]})
            return await local_fetcher(port, names, **changes).fetch(f"https://{name}:{port}/a%20b?c=d", "video_url")

    return asyncio.run(run()), asked


def test_the_checked_address_is_asked_under_the_original_name(certificates):
    host = Host(response(b"clip"))

    data, asked = tls_fetch(certificates, host, ca_file=str(certificates[0]))

    assert data == b"clip"
    assert asked == [HOST]
    assert host.requests[0].startswith("GET /a%20b?c=d HTTP/1.1\r\n")
    assert f"\r\nHost: {HOST}:" in host.requests[0]


def test_a_certificate_is_checked(certificates):
    host = Host(response(b"clip"))

    for name, changes in ((HOST, {}), ("other.example", {"ca_file": str(certificates[0])})):
        with pytest.raises(UnreachableMediaError, match="no TLS connection to its host that can be trusted") as caught:
            tls_fetch(certificates, host, name, **changes)
        assert_tells_nothing(caught.value)
    assert not host.requests


def test_a_redirect_from_https_to_http_is_refused_unless_http_is_switched_on(certificates):
    host = Host(response(status="302 Found", Location=f"http://{HOST}/"))

    with pytest.raises(RefusedMediaError, match="only https URLs"):
        tls_fetch(certificates, host, ca_file=str(certificates[0]), schemes=("https",))
