"""The HTTP process of scripts.serve, which starts it: python -m scripts.http_process LINK_FD LISTENER_FD."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import traceback

from helix.serving.process import run
from parallel.launch import set_up_logging


def main() -> None:
    """Serve until rank 0 hangs up, and end at once then: a thread that still renders a template holds up nothing."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # rank 0 decides
    set_up_logging(0, "http of rank")
    link, listener = (socket.socket(fileno=int(each)) for each in sys.argv[1:])
    code = 0
    try:
        asyncio.run(run(link, listener))
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
