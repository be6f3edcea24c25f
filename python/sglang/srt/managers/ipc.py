"""The wire between processes: ZeroMQ over unix-domain sockets, msgpack structs with a schema, nothing pickled."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import zmq
import zmq.asyncio

T = TypeVar("T")

PREFIX, OWNER = "sglang-", "owner.lock"
# Of a directory with its random end, and of a socket in it.
_MAX_NAME_BYTES = len(f"/{PREFIX}12345678/scheduler99999")
# Directory -> the open lock of a living server; the kernel releases it when the process ends in any way.
_locks: dict[str, int] = {}

# A process that waits for messages wakes this often without one, to show its parent and its peers that it lives.
IDLE_WAKE_S = 1.0


class IpcNames(msgspec.Struct, frozen=True):
    """Addresses of the inboxes, one scheduler inbox per DP rank; each is bound by its reader, in one private
    directory."""

    tokenizer: str
    schedulers: tuple[str, ...]
    detokenizer: str
    directory: str

    @classmethod
    def create(cls, dp_size: int = 1) -> IpcNames:
        """Make a directory readable only by this user and name the sockets in it; remove those of killed servers."""
        _remove_ownerless()
        directory = tempfile.mkdtemp(prefix=PREFIX, dir=_parent())
        lock = _locks[directory] = os.open(os.path.join(directory, "lock.new"), os.O_RDWR | os.O_CREAT, 0o600)
        with suppress(OSError):  # a file system without locks: never removed by others
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Renamed once it is locked, so that nobody finds it unlocked.
            os.rename(os.path.join(directory, "lock.new"), os.path.join(directory, OWNER))

        def address(name: str) -> str:
            return f"ipc://{os.path.join(directory, name)}"

        schedulers = tuple(address(f"scheduler{dp_rank}") for dp_rank in range(dp_size))
        return cls(address("tokenizer"), schedulers, address("detokenizer"), directory)

    def remove(self) -> None:
        """Delete the sockets' directory."""
        shutil.rmtree(self.directory, ignore_errors=True)
        if self.directory in _locks:
            os.close(_locks.pop(self.directory))


def _parent() -> Path:
    """The folder for temporary files, or /tmp if paths of sockets in it would be too long for the kernel."""
    folder = Path(tempfile.gettempdir())
    return folder if len(os.fsencode(folder)) <= zmq.IPC_PATH_MAX_LEN - _MAX_NAME_BYTES else Path("/tmp")


def _remove_ownerless() -> None:
    """Delete the directories that killed servers left: those whose lock is free."""
    for path in _parent().glob(f"{PREFIX}*/{OWNER}"):
        with suppress(OSError), path.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent, ignore_errors=True)


def _open_socket(kind: int) -> zmq.Socket[Any]:
    """A socket of any number of waiting messages, which closes without waiting for them to be read."""
    socket: zmq.Socket[Any] = zmq.Context.instance().socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    return socket


class Sender:
    """Writes structs to another process's inbox; never blocks. Those of one call arrive together."""

    def __init__(self, address: str) -> None:
        self._socket = _open_socket(zmq.PUSH)
        self._socket.connect(address)
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, *messages: msgspec.Struct) -> None:
        self._socket.send_multipart([self._encoder.encode(message) for message in messages], copy=False)

    def close(self) -> None:
        self._socket.close()


class Receiver(Generic[T]):
    """This process's inbox; decoding checks every message against the schema ``message_type``."""

    def __init__(self, address: str, message_type: Any) -> None:
        self._socket = _open_socket(zmq.PULL)
        self._socket.bind(address)
        self._decoder = msgspec.msgpack.Decoder(message_type)

    def recv_raw_all(self) -> list[bytes]:
        """All messages that have arrived, undecoded, without waiting."""
        raw: list[bytes] = []
        while True:
            try:
                raw += self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return raw

    def decode(self, raw: bytes) -> T:
        message: T = self._decoder.decode(raw)
        return message

    def recv(self, timeout_s: float | None = None) -> T | None:
        """The next message; waits, but returns None when ``timeout_s`` seconds pass without one."""
        self._socket.rcvtimeo = -1 if timeout_s is None else int(timeout_s * 1000)
        try:
            return self.decode(self._socket.recv())
        except zmq.Again:
            return None

    def wait(self, timeout_s: float) -> bool:
        """Wait until a message has arrived; False after ``timeout_s`` seconds."""
        return bool(self._socket.poll(int(timeout_s * 1000)))

    def close(self) -> None:
        self._socket.close()


class AsyncReceiver(Generic[T]):
    """``Receiver`` for an asyncio loop: bound at once, read after ``start``."""

    def __init__(self, address: str, message_type: Any) -> None:
        self._bound = _open_socket(zmq.PULL)
        self._bound.bind(address)
        self._socket: zmq.asyncio.Socket | None = None
        self._decoder = msgspec.msgpack.Decoder(message_type)

    def start(self) -> None:
        """Read in the running loop."""
        self._socket = zmq.asyncio.Socket.from_socket(self._bound)

    async def recv(self) -> T:
        assert self._socket is not None
        message: T = self._decoder.decode(await self._socket.recv())
        return message

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._bound.close()
