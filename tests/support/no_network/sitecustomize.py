"""Closes the network to this process and, through PYTHONPATH, to all that it starts; what asks for
it nevertheless is written to the file that ``NETWORK_ASKED`` names.  The machine itself stays open:
ranks meet there."""

import os
import sys
import traceback

HERE = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "", None)
ASKS = {"socket.connect": 1, "socket.sendto": 1, "socket.getaddrinfo": 0, "socket.gethostbyname": 0}


def close(event, arguments):
    if event not in ASKS:
        return
    address = arguments[ASKS[event]]
    if isinstance(address, tuple):
        address = address[0]
    if isinstance(address, bytes):
        address = address.decode()
    if address in HERE or str(address).startswith("/"):
        return
    with open(os.environ["NETWORK_ASKED"], "a") as asked:
        asked.write(f"{event} {address}\n{''.join(traceback.format_stack())}\n")
    raise OSError(f"the network is closed, asked for {address}")


sys.addaudithook(close)
