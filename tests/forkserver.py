"""Stages and DVC without seconds of imports each: their processes are forks of one that has imported what others wrote.

`start()` makes a folder with a `python` and a `dvc`. First in PATH, they have `python -m stages.NAME` and `dvc` run in a fork
of this server, with the caller's folder, environment and standard streams; anything else runs as ever. Nothing of the project
is imported before the fork, so each process runs the code of the folder it is started in.
"""
import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

IMPORTED = [
    "torch.utils.checkpoint", "transformers.trainer", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama", "transformers.generation.utils",
    "accelerate.hooks", "datasets", "pandera.pandas", "pyarrow.parquet", "matplotlib.figure", "hydra", "safetensors.torch",
    "huggingface_hub.repocard", "ortools.math_opt.python.mathopt", "dvc.cli", "dvc.commands.repro", "dvc.commands.status",
    "dvc.commands.checkout", "dvc.repo.reproduce", "dvc.stage.run",
]  # fmt: skip

_CLIENT = """#!{python} -IS
import json, os, socket, sys
command = ["dvc"] if sys.argv[0].endswith("/dvc") else sys.argv[2:3] if sys.argv[1:2] == ["-m"] else []
arguments = sys.argv[1:] if command == ["dvc"] else sys.argv[3:]
if not command or not command[0].startswith(("dvc", "stages.")):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([command[0], arguments, os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [b"."], [0, 1, 2])
server.sendall(request)
server.shutdown(socket.SHUT_WR)
sys.exit(int(server.recv(16)))
"""

_started: list[object] = []  # servers and their folders, until this process ends


def start() -> str:
    """Start a server that lives as long as this process; the folder with the `python` and `dvc` that ask it."""
    made = tempfile.TemporaryDirectory(prefix="puzzle-")
    folder = Path(made.name)
    for name in ("python", "dvc"):
        (folder / name).write_text(_CLIENT.format(python=sys.executable, address=str(folder / "socket")))
        (folder / name).chmod(0o755)
    environment = {
        **os.environ,
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # a fork cannot use a GPU that its parent has asked for
        "OMP_NUM_THREADS": "1",  # torch counts its threads when it is imported: in a fork's environment it is too late
    }
    command = [sys.executable, __file__, folder / "socket"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert server.stdout.readline() == b"ready\n"
    _started.extend([made, server])  # the server ends when its standard input is closed
    return made.name


def serve(address: str) -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    while sys.stdin not in select.select([listening, sys.stdin], [], [])[0]:
        client, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            return answer(client)
        client.close()
    return None


def answer(client: socket.socket) -> None:
    """Run what the client asks for in a process of its own; tell it the exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, _, _ = socket.recv_fds(client, 1, 3)
    module, arguments, folder, environment = json.loads(b"".join(iter(lambda: client.recv(1 << 16), b"")))
    if pid := os.fork():
        client.sendall(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
        return
    client.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0], sys.argv = folder, [module, *arguments]
    status = 1
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)  # taking thousands of modules apart takes as long as a stage


if __name__ == "__main__":
    serve(sys.argv[1])
