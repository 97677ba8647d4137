"""Addresses of IPv4 and IPv6: how a host and a port are written, and which address listens for both families."""

import socket

IPV4_ANY, IPV6_ANY = "0.0.0.0", "::"  # noqa: S104 - servers of pods


def host_port(host: str, port: int) -> str:
    """Return `host:port`. An IPv6 address stands in brackets (RFC 3986)."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def any_address() -> str:
    """Return the address that listens for IPv4 and IPv6, or for IPv4 only if the kernel has no IPv6."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind((IPV6_ANY, 0))
    except OSError:
        return IPV4_ANY
    return IPV6_ANY
