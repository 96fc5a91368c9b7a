"""API keys: made here, kept as hashes, compared in constant time."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

import yaml

from valley.errors import SettingsError

_PREFIX = "valley-"
_LONGEST = 256
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def make_key(file: Path, name: str) -> str:
    """Makes a key and adds its hash to a file that only its owner may read; the key itself is kept nowhere.

    Args:
        file: of keys; made if there is none.
        name: whom the key is for, as logs call it.

    Raises:
        SettingsError: a name that cannot be used, or is in use.
    """
    hashes = _read(file) if file.exists() else {}
    if not _NAME.fullmatch(name) or name in hashes:
        raise SettingsError(
            [f"name: expected letters, digits, . _ or -, and none of {', '.join(hashes) or '-'}: {name!r}"]
        )
    key = _PREFIX + secrets.token_urlsafe(32)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    part.unlink(missing_ok=True)  # one that was left behind might be for all to read
    part.touch(mode=0o600, exist_ok=False)
    part.write_text(yaml.safe_dump({**hashes, name: _hash(key)}))
    part.replace(file)
    return key


class Keys:
    """The keys that a server accepts.

    Args:
        file: as `make_key` writes it.

    Raises:
        SettingsError: it cannot be read, or holds no key.
    """

    def __init__(self, file: Path) -> None:
        self._hashes = _read(file)
        if not self._hashes:
            raise SettingsError([f"keys: {file} holds no key"])

    def name_of(self, authorization: str) -> str | None:
        """Returns whose key an `Authorization` header holds, as a bearer token or as the password of Basic.

        Every key is compared, and in constant time, whatever comes.
        """
        found = None
        digest = _hash(_key_in(authorization))
        for name, known in self._hashes.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found


def _read(file: Path) -> Mapping[str, str]:
    try:
        hashes = yaml.safe_load(file.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError([f"keys: {file} cannot be read: {type(error).__name__}"]) from None
    is_right = isinstance(hashes, dict) and all(
        isinstance(name, str) and isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)
        for name, value in hashes.items()
    )
    if not is_right:
        raise SettingsError([f"keys: {file} is no file of keys; jobs/make_key.py writes one"])
    return dict(hashes)


def _key_in(authorization: str) -> str:
    scheme, _, rest = authorization.partition(" ")
    if len(rest) > _LONGEST:
        return ""
    match scheme.lower():
        case "bearer":
            return rest.strip()
        case "basic":
            try:
                return base64.b64decode(rest, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError, ValueError):
                return ""
        case _:
            return ""


def _hash(key: str) -> str:
    """SHA-256 is enough for keys of 256 random bits, and costs an attacker nothing that he could use."""
    return hashlib.sha256(key.encode()).hexdigest()
