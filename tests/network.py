"""The proxy with the rarer faults, which only tests order: lost requests, halved replies, refusals, late arrivals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmstream_nb.faults import proxy


@dataclass(frozen=True)
class Fault(proxy.Fault):
    """What is to happen to a request that contains `when`."""

    reaches_server: bool = True
    keep: int = 0  # bytes of the reply that still get through
    cut: bool = True  # else the connection stays open, and silent


class Proxy(proxy.Proxy):
    """The kit's proxy, with more to break."""

    _refuse = False

    def drop_reply(self, n: int = 1, when: bytes = b"", *, cut: bool = True) -> None:
        """As the kit's; with `cut=False` the connection stays open, and the client waits until it times out."""
        self._order(n, Fault(when, cut=cut))

    def drop_request(self, n: int = 1, when: bytes = b"") -> None:
        """Cut off the next `n` requests that contain `when` before the server sees a byte of them."""
        self._order(n, Fault(when, reaches_server=False))

    def cut_mid_reply(self, keep: int = 1, when: bytes = b"") -> None:
        """Pass on only `keep` bytes of the reply to the next request that contains `when`, then cut."""
        self._order(1, Fault(when, keep=keep))

    def refuse(self) -> None:
        """Close new connections at once; those that stand stay."""
        self._set(_refuse=True)

    def heal(self, *, late: bool = False) -> None:
        """Behave again, and forget the drops that have not happened.

        Connections that met the blackhole are cut, and what fell into it is lost. With `late=True` it arrives
        now, as TCP would send it again, also the requests of clients that have long given up.
        """
        if late:
            self._set(_blackhole=False)
        self._set(_refuse=False)
        super().heal()

    def _serve(self, link: proxy.Link) -> None:
        if self._refuse:
            self._end(link)
        else:
            super()._serve(link)

    def _take_fault(self, request: bytes, commands: list[list[bytes]]) -> Any:
        fault: Any = super()._take_fault(request, commands)
        if fault and not fault.reaches_server:
            self.dropped += 1
            raise ConnectionAbortedError("cut, as ordered")  # the link ends with it
        return fault

    def _drop(self, link: proxy.Link) -> None:
        fault: Any = link.fault
        kept = link.lost[: fault.keep]
        self.bytes_down += len(kept)
        link.client.sendall(kept)
        if fault.cut:
            super()._drop(link)
            return
        with self._changed:
            self.dropped += 1
            link.fault, link.lost = None, b""
            self._changed.notify_all()
