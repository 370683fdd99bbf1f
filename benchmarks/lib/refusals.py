"""A proxy before a Redis that passes everything on, until it is told what to answer instead.

Any error that Redis can utter: what a managed one says in the seconds of a failover, a full disk
or a changed password, without having to bring it about.
"""

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import IO
from urllib.parse import urlsplit

# One of each kind that Redis documents for a server, a cluster or a client that is not in its usual
# state.
REPLIES = {
    "READONLY": "READONLY You can't write against a read only replica.",
    "UNBLOCKED": "UNBLOCKED force unblock from blocking operation, "
    "instance state changed (master -> replica?)",
    "LOADING": "LOADING Redis is loading the dataset in memory",
    "MASTERDOWN": "MASTERDOWN Link with MASTER is down and "
    "replica-serve-stale-data is set to 'no'.",
    "CLUSTERDOWN": "CLUSTERDOWN The cluster is down",
    "TRYAGAIN": "TRYAGAIN Multiple keys request during rehashing of slot",
    "MISCONF": "MISCONF Redis is configured to save RDB snapshots, "
    "but it's currently unable to persist to disk.",
    "OOM": "OOM command not allowed when used memory > 'maxmemory'.",
    "NOAUTH": "NOAUTH Authentication required.",
    "WRONGPASS": "WRONGPASS invalid username-password pair or user is disabled.",
    "NOPERM": "NOPERM User default has no permissions to run this command",
    "NOREPLICAS": "NOREPLICAS Not enough good replicas to write.",
    "BUSY": "BUSY Redis is busy running a script. "
    "You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
    "MAXCLIENTS": "ERR max number of clients reached",
    "EXECABORT": "EXECABORT Transaction discarded because of previous errors.",
    "NOSCRIPT": "NOSCRIPT No matching script. Please use EVAL.",
    "MOVED": "MOVED 3999 127.0.0.1:6381",
    "ASK": "ASK 3999 127.0.0.1:6381",
    "PROTO": "NOPROTO unsupported protocol version",
    "ERR": "ERR internal error",
}


class RefusingProxy:
    """Listens on a port of the loopback; whoever comes is led to the Redis at `port_behind`."""

    def __init__(self, port: int, port_behind: int) -> None:
        self._port_behind = port_behind
        self._reply: bytes | None = None
        self.refused = 0  # commands so far
        self._closing = False
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=256)
        threading.Thread(target=self._accept, name="refusing-proxy", daemon=True).start()

    @contextlib.contextmanager
    def refusing(self, reply: str) -> Iterator[None]:
        """Answer every command with this error for the length of the block."""
        self.refuse(reply)
        try:
            yield
        finally:
            self.relent()

    def refuse(self, reply: str) -> None:
        """Answer every command with this error from now on."""
        self._reply = f"-{reply}\r\n".encode()

    def relent(self) -> None:
        """Pass everything on again."""
        self._reply = None

    def lead_to(self, url: str) -> None:
        """Lead who comes from now on to another server; who is there stays where it is."""
        self._port_behind = urlsplit(url).port or 0

    def close(self) -> None:
        """Let go of everybody."""
        self._closing = True
        for one in (self._listener, *list(self._sockets)):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Pass commands on one by one.

        Answers come from a thread of their own, for a subscriber is told things unasked.
        """
        try:
            server = socket.create_connection(("127.0.0.1", self._port_behind), timeout=5)
        except OSError:
            client.close()
            return
        server.settimeout(None)
        self._sockets |= {client, server}
        threading.Thread(target=self._pass_back, args=(server, client), daemon=True).start()
        stream = client.makefile("rb")
        try:
            while command := _command(stream):
                if (reply := self._reply) is not None:
                    self.refused += 1
                    client.sendall(reply)
                else:
                    server.sendall(command)
        except OSError:
            pass
        finally:
            self._drop(client, server)

    def _pass_back(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while answer := server.recv(65_536):
                client.sendall(answer)
        self._drop(client, server)

    def _drop(self, *sockets: socket.socket) -> None:
        for one in sockets:
            self._sockets.discard(one)
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def _command(stream: IO[bytes]) -> bytes:
    """Read the next command as it was sent, an array of bulk strings; b"" at the end."""
    head = stream.readline()
    if not head.startswith(b"*"):
        return head
    parts = [head]
    for _ in range(int(head[1:])):
        size = stream.readline()
        parts += [size, stream.read(int(size[1:]) + 2)]
    return b"".join(parts)
