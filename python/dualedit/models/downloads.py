"""A picture from the web: bounded in bytes and seconds, kept from the local network where that matters."""

from __future__ import annotations

import ipaddress
import socket
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

MAX_BYTES = 32 * 2**20
SECONDS = 20.0
_PIECE = 2**16


def is_address(text: str) -> bool:
    """Whether a text is the address of something on the web."""
    return text.lower().startswith(("http://", "https://"))


def download(
    url: str, max_bytes: int = MAX_BYTES, seconds: float = SECONDS, public_only: bool = False
) -> bytes:
    """The bytes behind an http or https address.

    Args:
        max_bytes: more is refused, whatever the server announces.
        seconds: for all of it, redirections included.
        public_only: refuse addresses of this machine and of private networks, for a service that strangers
            hand addresses to. Names are resolved before the connection, so it does not replace a firewall.

    Raises:
        ValueError: another kind of address, one that is refused, a server that does not answer in time or
            answers with an error, or too many bytes.
    """
    if not is_address(url):
        raise ValueError(f"url={_short(url)}: only http and https addresses are downloaded.")
    opener = urllib.request.build_opener(_Redirects(public_only))
    opener.addheaders = [("User-Agent", "dualedit")]
    end = time.monotonic() + seconds
    pieces, size = [], 0
    try:
        _check_host(url, public_only)
        with opener.open(url, timeout=seconds) as answer:
            while piece := answer.read1(_PIECE):
                pieces.append(piece)
                size += len(piece)
                if size > max_bytes:
                    raise ValueError(f"url={_short(url)} has more than {max_bytes} bytes, the limit.")
                if time.monotonic() > end:
                    raise TimeoutError(f"not done after {seconds:g} s")
    except (OSError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", None) or error
        raise ValueError(f"url={_short(url)} cannot be downloaded: {reason}") from error
    return b"".join(pieces)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections, each of them checked like the first address."""

    def __init__(self, public_only: bool):
        self.public_only = public_only

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not is_address(newurl):
            raise ValueError(f"url={_short(newurl)}: only http and https addresses are downloaded.")
        _check_host(newurl, self.public_only)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_host(url: str, public_only: bool) -> None:
    if not public_only:
        return
    parts = urlsplit(url)
    for found in socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM):
        if not ipaddress.ip_address(found[4][0].partition("%")[0]).is_global:
            raise ValueError(f"url={_short(url)} is on this machine or a private network: refused.")


def _short(url: str) -> str:
    return repr(url if len(url) <= 80 else f"{url[:40]}...{url[-40:]}")
