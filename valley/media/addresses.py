"""Which addresses the fetcher may connect to: those of the public internet, and networks that are named in settings."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_NAT64 = IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = IPv6Network("2000::/3")
"""All that is assigned for public use; ::a.b.c.d, 64:ff9b:1::/48 (local NAT64), fc00::/7 and fe80::/10 are outside."""
_NOT_PUBLIC: list[Network] = [
    IPv4Network("168.63.129.16/32"),  # Azure's own services, to its virtual machines alone: certificates, extensions
    IPv4Network("192.0.0.0/24"),  # protocol assignments; Oracle's older cloud has its metadata at 192.0.0.192
    IPv4Network("192.88.99.0/24"),  # relays of 6to4
    IPv6Network("2001::/23"),  # protocol assignments, Teredo among them
    IPv6Network("2002::/16"),  # 6to4
    IPv6Network("3fff::/20"),  # documentation
]
"""What Python, or some versions of it, hold to be global."""


def parse_address(text: str) -> Address:
    """Returns an address; of an IPv4 address in IPv6's clothes (::ffff:a.b.c.d), the IPv4 address.

    Raises:
        ValueError: it is none in its standard form.
    """
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def is_allowed(address: Address, private_networks: Sequence[Network] = ()) -> bool:
    """Whether an address is public, or within one of the networks that are allowed although they are not."""
    return is_public(address) or any(address in network for network in private_networks)


def is_public(address: Address) -> bool:
    """Whether an address belongs to one host of the public internet.

    An address that leads to another one is judged by that (NAT64) or refused (6to4, Teredo: nobody serves media there).
    """
    if isinstance(address, IPv6Address):
        if address in _NAT64:
            return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
        if address not in _GLOBAL_UNICAST or address.scope_id is not None:
            return False
    if any(address in network for network in _NOT_PUBLIC):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)
