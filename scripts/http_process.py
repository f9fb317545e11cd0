"""The HTTP process of scripts.serve, which starts it: python -m scripts.http_process LINK_FD LISTENER_FD."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import traceback


def main() -> None:
    """Serve until rank 0 hangs up, and end at once then: a thread that still renders a template holds up nothing."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # rank 0 decides
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s http %(levelname)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    # transformers would load torch for its tokenizers, which need none, and say so where it is missing
    sys.modules["torch"] = None  # type: ignore[assignment]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from helix.serving.process import run

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
