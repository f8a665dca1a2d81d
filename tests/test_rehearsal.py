"""`doctor --workshop`: it tries what can fail on stage, tells what does, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
import threading
from pathlib import Path

import psutil
import pytest

from llmstream_nb.faults import servers
from llmstream_nb.llm import local
from llmstream_nb.setup import doctor, redis_server, rehearse, restore

from .test_environment import checkout  # noqa: F401

needs_redis = pytest.mark.skipif("redis-server" not in servers.available(), reason="redis-server is not on PATH")


@pytest.fixture
def temporary(monkeypatch, tmp_path) -> Path:
    """A place for temporary files of its own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.setattr(rehearse, "shared", dict)
    return tmp_path


@needs_redis
def test_it_tries_redis_the_models_and_the_drills(temporary, monkeypatch, capsys):
    monkeypatch.setattr(local, "installed", lambda: False)
    monkeypatch.setattr(doctor, "_packages", lambda: iter(()))
    monkeypatch.setattr(rehearse, "MEMORY", 1)
    before = set(psutil.Process().children(recursive=True))
    assert doctor.doctor(workshop=True) == 0
    shown = capsys.readouterr().out
    for subject in ("127.0.0.1", "Redis started", "scripted", "kill a worker", "stop Redis"):
        assert re.search(rf"(?m)^\[x\] OK +{subject} ", shown), shown
    for subject in ("stick", "local model"):
        assert re.search(rf"(?m)^\[ \] note +{subject} ", shown), shown
    assert not re.search(r"default:\w", shown)
    psutil.wait_procs(left := set(psutil.Process().children(recursive=True)) - before, 10)
    assert not [process for process in left if process.is_running()]
    assert not list(temporary.iterdir())


def test_a_redis_that_fails_is_a_problem(temporary, monkeypatch):
    monkeypatch.setenv("REDIS_URL", "redis://:hunter2@127.0.0.1:9/0")
    monkeypatch.setattr(redis_server, "_candidates", lambda: iter(()))
    monkeypatch.setattr(rehearse, "start_fake_redis", lambda: 1 / 0)
    monkeypatch.setattr(servers, "PROGRAMS", ())
    told = {subject: (verdict, text) for verdict, subject, text in rehearse.rehearse(None)}
    assert told["Redis"][0] == told["Redis started"][0] == "PROBLEM"
    assert "can't be reached" in told["Redis"][1] and "hunter2" not in told["Redis"][1]
    assert "scripted" not in told and told["stop Redis"][0] == "note"


def test_what_takes_too_long_is_given_up():
    for_ever = threading.Event()
    verdict, subject, text = rehearse.within(0.05, "it", for_ever.wait, "do that")
    for_ever.set()
    assert (verdict, subject) == ("PROBLEM", "it") and text.endswith("do that")

    def untried() -> str:
        raise rehearse.Untried("no stick")

    assert rehearse.within(5, "it", untried, "do that") == ("note", "it", "no stick")


def test_a_stick_is_set_up_from_in_a_folder_that_goes(checkout, temporary, monkeypatch):  # noqa: F811
    monkeypatch.setattr(rehearse, "ROOT", checkout)
    monkeypatch.setattr(rehearse, "SPACE", 1)

    def tried() -> tuple[str, str, str]:
        with contextlib.ExitStack() as stack:
            return rehearse.within(60, "stick", lambda: rehearse._set_up_from(checkout / "wheels", stack), "fill it")

    (checkout / "notebooks").mkdir(exist_ok=True)
    (checkout / "notebooks" / "00-a.ipynb").write_text("as it came")
    verdict, _, text = tried()
    assert verdict == "OK" and "without a network" in text, text
    next((checkout / "wheels").glob("tiny-*")).unlink()
    verdict, _, text = tried()
    assert verdict == "PROBLEM" and "has no wheel of tiny==1.0" in text and text.endswith("fill it"), text
    assert not list(temporary.iterdir()) and not (checkout / ".venv").exists()


def test_what_a_projector_shows_comes_anew_and_without_outputs(tmp_path, monkeypatch):
    stage = tmp_path / "presented"
    monkeypatch.setattr(restore, "STAGE", stage)
    monkeypatch.setattr(restore, "STAGE_LAB", stage / ".lab")
    stage.mkdir()
    (stage / "Untitled.ipynb").write_text("the last group's")
    restore.set_stage()
    pristine = restore.pristine()
    assert {path.name for path in stage.glob("*.ipynb")} == set(pristine)
    for name, came in pristine.items():
        was, shown = json.loads(came), json.loads((stage / name).read_text("utf-8"))
        assert [cell["source"] for cell in shown["cells"]] == [cell["source"] for cell in was["cells"]]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in shown["cells"])
        assert "widgets" not in shown["metadata"]
    assert (stage / "recipe.py").exists() and (stage / "images" / "00-flow.svg").exists()
    themes = json.loads((stage / ".lab/@jupyterlab/apputils-extension/themes.jupyterlab-settings").read_text())
    assert themes["overrides"]["code-font-size"] == "17.5px"
