"""What of a version must travel, given the version that was sent before; after a failure nothing is taken for known."""

from torch import Tensor

from sync.delta import apply, encode, num_changed
from sync.frame import NO_BASE, Frame, Kind
from sync.layout import Bucket


class Changes:
    """The sender's memory of the last version: its bytes, on the host."""

    def __init__(self, num_buckets: int, full_every: int) -> None:
        self._full_every = full_every
        self._previous: list[Tensor | None] = [None] * num_buckets
        self._base: int | None = None  # the version of those bytes, once all are of one
        self._travels_from: int | None = None  # what the version now under way is a change of; None: sent in full
        self._num_since_full = 0
        self.num_changed: int | None = None
        """Elements that differ from the version before; None when a version is sent in full."""

    def begin(self, full: bool) -> None:
        """A version is under way: in full when asked, due, or nothing is known."""
        due = self._num_since_full + 1 >= self._full_every
        self._travels_from = None if full or due else self._base
        self._base = None
        self.num_changed = None if self._travels_from is None else 0

    def frames(self, index: int, bucket: Bucket, payload: Tensor) -> list[Tensor]:
        """What to put on the wire for a bucket; `payload` is its bytes, and goes itself when it is sent in full."""
        host, previous = payload.cpu(), self._previous[index]
        if self._travels_from is None or previous is None:
            return self._full(index, host, payload)
        patch = encode(previous, host, bucket.itemsize)
        count = num_changed(patch)
        self.num_changed = (self.num_changed or 0) + count
        if count and patch.numel() >= payload.numel():
            return self._full(index, host, payload)
        if count == 0:
            return [Frame(Kind.SAME, 0, self._travels_from).to_tensor(payload.device)]
        apply(patch, previous)
        frame = Frame(Kind.PATCH, patch.numel(), self._travels_from)
        return [frame.to_tensor(payload.device), patch.to(payload.device)]

    def sent(self, version: int) -> None:
        """The version under way was `version`, and all of it went out: the next one can build on it."""
        self._num_since_full = 0 if self._travels_from is None else self._num_since_full + 1
        self._base = version

    def _full(self, index: int, host: Tensor, payload: Tensor) -> list[Tensor]:
        previous = self._previous[index]
        self._previous[index] = host.clone() if previous is None else previous.copy_(host)
        return [Frame(Kind.FULL, payload.numel(), NO_BASE).to_tensor(payload.device), payload]
