"""The commands of `python3 -m llmstream_nb`; what follows here is the end of its --help.

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
  OPENAI_API_KEY, OPENAI_BASE_URL, OPENAI_MODEL, OPENAI_GOES_ON
                     your own endpoint; used only when chosen, and read from a file .env too
  LLMSTREAM_NO_VENV  set it to use the Python that runs this as it is, and set nothing up
"""

import argparse
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

from llmstream_nb.llm.names import SOURCES
from llmstream_nb.protocol.wire import AnswerNotFound, LLMStreamError
from llmstream_nb.setup import environment
from llmstream_nb.setup.doctor import doctor
from llmstream_nb.setup.environment import say
from llmstream_nb.setup.lab import lab
from llmstream_nb.setup.redis_server import show
from llmstream_nb.setup.restore import STAGE, pristine, restore, set_stage
from llmstream_nb.setup.shared import shared

IN_A_CHECKOUT = {
    "lab",
    "test",
    "wheels",
    "save-outputs",
    "film",
    "restore",
    "export",
    "next-group",
    "home",
}  # not where pip has installed the package alone
# C0 and C1 controls, which move cursors and set titles; changes of writing direction, which disguise text.
UNSAFE = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u202a-\\u202e\\u2066-\\u2069]")
MARKS = re.compile("[\\u061c\\u200e\\u200f]")  # of writing direction: a text may need them, but not what is a line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; return its exit code."""
    _open_streams()
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser().parse_args(given)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job is born deaf to it
    try:
        if args.command in IN_A_CHECKOUT and not (environment.ROOT / "pyproject.toml").exists():
            raise environment.SetupError(f"{args.command} works in a copy of the repository only.")
        if args.command in {"doctor", "home"}:  # they need nothing
            python = environment.current()
        else:
            dev, whole = args.command == "test", args.command in {"lab", "test"}
            python = environment.ensure(dev=dev, whole=whole, model=not args.no_model, wheels=args.wheels)
        if python != Path(sys.executable) and not environment.in_venv():
            environment.hand_over(python, given)
        _join_lab(args)
        code = int(args.run(args))
        sys.stdout.flush()  # what can't be written is to be known here
        return code
    except (environment.SetupError, LLMStreamError, CantDo) as error:
        say(f"llmstream-nb: {printable(str(error))}")
        return 2 if isinstance(error, (AnswerNotFound, ValueError)) else 1
    except (KeyboardInterrupt, EOFError):
        say("\nStopped.")
        return 130
    except ImportError as error:
        if not environment.in_venv():
            raise
        say(f"llmstream-nb: {error}. If .venv is damaged, python3 -m llmstream_nb lab mends it.")
        return 1
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the last flush is quiet
        if isinstance(error, BrokenPipeError):  # `ask … | head`
            return 141
        what = error.filename or "standard output"
        say(f"llmstream-nb: {what} can't be used ({error.strerror}): make room, mend its rights, or name another.")
        return 1


def _open_streams() -> None:
    """Put something in place of the streams that were closed: else the next file opened would be printed into."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # This takes the lowest free descriptor, which is `number`. What is printed is an error, not lost.
            os.set_inheritable(os.open(os.devnull, os.O_RDONLY if number == 1 else os.O_RDWR), True)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8"))
        elif number:
            getattr(sys, name).reconfigure(errors="replace")  # a Windows terminal may not have every character


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    common = argparse.ArgumentParser(add_help=False)
    group = common.add_argument_group("set-up")
    group.add_argument("--no-model", action="store_true", help="leave out the local model (about 200 MB)")
    group.add_argument("--wheels", type=Path, metavar="DIR", help="set up from a folder of wheels, no network")

    top = argparse.ArgumentParser(
        prog="python3 -m llmstream_nb",
        description="Stream an LLM's output through Redis Streams, and learn how it is done.",
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        whole = text[0].upper() + text[1:] + "."
        one = commands.add_parser(name, parents=[common], help=text, description=whole)
        one.set_defaults(run=run)
        return one

    one = command("lab", _lab, "open JupyterLab on the first notebook, with a Redis and a local model")
    one.add_argument("--no-browser", action="store_true", help="print the address instead of opening it")
    one.add_argument("--port", type=int, help="JupyterLab's port (the first free one from 8888)")
    one.add_argument("--base-url", metavar="PATH", help="the path it is served under, e.g. /user/me/")
    present = "for a projector: larger, without side bars, on copies of the notebooks without outputs"
    one.add_argument("--present", action="store_true", help=present)

    one = command("test", _test, "run the tests, and the notebooks as tests")
    one.add_argument("-k", metavar="EXPRESSION", help="only the tests that match, as in pytest")
    one.add_argument("--suite", choices=["core", "notebooks", "browser"], help="only this part")

    one = command("ask", _ask, "ask a question and print the answer as it streams")
    one.add_argument("question")
    one.add_argument("--topic", help="what the model shall be an expert in")
    one.add_argument("--follows", metavar="ID", help="the answer that it asks on from")
    one.add_argument("--source", choices=SOURCES, help="who answers")
    one.add_argument("--model", help="the model's name at that source")
    how = one.add_mutually_exclusive_group()
    how.add_argument("--no-stream", action="store_true", help="print the answer once it is whole")
    how.add_argument("--pool", action="store_true", help="put it into the queue, for a worker to answer")

    one = command("watch", _watch, "show an answer from its first chunk on, and follow it to its end")
    one.add_argument("id", help="what `ask` printed, or the notebook shows")

    one = command("worker", _worker, "answer the questions of the pool's queue, until Ctrl-C or SIGTERM")
    one.add_argument("--slots", type=_positive(int), default=4, help="how many answers at the same time (4)")
    one.add_argument("--name", help="its name in the consumer group (host, process id and a random part)")
    lease = "a worker silent for so long counts as dead; the same for all of a pool (5)"
    one.add_argument("--lease", type=_positive(float), default=5.0, metavar="SECONDS", help=lease)
    within = "how long it may finish its answers when told to end; the rest goes back to the pool (30)"
    one.add_argument("--within", type=float, default=30.0, metavar="SECONDS", help=within)
    one.add_argument("--with-parent", action="store_true", help=argparse.SUPPRESS)

    one = command("web", _web, "serve a web page in which to ask and to watch answers, until Ctrl-C or SIGTERM")
    one.add_argument("--port", type=int, default=8700, help="on 127.0.0.1 (8700; 0: any free one)")
    one.add_argument("--no-browser", action="store_true", help="print the link instead of opening it")
    token = "the link's token stands in this file (else in LLMSTREAM_WEB_TOKEN; else it is random)"
    one.add_argument("--token-file", type=_token, metavar="FILE", dest="token", help=token)
    one.add_argument("--pool", action="store_true", help="leave the answers to workers, as enqueue does")

    one = command("wheels", _wheels, "fill a folder with all that lab --wheels needs, for other machines too")
    one.add_argument("folder", type=Path, metavar="DIR")
    systems = "for which system; repeat it for several (default: windows, macos and linux)"
    one.add_argument("--for", action="append", dest="platforms", choices=environment.PLATFORMS, help=systems)
    pythons = "for which Python; repeat it for several (default: 3.11 to 3.14)"
    one.add_argument("--python", action="append", dest="pythons", metavar="X.Y", type=_version, help=pythons)

    text = "check this machine and say what to do"
    one = command("doctor", lambda args: doctor(workshop=args.workshop, wheels=args.wheels), text)
    workshop = "try what can fail on stage, with --wheels DIR a stick too; two minutes at most"
    one.add_argument("--workshop", action="store_true", help=workshop)

    text = "show the address of lab's Redis, with its password, for Redis Insight and redis-cli"
    command("redis", lambda _: show(os.environ["REDIS_URL"]), text)

    one = command("clear", _clear, "delete answers")
    one.add_argument("id", nargs="*", help="the answers to delete")
    one.add_argument("--all", action="store_true", help="all answers under LLMSTREAM_PREFIX")
    one.add_argument("--yes", action="store_true", help="do not ask first")

    one = command("restore", lambda args: restore(args.name), "bring notebooks back as they came, after a backup")
    one.add_argument("name", nargs="*", help="how the notebook's name begins, e.g. 01 (default: all)")

    one = command("export", _export, "make a site of the notebooks as they are saved, to read without running them")
    one.add_argument("folder", type=Path, metavar="DIR")

    one = command("next-group", _next_group, "end all workers, delete all answers, and restore all notebooks")
    one.add_argument("--yes", action="store_true", help="do not ask first")

    one = command("save-outputs", _save_outputs, "for maintainers: run notebooks and save their outputs")
    one.add_argument("name", nargs="*", help="how the notebook's name begins, e.g. 01 (default: all)")
    command("film", _film, "for maintainers: film JupyterLab for the README")

    one = command("home", _home, "for maintainers: make links lead to this repository's place at GitHub")
    one.add_argument("--check", action="store_true", help="change nothing; fail where links, versions or a tag differ")
    return top


def _token(path: str) -> str:
    """A type of argument: the token in this file. What stands in an argument itself, all users of a machine can see."""
    try:
        token = Path(path).read_text("utf-8").strip()
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not token:
        raise argparse.ArgumentTypeError(f"{path} is empty: write a token into it that nobody can guess")
    return token


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


class CantDo(ValueError):
    """What a command can't do as it was called here, and why."""


NOTHING = {
    "watch": "nothing to watch",
    "redis": "no Redis to show",
    "clear": "nothing to clear",
    "next-group": "nothing to end or to clear",
}


def _join_lab(args: argparse.Namespace) -> None:
    """Let a command in another terminal use the servers of the lab that runs here, and see its answers."""
    if args.command in {"ask", "worker", "web", *NOTHING}:
        os.environ.update({name: value for name, value in shared().items() if not os.environ.get(name)})
        if not os.environ.get("REDIS_URL") and (args.command in {"worker", *NOTHING} or getattr(args, "pool", False)):
            nothing = NOTHING.get(args.command, "no queue")
            raise CantDo(f"there is {nothing}: no lab runs in this folder, and REDIS_URL is not set.")


def _agreed(args: argparse.Namespace, question: str) -> bool:
    """Whether the user wants it: by --yes, or by an answer at a terminal. Raises CantDo without either."""
    if not args.yes and not sys.stdin.isatty():
        raise CantDo(f"{question} Here nobody can be asked: say --yes.")
    return args.yes or input(f"{question} [y/N] ").strip().lower() in {"y", "yes"}


# ---------------------------------------------------------------------------------------------- answers


def printable(text: str) -> str:
    """Text that can't drive a terminal: without control characters, except newline and tab."""
    return UNSAFE.sub("", text)


def _ask(args: argparse.Namespace) -> int:
    from llmstream_nb import Answer, ask, enqueue

    put: Callable[..., Answer] = enqueue if args.pool else partial(ask, stream=not args.no_stream)
    answer = put(args.question, follows=args.follows, topic=args.topic, source=args.source, model=args.model)
    say(f"id {answer.id}")
    try:
        return _follow(answer.id, answer)
    except (KeyboardInterrupt, OSError):  # the latter where it can't be printed
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
    worker = Worker(slots=args.slots, name=args.name, client=client, timing=Timing(lease=args.lease))
    say(f"{printable(worker.name)} answers questions from {connection.where(client)}; Ctrl-C ends it.")
    serve(worker, args.within, with_parent=args.with_parent)
    return 0


def _web(args: argparse.Namespace) -> int:
    from llmstream_nb import WebServer, connect
    from llmstream_nb.answers import connection

    client = connect()
    server = WebServer(args.port, client=client, token=args.token, pool=args.pool)
    environment.allow_open_files(8_192)  # each viewer is one
    say(f"Answers are kept in {connection.where(client)}. Ctrl-C ends the server.")
    if args.pool:
        say("Workers write them: python3 -m llmstream_nb worker, in other terminals.")
    if server.base.startswith("/"):
        say("Open this at the host of your JupyterLab's own address, e.g. https://hub.example.org/user/…/proxy/…:")
    print(server.link(), flush=True)  # the link holds the token: only who has it may ask
    with nullcontext() if args.no_browser else server.in_browser():
        server.run()
    return 0


def _follow(answer_id: str, asked: Any = None) -> int:
    """Print an answer as it comes: its text on standard output, all else on standard error.

    `asked` is the handle of `ask`, where this process writes it: what keeps it from writing, only that can tell.
    """
    from llmstream_nb import read_answer
    from llmstream_nb.protocol import events, wire
    from llmstream_nb.viewing.transcript import Transcript

    transcript = Transcript(answer_id, past=True)  # for its words and figures alone
    for event in _print_parts(read_answer(answer_id), transcript):
        transcript.take([event])
        match event:
            case events.Continued():
                say(f"\n[{transcript.takeover or 'Another attempt goes on.'}]")
            case events.Restarted():
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
                say(f"[{' · '.join(filter(None, [wire.printable(reason), transcript.figures]))}]")
                return 0
            case events.Failed(error=error, message=message):
                print(flush=True)
                say(_indented(f"[failed: {wire.printable(error)}: {message}]"))
                return 1
    say("[nobody took over: this is all there is]")
    return 1


def _print_parts(read: Iterable[Any], transcript: Any) -> Iterator[Any]:
    """Print the parts of an answer as they come, and have the transcript take them; yield the events between them."""
    from llmstream_nb.protocol.parts import Part, Reasoning, Refusal, Text, ToolCall, ToolResult, Unknown
    from llmstream_nb.viewing.blocks import drawn

    before: Any = None
    for (kind, _), run in groupby(read, lambda event: (type(event), getattr(event, "kind", ""))):
        if not issubclass(kind, Part):
            yield from run
        else:
            if before is Text:
                say("")
            if kind is Reasoning:
                say(_dim("Thinking …"))
            parts = []
            for part in run:
                parts.append(part)
                if kind is Text:
                    print(printable(part.text), end="", flush=True)
                elif kind in (ToolCall, ToolResult) or (kind is Unknown and len(parts) == 1):
                    say(_in_line(drawn(part)))
            transcript.take(parts)  # at once: to join each to those before would take the square of their length
            if kind in (Reasoning, Refusal):
                say(_in_line(transcript.blocks[-1][1]))
        before = kind


def _in_line(block: dict[str, Any]) -> str:
    """What stands between the text of an answer, in a line."""
    from llmstream_nb.viewing.blocks import BEGINNING, thought

    match block:
        case {"kind": "reasoning"}:
            return _dim(thought(block))
        case {"kind": "refusal", "text": text}:
            return _indented(f"Refused: {text}")
        case {"kind": "other", "name": name}:
            return f"[a part of kind {name}, which this version doesn't know]"
        case {"kind": "call", "line": words}:
            sign = "→ "
        case _:
            sign, words = ("← Failed: ", block["error"]) if "error" in block else ("← ", block["content"])
    shown = "".join(words.splitlines()[:1])[:BEGINNING]
    rest = len(words) - len(shown) + block.get("more", 0) + block.get("cut", 0)
    return MARKS.sub("", printable(f"{sign}{shown}" + (f" (… {rest:,} more characters)" if rest else "")))


def _indented(text: str) -> str:
    """The text, of which no line but the first begins where this command's own lines begin: it can't forge one."""
    return printable("\n    ".join(text.splitlines()))


def _dim(words: str) -> str:
    return f"\x1b[2m{words}\x1b[0m" if sys.stderr.isatty() else words


def _clear(args: argparse.Namespace) -> int:
    from llmstream_nb import clear, connect
    from llmstream_nb.answers import connection

    if bool(args.id) == args.all:
        raise CantDo("name the answers to delete, or say --all.")
    client = connect()
    place = f"under {connection.names_of(client).prefix!r} at {connection.where(client)}"
    if args.all and not _agreed(args, f"Delete all answers {place}?"):
        return 1
    count = clear(*args.id)
    say(f"{count} answer{'s' * (count != 1)} {place} deleted.")
    return 0


def _next_group(args: argparse.Namespace) -> int:
    from llmstream_nb import clear, connect
    from llmstream_nb.answers import connection
    from llmstream_nb.pool.queue import end_workers

    lessons = [f"nb{name.partition('-')[0]}" for name in sorted(pristine()) if name[0].isdigit()]
    clients = [connect(prefix=prefix) for prefix in dict.fromkeys([connection.names_of(connect()).prefix, *lessons])]
    place = f"under {', '.join(connection.names_of(one).prefix for one in clients)} at {connection.where(clients[0])}"
    if not _agreed(args, f"End the workers, delete all answers {place}, and restore the notebooks?"):
        return 1
    say(f"Workers ended: {sum(end_workers(one) for one in clients)}.")
    say(f"Answers deleted: {sum(clear(client=one) for one in clients)}, {place}.")
    code = restore([])
    if STAGE.exists():
        set_stage()
        say(f"Made anew: {STAGE.name}/, what lab --present shows. Reload its pages.")
    return code


# --------------------------------------------------------------------------------------------- the others


def _lab(args: argparse.Namespace) -> int:
    where = {"port": args.port, "base_url": args.base_url, "browser": not args.no_browser}
    return lab(**where, model=not args.no_model, present=args.present)


def _wheels(args: argparse.Namespace) -> int:
    from llmstream_nb.setup.wheels import fill  # it needs a package

    return fill(args.folder, args.platforms, args.pythons, model=not args.no_model)


def _export(args: argparse.Namespace) -> int:
    from llmstream_nb.setup.export import export  # it needs packages

    return export(args.folder)


def _test(args: argparse.Namespace) -> int:
    return int(_maintain("suites").run(args.suite, args.k))


def _save_outputs(args: argparse.Namespace) -> int:
    return int(_maintain("save_outputs").save_outputs(args.name))


def _film(args: argparse.Namespace) -> int:  # noqa: ARG001 - it takes none
    return int(_maintain("film").film())


def _home(args: argparse.Namespace) -> int:
    return int(_maintain("home").home(args.check))


def _maintain(module: str) -> Any:
    """A module of the checkout's `tests`: it serves those who change the kit, not those who use or read it."""
    sys.path.insert(0, str(environment.ROOT))
    return import_module(f"tests.{module}")
