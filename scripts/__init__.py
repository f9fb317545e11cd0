"""The commands: each is started from the root of the checkout as ``python -m scripts.NAME`` or under torchrun."""

import signal
import sys

# Importing what a command needs takes seconds, in which Ctrl-C would end in a traceback out of some import. Only where
# a command is being started: Python then has not put its file's name there yet.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
