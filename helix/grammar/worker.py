"""The process that compiles grammars of strangers, started by ``compiling.py`` as a script: it imports nothing of ours.

It loads the compiler once. Each grammar then gets a child of its own, forked with the loaded compiler, which the kernel
ends when its time is over or its memory; nothing that a grammar does to it reaches anybody else.
"""

import contextlib
import json
import os
import re
import resource
import signal
import socket
import sys
from multiprocessing.connection import Connection
from typing import Any

_BEFORE = re.compile(r"^(\[[\d:]+\] \S+: )?(Check failed: .*? is false: )?")


def main(handle: int) -> None:
    """Serve compilers' sockets that come over a stream socket, until its other end has gone.

    The vocabulary comes first, as a message.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children leave nothing behind
    control = socket.socket(fileno=handle)
    with contextlib.closing(Connection(os.dup(handle))) as begin:
        vocabulary = json.loads(begin.recv_bytes())
    import xgrammar

    spelled = [each.encode("latin-1") for each in vocabulary["spelled"]]
    info = xgrammar.TokenizerInfo(
        spelled, xgrammar.VocabType.RAW, vocab_size=len(spelled), stop_token_ids=vocabulary["end_ids"]
    )
    control.send(b"\0")
    while True:
        message, handles, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        if os.fork() == 0:
            control.close()
            _answer(Connection(handles[0]), info)
        os.close(handles[0])


def _answer(connection: Connection, info: Any) -> None:
    """Compile what comes over a connection, answer with the result or the reason why there is none, and end.

    One message comes: the seconds and bytes that it may take, the bytes of the largest result, its kind, and its text.
    """
    head, text = connection.recv_bytes().decode().split("\n", 1)
    seconds, num_bytes, most, kind = head.split()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, float(seconds))
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + int(num_bytes),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    said = os.memfd_create("said")
    os.dup2(said, 2)  # the compiler says there what it does not keep of a schema
    try:
        answer = b"+" + _compiled(kind, text, info, int(most))
        if warning := _one_line(os.pread(said, 2000, 0).decode(errors="replace")):
            answer = b"-" + warning.encode()
    except Exception as error:  # the compiler's own, of several types
        answer = b"-" + _one_line(str(error)).encode()
    connection.send_bytes(answer)
    os.kill(os.getpid(), signal.SIGKILL)  # what it was forked from has nothing to be closed here


def _compiled(kind: str, text: str, info: Any, most: int) -> bytes:
    import numpy as np
    import xgrammar

    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    if kind == "json":
        compiled = compiler.compile_json_schema(text)
    elif kind == "call":
        call = json.loads(text)
        inner = {"type": "json_schema", "json_schema": call["schema"]}
        elements = [{"type": "const_string", "value": call["begin"]}, inner]
        elements += [{"type": "const_string", "value": call["end"]}] if call["end"] else []
        compiled = compiler.compile_structural_tag(
            {"type": "structural_tag", "format": {"type": "sequence", "elements": elements}}
        )
    else:
        compiled = compiler.compile_regex(text) if kind == "regex" else compiler.compile_grammar(text)
    mask = np.zeros((1, -(-info.vocab_size // 32)), np.int32)
    xgrammar.GrammarMatcher(compiled).fill_next_token_bitmask(mask)
    if not mask.any():
        raise ValueError("no text that the model's tokens spell matches it")
    data = str(compiled.serialize_json()).encode()
    if len(data) > most:
        raise ValueError(f"it takes {len(data)} bytes when compiled, and may take {most}")
    return data


def _one_line(text: str) -> str:
    """Return the first line of what the compiler said, without its own places."""
    line = _BEFORE.sub("", text.strip().split("\n")[0])
    return line.removeprefix("Warning: ")[:300]


if __name__ == "__main__":
    main(int(sys.argv[1]))
