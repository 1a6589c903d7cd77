"""What a service allows, and how it says no."""

from __future__ import annotations

from dataclasses import dataclass, field


class Refused(Exception):
    """A request that is not served, with what the client is told.

    Attributes:
        status: of HTTP.
        code: a word for programs.
        retry_after: seconds to wait before trying again, where that may help.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after


@dataclass(frozen=True)
class Limits:
    """Bounds of one request, and of all that wait.

    Attributes:
        body: bytes of a request.
        pixels: of one picture, read from its header before it is decoded.
        pictures: in one request.
        tokens: of one answer; also the length where a request names none.
        questions: that wait for the model; one more is refused.
        batch: questions that are answered together.
        undo: changes that can be taken back; what was removed is kept in memory that long.
        download_bytes, download_seconds: of a picture by its address.
    """

    body: int = 24 * 2**20
    pixels: int = 40_000_000
    pictures: int = 8
    tokens: int = 256
    questions: int = 256
    batch: int = 16
    undo: int = 100
    download_bytes: int = 16 * 2**20
    download_seconds: float = 10.0


@dataclass(frozen=True)
class Settings:
    """How a service is run.

    Attributes:
        name: of the model, as clients ask for it.
        token: that changes of the edits must carry; None asks for none.
        read_only: no changes at all.
        urls: fetch pictures by http and https addresses.
        private_urls: also from this machine and private networks.
        hosts: names by which the service may be called (the Host header), so that a web page elsewhere cannot
            reach a service on the loopback address under a name of its own; "*" allows all.
        page: whether there is a page at /.
        limits: see `Limits`.
    """

    name: str = "dualedit"
    token: str | None = None
    read_only: bool = False
    urls: bool = False
    private_urls: bool = False
    hosts: tuple[str, ...] = ("*",)
    page: bool = False
    limits: Limits = field(default_factory=Limits)
