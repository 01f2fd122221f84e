"""The address of a client: the other end of the connection, or the one that a trusted proxy
reports."""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Network = IPv4Network | IPv6Network


def trusted_networks(text: str) -> tuple[Network, ...]:
    """The networks of `--forwarded-allow-ips`: addresses and networks with commas; `*` is all.

    Raises:
        ValueError: one is neither.
    """
    found: list[Network] = []
    for word in (one.strip() for one in text.split(",")):
        if word == "*":
            found += [ip_network("0.0.0.0/0"), ip_network("::/0")]
        elif word:
            try:
                found.append(ip_network(word, strict=False))
            except ValueError as error:
                raise ValueError(
                    f"--forwarded-allow-ips {word} is not an address, allowed: addresses and "
                    "networks such as 10.0.0.0/8, separated by commas, or *"
                ) from error
    return tuple(found)


def client_address(peer: str | None, forwarded: str, trusted: Sequence[Network]) -> str | None:
    """The client's address.

    Args:
        peer: the other end of the connection.
        forwarded: `X-Forwarded-For`, in which each proxy has added whom it has heard; it is read
            from its end, as far as it was written by those that are trusted.
        trusted: where the proxies are.
    """
    client, found = peer, _address(peer or "")
    for word in reversed(forwarded.split(",")):
        if found is None or not any(found in network for network in trusted):
            break
        earlier = _address(word.strip())
        if earlier is None:
            break
        client, found = str(earlier), earlier
    return client


def _address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        found = ip_address(text)
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return mapped or found
