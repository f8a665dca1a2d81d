"""The commands of `python3 -m llmstream_nb`."""

import argparse
import logging
import os
import re
import signal
import sys
import time
import webbrowser
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from llmstream_nb.llm.names import SOURCES
from llmstream_nb.protocol.wire import AnswerNotFound, LLMStreamError
from llmstream_nb.setup import environment
from llmstream_nb.setup.doctor import doctor
from llmstream_nb.setup.environment import say
from llmstream_nb.setup.lab import lab, running_redis
from llmstream_nb.setup.restore import restore

EPILOG = """\
examples:
  python3 -m llmstream_nb lab --no-browser --port 9000
  python3 -m llmstream_nb ask "Why streams, not Pub/Sub?"
  python3 -m llmstream_nb watch 7f3a

The first command sets the kit up in .venv (about 800 MB); later ones start at once. To set up without a
network, fill a folder where there is one, and take it along:
  python3 -m llmstream_nb wheels DIR --for windows --for macos
  python3 -m llmstream_nb lab --wheels DIR

environment variables:
  REDIS_URL          the Redis to use, e.g. redis://:password@host:6379/0; else lab starts one of its own
  LLMSTREAM_PREFIX   the first part of every key (llmstream)
  LLMSTREAM_LLM      who answers unless a question says: scripted, local or openai
  LLMSTREAM_TIMEOUT, LLMSTREAM_FIRST_TIMEOUT
                     seconds that a model may be silent in mid-answer (30), and before its first word (120)
  OPENAI_API_KEY, OPENAI_BASE_URL, OPENAI_MODEL
                     your own endpoint; used only when chosen, and read from a file .env too
  LLMSTREAM_NO_VENV  set it to use the Python that runs this as it is, and set nothing up
"""
# C0 and C1 controls, which move cursors and set titles; changes of writing direction, which disguise text.
UNSAFE = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u202a-\\u202e\\u2066-\\u2069]")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser().parse_args(given)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job is born deaf to it
    for stream in (sys.stdout, sys.stderr):  # a Windows terminal may not have every character
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        if args.command == "doctor":  # it looks, and changes nothing
            python = environment.current()
        else:
            # `watch` in a running notebook must not begin a download that `lab` was told to leave out.
            model = not args.no_model and (args.command in {"lab", "test"} or not environment.VENV.exists())
            python = environment.ensure(dev=args.command == "test", model=model, wheels=args.wheels)
        if python != Path(sys.executable) and not environment.in_venv():
            environment.hand_over(python, given)
        _share_redis(args)
        return int(args.run(args))
    except (environment.SetupError, LLMStreamError, NothingShared) as error:
        say(f"llmstream-nb: {printable(str(error))}")
        return 2 if isinstance(error, (AnswerNotFound, ValueError)) else 1
    except KeyboardInterrupt:
        say("\nStopped.")
        return 130
    except BrokenPipeError:  # `ask … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the last flush is quiet
        return 141


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    common = argparse.ArgumentParser(add_help=False)
    group = common.add_argument_group("set-up")
    group.add_argument("--no-model", action="store_true", help="leave out the local model (about 200 MB)")
    group.add_argument("--wheels", type=Path, metavar="DIR", help="set up from a folder of wheels, no network")

    silence = argparse.ArgumentParser(add_help=False)
    seconds: dict[str, Any] = {"type": _positive(float), "metavar": "SECONDS"}
    text = "how long a model may be silent in mid-answer (LLMSTREAM_TIMEOUT, 30)"
    silence.add_argument("--timeout", help=text, **seconds)
    text = "the same before its first word (LLMSTREAM_FIRST_TIMEOUT, 120)"
    silence.add_argument("--first-timeout", help=text, **seconds)

    top = argparse.ArgumentParser(
        prog="python3 -m llmstream_nb",
        description="Stream an LLM's output through Redis Streams, and learn how it is done.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str, *more: Any) -> argparse.ArgumentParser:
        whole = text[0].upper() + text[1:] + "."
        one = commands.add_parser(name, parents=[common, *more], help=text, description=whole)
        one.set_defaults(run=run)
        return one

    one = command("lab", _lab, "open JupyterLab on the first notebook, with a Redis and a local model")
    one.add_argument("--no-browser", action="store_true", help="print the address instead of opening it")
    one.add_argument("--port", type=int, help="JupyterLab's port (the first free one from 8888)")
    one.add_argument("--base-url", metavar="PATH", help="the path it is served under, e.g. /user/me/")

    one = command("test", _test, "run the tests, and the notebooks as tests")
    one.add_argument("-k", metavar="EXPRESSION", help="only the tests that match, as in pytest")
    one.add_argument("--suite", choices=["core", "notebooks", "browser"], help="only this part")

    one = command("ask", _ask, "ask a question and print the answer as it streams", silence)
    one.add_argument("question")
    one.add_argument("--topic", help="what the model shall be an expert in")
    one.add_argument("--source", choices=SOURCES, help="who answers")
    one.add_argument("--model", help="the model's name at that source")
    how = one.add_mutually_exclusive_group()
    how.add_argument("--no-stream", action="store_true", help="print the answer once it is whole")
    how.add_argument("--pool", action="store_true", help="put it into the queue, for a worker to answer")

    one = command("watch", _watch, "show an answer from its first chunk on, and follow it to its end")
    one.add_argument("id", help="what `ask` printed, or the notebook shows")

    one = command("worker", _worker, "answer the questions of the pool's queue, until Ctrl-C or SIGTERM", silence)
    one.add_argument("--slots", type=_positive(int), default=4, help="how many answers at the same time (4)")
    one.add_argument("--name", help="its name in the consumer group (host, process id and a random part)")
    lease = "a worker silent for so long counts as dead; the same for all of a pool (5)"
    one.add_argument("--lease", type=_positive(float), default=5.0, metavar="SECONDS", help=lease)
    within = "how long it may finish its answers when told to end; the rest goes back to the pool (30)"
    one.add_argument("--within", type=float, default=30.0, metavar="SECONDS", help=within)
    one.add_argument("--with-parent", action="store_true", help=argparse.SUPPRESS)

    text = "serve a web page in which to ask and to watch answers, until Ctrl-C or SIGTERM"
    one = command("web", _web, text, silence)
    one.add_argument("--port", type=int, default=8700, help="on 127.0.0.1 (8700; 0: any free one)")
    one.add_argument("--no-browser", action="store_true", help="print the link instead of opening it")
    one.add_argument("--pool", action="store_true", help="leave the answers to workers, as enqueue does")

    one = command("wheels", _wheels, "fill a folder with all that lab --wheels needs, for other machines too")
    one.add_argument("folder", type=Path, metavar="DIR")
    systems = "for which system; repeat it for several (default: windows, macos and linux)"
    one.add_argument("--for", action="append", dest="platforms", choices=environment.PLATFORMS, help=systems)
    pythons = "for which Python; repeat it for several (default: 3.11 to 3.14)"
    one.add_argument("--python", action="append", dest="pythons", metavar="X.Y", type=_version, help=pythons)

    command("doctor", lambda _: doctor(), "check this machine and say what to do")

    one = command("clear", _clear, "delete answers")
    one.add_argument("id", nargs="*", help="the answers to delete")
    one.add_argument("--all", action="store_true", help="all answers under LLMSTREAM_PREFIX")
    one.add_argument("--yes", action="store_true", help="do not ask first")

    one = command("restore", lambda args: restore(args.name), "bring notebooks back as they came, after a backup")
    one.add_argument("name", nargs="*", help="how the notebook's name begins, e.g. 01 (default: all)")

    one = command("save-outputs", _save_outputs, "for maintainers: run notebooks and save their outputs")
    one.add_argument("name", nargs="*", help="how the notebook's name begins, e.g. 01 (default: all)")
    return top


def _timeouts(args: argparse.Namespace) -> dict[str, Any]:
    return {"timeout": args.timeout, "first_timeout": args.first_timeout}


def _positive(kind: type) -> Any:
    """A type of argument that refuses zero and less."""

    def number(text: str) -> Any:
        value = kind(text)
        if not 0 < value < 1_000_000:
            raise ValueError
        return value

    number.__name__ = "number"  # argparse says: invalid number value
    return number


def _version(text: str) -> str:
    """A type of argument: a Python that the kit runs on."""
    if not re.fullmatch(r"3\.(1[1-9]|[2-9]\d)", text):
        raise argparse.ArgumentTypeError(f"{text!r} should look like 3.13, and be 3.11 or newer")
    return text


class NothingShared(ValueError):
    """No Redis is shared with other processes, so there is nothing to do in this one."""


def _share_redis(args: argparse.Namespace) -> None:
    """Let a command in another terminal see the answers of the lab that runs here."""
    if args.command in {"ask", "watch", "worker", "web", "clear"} and not os.environ.get("REDIS_URL"):
        if url := running_redis():
            os.environ["REDIS_URL"] = url
        elif args.command in {"watch", "worker"} or getattr(args, "pool", False):
            what = "nothing to watch" if args.command == "watch" else "no queue"
            raise NothingShared(f"there is {what}: no lab runs in this folder, and REDIS_URL is not set.")


# ---------------------------------------------------------------------------------------------- answers


def printable(text: str) -> str:
    """Text that can't drive a terminal: without control characters, except newline and tab."""
    return UNSAFE.sub("", text)


def _ask(args: argparse.Namespace) -> int:
    from llmstream_nb import Answer, ask, enqueue

    put: Callable[..., Answer] = enqueue if args.pool else partial(ask, stream=not args.no_stream, **_timeouts(args))
    answer = put(args.question, topic=args.topic, source=args.source, model=args.model)
    say(f"id {answer.id}")
    try:
        return _follow(answer.id, answer)
    except (KeyboardInterrupt, BrokenPipeError):
        answer.stop()
        raise


def _watch(args: argparse.Namespace) -> int:
    from llmstream_nb.answers import connection

    try:
        return _follow(args.id)
    except AnswerNotFound as error:
        prefix = connection.names_of(connection.current()).prefix
        hint = f"Looked under the prefix {prefix!r}. A notebook has its own: LLMSTREAM_PREFIX=nb00 for 00."
        raise AnswerNotFound(f"{error}\n{hint}") from None


def _worker(args: argparse.Namespace) -> int:
    from llmstream_nb import Timing, Worker, connect
    from llmstream_nb.answers import connection
    from llmstream_nb.pool.process import serve

    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    client = connect()
    timing = Timing(lease=args.lease)
    worker = Worker(slots=args.slots, name=args.name, client=client, timing=timing, **_timeouts(args))
    say(f"{worker.name} answers questions from {connection.where(client)}; Ctrl-C ends it.")
    serve(worker, args.within, with_parent=args.with_parent)
    return 0


def _web(args: argparse.Namespace) -> int:
    from llmstream_nb import WebServer, connect
    from llmstream_nb.answers import connection

    client = connect()
    server = WebServer(args.port, client=client, pool=args.pool, **_timeouts(args))
    environment.allow_open_files(8_192)  # each viewer is one
    say(f"Answers are kept in {connection.where(client)}. Ctrl-C ends the server.")
    if args.pool:
        say("Workers write them: python3 -m llmstream_nb worker, in other terminals.")
    if server.base.startswith("/"):
        say("Open this at the host of your JupyterLab's own address, e.g. https://hub.example.org/user/…/proxy/…:")
    print(server.link(), flush=True)  # the link holds the token: only who has it may ask
    if not args.no_browser:
        webbrowser.open(server.link())
    server.run()
    return 0


def _follow(answer_id: str, asked: Any = None) -> int:
    """Print an answer as it comes: its text on standard output, all else on standard error.

    `asked` is the handle of `ask`, where this process writes it: what keeps it from writing, only that can tell.
    """
    from llmstream_nb import read_answer
    from llmstream_nb.protocol import events
    from llmstream_nb.viewing.transcript import Transcript

    transcript = Transcript(answer_id)  # for its words alone
    began, first, chunks = time.monotonic(), None, 0
    for event in read_answer(answer_id):
        match event:
            case events.Text(text=text):
                first, chunks = first or time.monotonic(), chunks + 1
                print(printable(text), end="", flush=True)
            case events.Started() | events.Restarted():
                transcript.take([event])
                if isinstance(event, events.Restarted):
                    chunks = 0
                    say(f"\n[{transcript.takeover or 'Another attempt.'} The answer begins anew.]")
            case events.Gap(missing=missing):
                say(f"\n[{missing} entries are missing here]")
            case events.Interrupted() if asked and asked.failure:
                say("")
                raise asked.failure
            case events.Interrupted():
                say(f"\n[Interrupted. {transcript.silent}]")
            case events.Ended(reason=reason):
                print(flush=True)
                now = time.monotonic()
                times = f"first after {(first or now) - began:.2f} s, all after {now - began:.2f} s"
                say(printable(f"[{reason}: {chunks} chunks, {times}]"))
                return 0
            case events.Failed(error=error, message=message):
                print(flush=True)
                say(printable(f"[failed: {error}: {message}]"))
                return 1
    say("[nobody took over: this is all there is]")
    return 1


def _clear(args: argparse.Namespace) -> int:
    from llmstream_nb import clear

    if bool(args.id) == args.all:
        say("llmstream-nb: name the answers to delete, or say --all.")
        return 2
    ask_first = args.all and not args.yes and sys.stdin.isatty()
    if ask_first and input("Delete all answers? [y/N] ").strip().lower() not in {"y", "yes"}:
        return 1
    say(f"{clear(*args.id)} deleted.")
    return 0


# --------------------------------------------------------------------------------------------- the others


def _lab(args: argparse.Namespace) -> int:
    return lab(port=args.port, base_url=args.base_url, browser=not args.no_browser, model=not args.no_model)


def _wheels(args: argparse.Namespace) -> int:
    from llmstream_nb.setup.wheels import fill  # it needs a package

    return fill(args.folder, args.platforms, args.pythons, model=not args.no_model)


def _test(args: argparse.Namespace) -> int:
    return int(_maintain("suites").run(args.suite, args.k))


def _save_outputs(args: argparse.Namespace) -> int:
    return int(_maintain("save_outputs").save_outputs(args.name))


def _maintain(module: str) -> Any:
    """A module of the checkout's `tests`: it serves those who change the kit, not those who use or read it."""
    sys.path.insert(0, str(environment.ROOT))
    return import_module(f"tests.{module}")
