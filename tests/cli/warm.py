"""The command line in a process that is forked from one which has imported everything.

`python -m npuq` takes two seconds of processor time to import torch; a fork takes hundredths. Arguments, environment,
current directory, standard streams and exit are a process's own. What a process does at its start, tests see with
`sys.executable`.

    warm.run("inspect", path)                       # as subprocess.run([sys.executable, "-m", "npuq", …])
    warm.shell("npuq inspect x 2>&-")               # a line of bash in which `npuq` is the command
"""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

# npuq.hub is left out: the hubs' clients read their settings from the environment when they are imported.
# Answers on a socket, one connection a process: {"arguments", "environment", "directory", "streams"} with the open
# ones of the streams 0, 1, 2 beside it; the answer is the exit status. The child is the rest of the program.
_SERVER = """
import importlib, json, os, signal, socket, sys
import torch
from npuq.cli.main import COMMANDS, main
for name in ("convert", "verification", "runtime", "report"):
    importlib.import_module("npuq." + name)
for name in COMMANDS:
    importlib.import_module("npuq.cli." + name)

def serve(listener):
    while True:
        try:
            connection, _ = listener.accept()
        except TimeoutError:  # a process that is killed ends nothing behind it
            if os.getppid() != parent:
                os._exit(0)
            continue
        if os.fork():
            connection.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        message, handles, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:  # somebody asked whether this listens
            os._exit(0)
        request = json.loads(message)
        child = os.fork()
        if child:
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            connection.send(json.dumps(status).encode())
            os._exit(0)
        connection.close()
        listener.close()
        return request, handles

def take_streams(numbers, handles):
    spare = [os.dup2(handle, 100 + number, inheritable=False) for number, handle in zip(numbers, handles)]
    for handle in handles:
        os.close(handle)
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "utf-8").partition(":")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if number not in numbers:
            os.close(number)
            setattr(sys, name, None)
            continue
        os.dup2(100 + number, number)
        os.close(100 + number)
        fallback = "backslashreplace" if name == "stderr" else "strict"
        mode = "r" if name == "stdin" else "w"
        stream = open(number, mode, encoding=encoding, errors=errors or fallback, closefd=False)
        if os.environ.get("PYTHONUNBUFFERED") and number:
            stream.reconfigure(write_through=True)
        setattr(sys, name, stream)

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener.bind(sys.argv[1])
listener.listen(16)
listener.settimeout(5)
parent = os.getppid()
request, handles = serve(listener)
os.environ.clear()
os.environ.update(request["environment"])
os.chdir(request["directory"])
take_streams(request["streams"], handles)
sys.argv = ["npuq", *request["arguments"]]
main()
"""

# The `npuq` of a shell: hands its own streams on. Starts in a fiftieth of a second, for it imports next to nothing.
_CLIENT = """
import json, os, socket, sys
streams = []
for number in (0, 1, 2):
    try:
        os.fstat(number)
        streams.append(number)
    except OSError:
        pass
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect(sys.argv[1])
request = {"arguments": sys.argv[2:], "environment": dict(os.environ), "directory": os.getcwd(), "streams": streams}
socket.send_fds(connection, [json.dumps(request).encode()], streams)
for number in streams:
    os.close(number)
status = json.loads(connection.recv(100))
os._exit(status if status >= 0 else 128 - status)
"""


@cache
def _files() -> tuple[Path, Path]:
    """The server's socket and the client's program, of a server that lives as long as this process."""
    folder = Path(tempfile.mkdtemp(prefix="npuq-warm-"))
    address, client = folder / "socket", folder / "client.py"
    client.write_text(_CLIENT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(address)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )

    def end() -> None:
        server.kill()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as trial:
        while trial.connect_ex(str(address)):
            assert server.poll() is None, "the server of warm processes has ended"
            time.sleep(0.02)
    return address, client


def command() -> list[str]:
    """What stands for `python -m npuq` in a command."""
    address, client = _files()
    return [sys.executable, "-I", "-S", str(client), str(address)]


def run(*arguments: Any, text: bool = True, **options: Any) -> subprocess.CompletedProcess[Any]:
    """The command line with these arguments; options are those of `subprocess.run`, with output captured by default."""
    if not {"stdout", "stderr"} & set(options):
        options["capture_output"] = True
    return subprocess.run([*command(), *arguments], text=text, timeout=600, **options)


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """A line of bash in which `npuq` is the command, and a failure within a pipe is the line's."""
    function = " ".join(f'"{part}"' for part in command())
    script = f'set -o pipefail; npuq() {{ {function} "$@"; }}\n{line}'
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=600)
