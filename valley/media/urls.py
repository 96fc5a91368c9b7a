"""URLs given by strangers: parsed once and strictly, so that all who use one read it alike."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urljoin

from valley.errors import RefusedMediaError
from valley.media.addresses import Address, parse_address

NAME = "url"
"""What errors call a file until the caller names it."""
DEFAULT_PORTS = {"http": 80, "https": 443}

_MAX_CHARACTERS = 8192
_PRINTABLE = re.compile(r"[!-\[\]-~]+")
"""ASCII without blanks, control characters and the backslash, which some parsers take for a slash."""
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?#]*)(?P<rest>[^#]*)(?:#.*)?")
_AUTHORITY = re.compile(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9._-]+))(?::(?P<port>[0-9]{1,5}))?")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


@dataclass(frozen=True)
class Target:
    """What a URL asks for.

    Attributes:
        scheme: http or https.
        host: in lower case; an IPv6 address without brackets.
        port: the stated one or the scheme's.
        path: with the query; the fragment is dropped.
        address: the host, where that is an address and no name.
    """

    scheme: str
    host: str
    port: int
    path: str
    address: Address | None

    @property
    def url(self) -> str:
        """The URL in the one form that is used from here on."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.path}"


def parse_url(text: str, schemes: Collection[str] = ("https",), ports: Collection[int] = (80, 443)) -> Target:
    """Returns what an absolute URL asks for.

    Args:
        text: as the stranger wrote it. Nothing is stripped or mended.
        schemes: those allowed, of http and https.
        ports: those allowed.

    Raises:
        RefusedMediaError: the URL is malformed or ambiguous, has credentials, or its scheme or port is not allowed.
    """
    if len(text) > _MAX_CHARACTERS:
        raise RefusedMediaError(NAME, f"a URL of more than {_MAX_CHARACTERS} characters")
    if not _PRINTABLE.fullmatch(text):
        raise RefusedMediaError(NAME, "a URL with blanks, control characters, backslashes or characters beyond ASCII")
    if (parts := _URL.fullmatch(text)) is None:
        raise RefusedMediaError(NAME, "not an absolute URL")
    scheme = parts["scheme"].lower()
    if scheme not in schemes:
        raise RefusedMediaError(NAME, f"only {' and '.join(schemes)} URLs are fetched")
    if "@" in parts["authority"]:
        raise RefusedMediaError(NAME, "a URL with credentials")
    if (authority := _AUTHORITY.fullmatch(parts["authority"])) is None:
        raise RefusedMediaError(NAME, "a URL without a valid host and port")
    port = int(authority["port"] or DEFAULT_PORTS[scheme])
    if port not in ports:
        raise RefusedMediaError(NAME, f"only ports {', '.join(map(str, ports))} are fetched from")
    host, address = _host((authority["ipv6"] or authority["host"]).lower(), is_ipv6=bool(authority["ipv6"]))
    path = parts["rest"] if parts["rest"].startswith("/") else f"/{parts['rest']}"
    return Target(scheme, host, port, path, address)


def redirected(target: Target, location: str) -> str:
    """Returns the URL that a redirect leads to, still to be parsed.

    Raises:
        RefusedMediaError: it has characters that joining would drop without a word.
    """
    if not _PRINTABLE.fullmatch(location):
        raise RefusedMediaError(NAME, "a redirect to a malformed URL")
    try:
        return urljoin(target.url, location)
    except ValueError:
        raise RefusedMediaError(NAME, "a redirect to a malformed URL") from None


def _host(text: str, *, is_ipv6: bool) -> tuple[str, Address | None]:
    """A name, or an address in its standard form: not as one number, in hexadecimal, in octal or shortened."""
    if is_ipv6 or _NUMBER.fullmatch(text.rpartition(".")[2]):
        try:
            return text, parse_address(text)
        except ValueError:
            raise RefusedMediaError(NAME, "its host is not an address in standard form") from None
    if len(text) > 253 or not all(_LABEL.fullmatch(label) for label in text.split(".")):
        raise RefusedMediaError(NAME, "its host is not a valid name")
    return text, None
