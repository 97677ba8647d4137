"""The address of the client that sent a request, also if proxies of the platform team forward it (PURE).

A client writes what it wants into X-Forwarded-For, and each proxy appends the address that it has seen. So only the
entries that trusted proxies have appended count: those at the right end.
"""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
HEADER = "X-Forwarded-For"
HOPS = 16  # entries that are read, from the right; no chain of proxies is longer
LONGEST = 64  # characters of an entry: an IPv6 address in brackets with a port has 47
SITE = 64  # bits of an IPv6 address that a provider assigns to one client


class Proxies:
    """The trusted proxies."""

    def __init__(self, networks: Sequence[Network] = ()) -> None:
        self._networks = tuple(networks)

    def trusts(self, peer: str) -> bool:
        """Return whether an address is a trusted proxy's."""
        address = parse(peer)
        return address is not None and self._holds(address)

    def caller(self, peer: str, headers: Sequence[str]) -> str:
        """Return whom a request counts for: the rightmost address that is no trusted proxy's.

        `peer`: the other end of the connection. `headers`: the values of X-Forwarded-For, in their order. A header from
        an untrusted peer is ignored. If an entry is no address, the proxy that has appended it is the caller.
        """
        if not self._networks or not self.trusts(peer):
            return peer
        last = peer
        for entry in _rightmost(headers):
            address = parse(entry)
            if address is None:
                break
            last = _client(address)
            if not self._holds(address):
                break
        return last

    def _holds(self, address: Address) -> bool:
        return any(address in network for network in self._networks if network.version == address.version)


def networks(text: str) -> tuple[Network, ...]:
    """Return the networks of a list of CIDRs or addresses that commas separate. Raises ValueError."""
    found = tuple(ip_network(part.strip()) for part in text.split(",") if part.strip())
    if any(network.prefixlen == 0 for network in found):
        raise ValueError("a network of all addresses trusts every client. List the networks of the proxies")
    return found


def parse(text: str) -> Address | None:
    """Return an address, with or without a port, or None. An IPv4 address in an IPv6 address counts as IPv4."""
    text = text.strip()
    if len(text) > LONGEST:
        return None
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


def _rightmost(headers: Sequence[str]) -> list[str]:
    """Return the entries from right to left, at most HOPS. Long headers are not split as a whole."""
    found: list[str] = []
    for header in reversed(headers):
        found += reversed(header.rsplit(",", HOPS)[-HOPS:])
        if len(found) >= HOPS:
            break
    return found[:HOPS]


def _client(address: Address) -> str:
    """Return the name of a client. An IPv6 client has a whole network of addresses, so its network is its name."""
    if isinstance(address, IPv4Address):
        return str(address)
    return str(ip_network((address, SITE), strict=False))
