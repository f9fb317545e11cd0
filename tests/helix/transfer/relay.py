"""What stands in the network between the two ends of a connection: it reads, keeps, adds and cuts bytes."""

import socket
import threading
import time
from contextlib import suppress

# Frames of ZMTP 3.1 as a peer with other keys would make them: one of a message, and headers of longer ones.
FORGED = bytes([0, 100]) + b"\x07MESSAGE" + b"\xff" * 8 + bytes(84)
OVERSIZED = b"\x02" + (1 << 30).to_bytes(8, "big") + bytes(100)
TRUNCATED = b"\x02" + (1 << 10).to_bytes(8, "big") + b"\x07MESSAGE" + bytes(50)


class Relay:
    """Passes on what a connector and a listener say, each connection after the one before.

    Attributes:
        seen, answered: what the connector and the listener said.
        near, far: its sockets to the connector and to the listener.
    """

    def __init__(self, port):
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.seen, self.answered = bytearray(), bytearray()
        self.near = self.far = None
        self.holds = False
        self._target = port
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with suppress(OSError):  # it is closed
            while True:
                self.near, _ = self._server.accept()
                self.far = self._reach()
                for way in ((self.far, self.near, self.answered), (self.near, self.far, self.seen)):
                    threading.Thread(target=self._pump, args=way, daemon=True).start()

    def _reach(self):
        while True:
            with suppress(ConnectionRefusedError):  # nobody listens yet
                return socket.create_connection(("127.0.0.1", self._target))
            time.sleep(0.01)

    def _pump(self, source, target, notes):
        try:
            while data := source.recv(65536):
                notes += data
                if not self.holds:
                    target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def settle(self):
        """Wait until nothing is on its way, so that what is added stands between two frames."""
        before = None
        while before != (now := (len(self.seen), len(self.answered))):
            before = now
            time.sleep(0.05)

    def hang_up(self):
        """End both connections."""
        for sock in (self.near, self.far):
            with suppress(OSError):  # the other thread was first
                sock.shutdown(socket.SHUT_RDWR)

    def close(self):
        for sock in (self.near, self.far, self._server):
            if sock is not None:
                sock.close()
