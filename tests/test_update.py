"""A checkout that was used before goes on after an update: files, data, `.venv` and notebooks of the version before."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from llmstream_nb import Answer, Worker, ask, clear, read_answer, tables, text_of
from llmstream_nb.setup import environment
from llmstream_nb.setup.environment import ROOT, VERSION

from .conftest import FAST
from .model import wait_for
from .test_environment import DONE, REAL_UV, WATCH, checkout, make_wheel, run  # noqa: F401 - a fixture

# ------------------------------------------------------------------------------------------- old files

CODE = """
import llmstream_nb
from llmstream_nb.answers import connection
from llmstream_nb.protocol import wire

redis = llmstream_nb.connect(prefix="mine")
assert llmstream_nb.environment_of(redis)["LLMSTREAM_PREFIX"] == "mine"
answer = llmstream_nb.ask("?", source=lambda *_: ["My ", "own."], client=redis, timing=wire.Timing(ttl=60))
events = llmstream_nb.read_answer(answer.id)
assert llmstream_nb.text_of(event for event in events if isinstance(event, llmstream_nb.Text)) == "My own."
print("works")
"""
# The modules of the version before that are elsewhere now. A zip that is copied over a folder leaves them there.
OLD_FILES = [
    *(f"{name}.py" for name in ("answer", "aread", "cli", "connection", "doctor", "embedded", "environment", "groups")),
    *(f"{name}.py" for name in ("guard", "lab", "markdown", "notebooks", "produce", "protocol", "read", "record")),
    *("wheels.py", "workers.py", "llm/answers.py", "web/guard.py", "web/hub.py", "widgets/hub.py"),
    "widgets/transcript.py",
]


def copied_over_an_older_one(root: Path) -> None:
    """Leave in a checkout what an update by copying leaves there."""
    package = root / "llmstream_nb"
    for name in OLD_FILES:
        old = package / name
        if not old.exists():  # else the newer one has written over it
            old.write_text("raise ImportError('an old file was imported')\n")
        cache = old.parent / "__pycache__"
        cache.mkdir(exist_ok=True)
        (cache / f"{old.stem}.{sys.implementation.cache_tag}.pyc").write_bytes(b"stale")
    (package / "connection.pyc").write_bytes(b"stale")
    (package / "jupyter" / "labconfig").mkdir(parents=True)
    (package / "jupyter" / "labconfig" / "default_setting_overrides.json").write_text("{}")


def test_files_that_an_older_kit_left_behind_are_in_nobodys_way(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "llmstream_nb", tmp_path / "llmstream_nb", ignore=shutil.ignore_patterns("__pycache__"))
    copied_over_an_older_one(tmp_path)
    environ = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
    environ |= {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}  # as lab sets it for its kernels
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("works\n", "")
    command = [sys.executable, "-m", "llmstream_nb", "--help"]
    assert subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, timeout=60).returncode == 0


# ------------------------------------------------------------------------------------------- old data


def written_before(client: redis.Redis) -> None:
    """What the version before left in Redis: one answer that ended, one whose worker died, one that waits."""
    prefix, asked = client.names.prefix, round(time.time() - 600, 3)

    def answer(name: str, record: dict[str, object], *entries: tuple[str, str, int]) -> None:
        whole = {"id": name, "topic": "", "question": f"Why {name}?", "source": "scripted", "model": ""} | record
        client.set(f"{prefix}:{{{name}}}:question", json.dumps(whole | {"asked": asked}), px=600_000)
        client.zadd(f"{prefix}:answers", {name: asked})
        for seq, (kind, text, ms) in enumerate(entries):
            fields = {"kind": kind, "text": text, "ms": ms}
            client.xadd(f"{prefix}:{{{name}}}:chunks", fields, id=f"1-{seq}")

    end = {"reason": "stop", "usage": None, "first_token_ms": 3, "total_ms": 4, "chunks": 2}
    start = {"model": "own", "source": "scripted", "at": asked, "nonce": "779f61e71ca33ff3"}
    two = ("text", "An ", 3), ("text", "answer.", 4)
    told = end | {"start": "1-0", "end": "1-3", "text": "An answer."}
    answer("ended", told, ("start", json.dumps(start), 0), *two, ("end", json.dumps(end), 4))
    queue = f"{prefix}:questions"
    client.xgroup_create(queue, "llm-workers", id="0", mkstream=True)
    job = client.xadd(queue, {"answer": "half"})
    client.xreadgroup("llm-workers", "dead", {queue: ">"}, count=1)
    start |= {"worker": "dead", "job": job, "nonce": "ec783eb7aa957b22"}
    answer("half", {"pooled": True}, ("start", json.dumps(start), 0), ("text", "half ", 2))
    answer("queued", {"pooled": True})
    client.xadd(queue, {"answer": "queued"})


@pytest.mark.slow
def test_answers_of_before_are_read_listed_taken_over_and_cleared(client: redis.Redis) -> None:
    written_before(client)
    states = {name: Answer(name, client=client, timing=FAST).status for name in ("ended", "half", "queued")}
    assert states == {"ended": "ended", "half": "interrupted", "queued": "queued"}
    assert text_of(read_answer("ended", client=client)) == Answer("ended", client=client).text == "An answer."
    assert text_of(read_answer("ended", "1-1", client=client)) == "answer."  # from a saved ID on
    listed = tables.answers(client=client)
    assert dict(zip(listed["id"], listed["status"], strict=True)) == states

    worker = Worker(client=client, timing=FAST, source=lambda question, _: [f"{question} ", "So."]).start()
    try:
        for name in ("half", "queued"):
            Answer(name, client=client, timing=FAST).wait(60)
            assert text_of(read_answer(name, client=client)) == f"Why {name}? So."
        queue = f"{client.names.prefix}:questions"
        wait_for(lambda: client.xpending(queue, "llm-workers")["pending"] == 0)
    finally:
        worker.stop(within=0)

    assert clear("ended", "half", client=client) == 2
    assert ask("Again?", id="ended", source=lambda *_: ["New."], client=client, timing=FAST).wait(60).text == "New."
    clear(client=client)
    left = [key for key in client.scan_iter(f"{client.names.prefix}:{{*") if not key.endswith(":cleared")]
    assert left == []  # the number of the last attempt is the last word to whoever may still write


# ---------------------------------------------------------------------------- old .venv, old notebooks


def test_a_venv_of_before_is_brought_up_to_date(checkout: Path) -> None:  # noqa: F811
    assert run(checkout, *WATCH)[0] == 2
    stamp = checkout / ".venv" / "set-up.json"
    marker = checkout / ".venv" / "made once"
    marker.touch()
    done = {"packages": "8d969eef6ecad3c2", "the kit itself": "9a3a2d1c1f1e8f7b", "the local model": "1f2e3d4c5b6a7988"}
    stamp.write_text(json.dumps({"python": VERSION, "done": done}, indent=1))
    (checkout / "requirements.txt").write_text("tiny==2.0\n")
    make_wheel(checkout / "wheels", "tiny", "2.0", {"tiny.py": "new = True"})
    copied_over_an_older_one(checkout)

    code, output = run(checkout, *WATCH)
    assert code == 2  # there is nothing to watch: it got that far
    steps = [*["uv"] * REAL_UV.exists(), "packages", "the kit itself"]  # only lab tries the model again
    assert re.findall(DONE, output)[-3:] == [
        f"[{number}/3] {step}" for number, step in enumerate(steps, 4 - len(steps))
    ]
    assert marker.exists()  # it was kept, and not made anew
    python = checkout / environment.PYTHON.relative_to(ROOT)
    show = "import tiny, llmstream_nb; print(tiny.new, llmstream_nb.__file__)"  # as a kernel in another folder does
    shown = subprocess.run([python, "-I", "-c", show], capture_output=True, text=True, timeout=30).stdout
    assert shown.strip() == f"True {checkout / 'llmstream_nb' / '__init__.py'}"
    assert "done" not in run(checkout, *WATCH)[1]


def test_restore_brings_back_the_notebooks_of_the_newer_kit(checkout: Path) -> None:  # noqa: F811
    kept, folder = checkout / ".llmstream" / "pristine", checkout / "notebooks"
    kept.mkdir(parents=True)
    folder.mkdir()
    for name in ("00-ask.ipynb", "gone.ipynb"):  # as the version before left them, where there was no git
        (kept / name).write_text("as the older kit had it")
    (folder / "00-ask.ipynb").write_text("as the newer kit has it")
    run(checkout, *WATCH)

    def restored() -> str:
        (folder / "00-ask.ipynb").write_text("what a learner wrote")
        assert run(checkout, "restore")[0] == 0
        return (folder / "00-ask.ipynb").read_text()

    assert restored() == "as the newer kit has it"
    assert not (folder / "gone.ipynb").exists()
    moved = checkout / ".venv" / "set-up.json"
    moved.write_text(json.dumps(json.loads(moved.read_text()) | {"done": {}}))  # all steps again, the kit is the same
    (folder / "00-ask.ipynb").write_text("what a learner wrote")
    run(checkout, *WATCH)
    assert restored() == "as the newer kit has it"
