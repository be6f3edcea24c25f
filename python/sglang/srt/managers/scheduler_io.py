"""How messages reach the scheduler of each rank, and how the first rank of each attention group sends replies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from sglang.srt.distributed.parallel_state import ProcessGroupHandle
from sglang.srt.managers.io_struct import BatchTokenIDOutput, SchedulerMessage, TokenizerMessage, WakeReq
from sglang.srt.managers.ipc import IDLE_WAKE_S, IpcNames, Receiver, Sender


class SchedulerChannel(Protocol):
    """The scheduler's interface to other processes."""

    def receive(self, wait: bool) -> list[SchedulerMessage]: ...

    def to_detokenizer(self, message: BatchTokenIDOutput) -> None: ...

    def to_tokenizer(self, message: TokenizerMessage) -> None: ...


class RankZeroChannel:
    """A DP rank's inbox, shared with ``group``, and its replies; ``peers``: DP ranks that its messages wake."""

    def __init__(self, names: IpcNames, group: ProcessGroupHandle, dp_rank: int = 0, peers: Sequence[int] = ()) -> None:
        self._receiver: Receiver[SchedulerMessage] = Receiver(names.schedulers[dp_rank], SchedulerMessage)
        self._peers = [Sender(names.schedulers[peer]) for peer in peers]
        self._detokenizer = Sender(names.detokenizer)
        self._tokenizer = Sender(names.tokenizer)
        self._group = group
        self._encoder = msgspec.msgpack.Encoder()

    def receive(self, wait: bool) -> list[SchedulerMessage]:
        """Messages that have arrived, in order; with ``wait`` at least one unless the idle interval passes."""
        if wait:
            self._receiver.wait(IDLE_WAKE_S)
        raw = self._receiver.recv_raw_all()
        if self._group.size > 1:
            self._group.broadcast_bytes(self._encoder.encode(raw))
        messages = [self._receiver.decode(data) for data in raw]
        # A wake message does not wake other groups, or they would keep each other awake.
        if wait and self._peers and not all(isinstance(message, WakeReq) for message in messages):
            for peer in self._peers:
                peer.send(WakeReq())
        return messages

    def to_detokenizer(self, message: BatchTokenIDOutput) -> None:
        self._detokenizer.send(message)

    def to_tokenizer(self, message: TokenizerMessage) -> None:
        self._tokenizer.send(message)


class FollowerChannel:
    """The other ranks of a group: they receive the same messages from rank 0, and send nothing."""

    def __init__(self, group: ProcessGroupHandle) -> None:
        self._group = group
        self._list_decoder = msgspec.msgpack.Decoder(list[bytes])
        self._decoder: msgspec.msgpack.Decoder[SchedulerMessage] = msgspec.msgpack.Decoder(SchedulerMessage)

    def receive(self, wait: bool) -> list[SchedulerMessage]:
        raw = self._list_decoder.decode(self._group.broadcast_bytes(None))
        return [self._decoder.decode(data) for data in raw]

    def to_detokenizer(self, message: BatchTokenIDOutput) -> None:
        """Only rank 0 sends."""

    def to_tokenizer(self, message: TokenizerMessage) -> None:
        """Only rank 0 sends."""
