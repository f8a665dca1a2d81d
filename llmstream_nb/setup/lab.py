"""Start JupyterLab with what the notebooks need, a Redis and the local model's server; end all together."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from llmstream_nb.llm.local import KEY, address, installed, launch
from llmstream_nb.protocol.wire import LLMStreamError, Names
from llmstream_nb.setup.environment import ROOT, SetupError, say
from llmstream_nb.setup.guard import end, guarded
from llmstream_nb.setup.redis_server import answers, child_environment, choose_redis
from llmstream_nb.setup.restore import NOTEBOOKS, PROJECTOR, STAGE, STAGE_LAB, pristine, set_stage
from llmstream_nb.setup.shared import share

FIRST_NOTEBOOK = "00-ask.ipynb"


def lab(*, port: int | None, base_url: str | None, browser: bool, model: bool, present: bool = False) -> int:
    """Open JupyterLab on the first notebook; return its exit code once it has ended.

    With `present`, for a projector: larger, without side bars, and on copies of the notebooks without outputs.
    Everything it starts is ended with it: on Ctrl-C in order, and by the guards when this process is killed.
    Raises SetupError where JupyterLab could not start.
    """
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)  # `kill`, and a terminal that closes, are as Ctrl-C
    if port and answers("127.0.0.1", port):
        raise SetupError(f"port {port} is in use: choose another --port, or leave it out.")
    for what, why in hindrances():
        raise SetupError(f"{what}: {why}")
    if present:
        set_stage()
    # It takes a second, for an import. JupyterLab has the same to import, and much more, before it shows a notebook.
    threading.Thread(target=trust_notebooks, daemon=True).start()
    with contextlib.ExitStack() as stack:
        url = choose_redis(stack)
        local = start_model(stack) if model else {}
        kernels = Path(sys.prefix, "share", "jupyter")  # this Python's kernel, before any of the user's own
        # Lab's own question about news would cover a corner of the page, its warnings at a kernel's start the address.
        own = str(Path(__file__).with_name("jupyter"))  # and an extension for the course's links and pictures
        screen = str(PROJECTOR) if present else None
        paths = os.pathsep.join(filter(None, [str(kernels), os.environ.get("JUPYTER_PATH"), own, screen]))
        config = os.pathsep.join(filter(None, [os.environ.get("JUPYTER_CONFIG_PATH"), own]))
        servers = {"REDIS_URL": url, **local}
        share(stack, servers)
        environment = child_environment(JUPYTER_PATH=paths, JUPYTER_CONFIG_PATH=config, **servers)
        say("JupyterLab: starting. Ctrl-C in this terminal ends everything.")
        jupyter = guarded(_jupyter_command(port, base_url, browser, present), env=environment)
        stack.callback(end, jupyter)
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    # Windows does not interrupt a wait without end on Ctrl-C.
                    return jupyter.wait(0.5 if os.name == "nt" else None)
        except KeyboardInterrupt:
            say("\nEnding JupyterLab, its kernels and the servers ...")
            return 0


def hindrances() -> Iterator[tuple[str, str]]:
    """What in this environment stops `lab`: the name of a variable, and what there is to say and to do."""
    try:
        Names(os.environ.get("LLMSTREAM_PREFIX", "").strip() or "llmstream")
    except LLMStreamError as error:
        yield "LLMSTREAM_PREFIX", str(error)
    with contextlib.suppress(ImportError):  # not installed yet
        from jupyter_core.paths import jupyter_runtime_dir

        folder = jupyter_runtime_dir()
        there = next(each for each in [Path(folder), *Path(folder).parents] if os.path.exists(each))
        try:
            with tempfile.TemporaryFile(dir=there) as file:
                file.write(bytes(8192))
        except OSError as error:
            yield "HOME", f"{folder} can't be written ({error.strerror}): make room, or set it to a folder of your own"


def trust_notebooks() -> None:
    """Sign the notebooks as they came, as `jupyter trust` does.

    They come with outputs, and JupyterLab takes outputs that were not made here for a stranger's: it would not
    draw widgets from them, nor, after a reload, those of the learner's own runs.
    """
    with contextlib.suppress(Exception):  # without it all works but the reload
        import nbformat
        from nbformat.sign import NotebookNotary

        notary = NotebookNotary()
        for text in [*pristine().values(), *(file.read_bytes() for file in STAGE.glob("*.ipynb"))]:
            notary.sign(nbformat.reads(text, nbformat.NO_CONVERT))


def _jupyter_command(port: int | None, base_url: str | None, browser: bool, present: bool) -> list[str]:
    first, mode = (STAGE if present else NOTEBOOKS) / FIRST_NOTEBOOK, "doc" if present else "lab"
    start = f"/{mode}/tree/{first.relative_to(ROOT).as_posix()}" if first.exists() else f"/{mode}"
    own = str(STAGE_LAB) if present else None  # neither layout nor settings of the host's usual lab
    settings = {
        "Application.log_level": "WARN",  # else the address is hard to find among the news of a start
        "ServerApp.root_dir": str(ROOT),
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.base_url": base_url,
        "ServerApp.open_browser": browser,
        # On one machine no proxy cuts a silent connection, and tornado would warn of the timeout that pings need.
        "ServerApp.tornado_settings": {"ws_ping_interval": 0},
        "ServerApp.allow_root": hasattr(os, "geteuid") and os.geteuid() == 0,
        "ServerApp.jpserver_extensions": "llmstream_nb.setup.address=True",
        "LabApp.default_url": start,
        "LabApp.user_settings_dir": own,
        "LabApp.workspaces_dir": own,
    }
    options = [f"--{name}={value}" for name, value in settings.items() if value is not None]
    return [sys.executable, "-m", "jupyterlab", *options]


def start_model(stack: contextlib.ExitStack) -> dict[str, str]:
    """Start the local model's server, ended with `stack`; return what tells others of it."""
    if not installed():
        say("Model: the local one is not installed; the scripted answers and your own endpoint work.")
        return {}
    process = launch()
    stack.callback(end, process)
    try:
        url = address(process)
    except OSError as error:
        say(f"Model: {error}; the scripted answers and your own endpoint work.")
        return {}
    say(f"Model: SmolLM2-135M (real, small, invents facts) at {url}.")
    return {"LLMSTREAM_LOCAL_URL": url, "LLMSTREAM_LOCAL_KEY": KEY}
