"""The commands as a user types them: what they print where, their exit codes, and what they leave alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from urllib.request import Request, urlopen

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

import llmstream_nb
from llmstream_nb import connect
from llmstream_nb.setup import cli
from llmstream_nb.setup.environment import ROOT

from . import save_outputs, suites
from .model import wait_for
from .test_environment import checkout, wait_until  # noqa: F401 - a fixture

QUESTION = "What is a Redis stream?"
QUICK = "scripted:pace=300"


def start(url: str, *arguments: str, cwd: Path = ROOT, **changes: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "llmstream_nb", *arguments],
        cwd=cwd,
        env=os.environ | {"REDIS_URL": url, "LLMSTREAM_NO_VENV": "1", "LLMSTREAM_LLM": "scripted"} | changes,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def run(url: str, *arguments: str, **options) -> tuple[int, str, str]:
    process = start(url, *arguments, **options)
    output, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors, errors
    return process.returncode, output, errors


# ---------------------------------------------------------------------------------------- ask and watch


def test_ask_prints_the_answer_and_watch_all_of_it_later(fake_tcp):
    code, text, said = run(fake_tcp, "ask", QUESTION, "--model", QUICK)
    assert code == 0
    answer_id = re.match(r"id (\w+)\n", said)[1]
    assert re.search(r"\[stop · \d+ chunks · first token [\d.]+ s · total [\d.]+ s\]\n$", said)
    assert text == llmstream_nb.Answer(answer_id, client=connect(fake_tcp)).text + "\n"
    assert run(fake_tcp, "watch", answer_id)[:2] == (0, text)
    code, nothing, said = run(fake_tcp, "watch", answer_id, LLMSTREAM_PREFIX="nb00")
    assert (code, nothing) == (2, "") and "under the prefix 'nb00'" in said
    whole = run(fake_tcp, "ask", QUESTION, "--model", QUICK, "--no-stream")
    assert (whole[:2], "[stop · 1 chunk ·" in whole[2]) == ((0, text), True)

    assert re.fullmatch(r"1 answer under 'llmstream' at redis://\S+ deleted\.\n", run(fake_tcp, "clear", answer_id)[2])
    code, text, said = run(fake_tcp, "watch", answer_id)
    assert (code, text) == (2, "")
    assert said.startswith(f"llmstream-nb: there is no answer '{answer_id}'")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("ask", "  "), 2), (("ask", "x" * 50_000), 2), (("watch", "a b"), 2), (("clear",), 2)],
)
def test_what_can_not_be_done_is_said_in_one_line(fake_tcp, arguments, code):
    assert run(fake_tcp, *arguments)[:2] == (code, "")
    assert run(fake_tcp, *arguments)[2].count("\n") == 1


def test_a_redis_that_is_not_there_is_said_without_the_password():
    code, text, said = run("redis://:hunter2@127.0.0.1:9/0", "watch", "x")
    assert (code, text, said.count("\n")) == (1, "", 1)
    assert "hunter2" not in said


def test_nothing_a_model_writes_drives_the_terminal(fake_tcp):
    evil = "red \x1b[31m \x1b]0;x\x07 \x9b2J back\r\b\x00 \u202eflip \ud83d\udc4b\u200d\n\ttab é \u00a0日本"
    llmstream_nb.ask("x", source=lambda *_: iter([evil]), id="evil", client=connect(fake_tcp)).wait(60)
    code, text, _ = run(fake_tcp, "watch", "evil")
    assert code == 0
    assert text == "red [31m ]0;x 2J back flip \U0001f44b\u200d\n\ttab é \u00a0日本\n"


def test_a_failed_answer_is_exit_code_1(fake_tcp):
    def breaks(*_):
        yield "half of "
        raise RuntimeError("the model \x1b[31m broke")

    llmstream_nb.ask("x", source=breaks, id="broken", client=connect(fake_tcp))
    code, text, said = run(fake_tcp, "watch", "broken")
    assert (code, text) == (1, "half of \n")
    assert "[failed: RuntimeError: " in said
    assert "\x1b" not in said


@pytest.mark.skipif(os.name == "nt", reason="sending Ctrl-C to one process is POSIX")
def test_ctrl_c_stops_the_answer_and_keeps_its_text(fake_tcp):
    process = start(fake_tcp, "ask", "Why stream an LLM's answer instead of waiting?")
    answer_id = process.stderr.readline().split()[1]
    first = process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    rest, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    answer = llmstream_nb.Answer(answer_id, client=connect(fake_tcp))
    assert (answer.status, answer.record["reason"]) == ("ended", "cancelled")
    assert answer.text.startswith(first + rest.rstrip("\n"))


@pytest.mark.skipif(os.name == "nt", reason="sending Ctrl-C to one process is POSIX")
def test_web_serves_until_ctrl_c_and_its_token_stands_in_the_link_alone(fake_tcp):
    process = start(fake_tcp, "web", "--no-browser", "--port", "0")
    link = process.stdout.readline().strip()
    base, _, token = link.partition("?token=")
    assert len(token) > 16

    def call(method: str, path: str, **body: str) -> dict:
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        request = Request(base + path, json.dumps(body).encode() if body else None, headers, method=method)
        with urlopen(request, timeout=20) as reply:
            return json.load(reply)

    asked = call("POST", "answers", question="What is a Redis stream?")
    wait_for(lambda: call("GET", asked["answer"])["text"])
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert token not in printed + said
    assert "Traceback" not in said
    answer = llmstream_nb.Answer(asked["id"], client=connect(fake_tcp))
    assert answer.record["reason"] == "cancelled"  # nobody else could go on with it
    assert answer.text.startswith("A Redis")


def test_web_says_that_a_port_is_taken(fake_tcp):
    port = fake_tcp.rpartition(":")[2].partition("/")[0]
    code, printed, said = run(fake_tcp, "web", "--no-browser", "--port", port)
    assert (code, printed) == (1, "")
    assert f"port {port}" in said and said.count("\n") == 1


def test_a_closed_pipe_ends_ask_quietly(fake_tcp):
    process = start(fake_tcp, "ask", "Why stream an LLM's answer instead of waiting?")
    process.stdout.read(5)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(60) == 141
    assert said.count("\n") == 1  # the id


def test_help_names_every_command_and_variable(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    for word in (
        "lab",
        "test",
        "ask",
        "watch",
        "worker",
        "web",
        "doctor",
        "clear",
        "restore",
        "export",
        "next-group",
        "save-outputs",
    ):
        assert re.search(rf"^    {word}\b", shown, re.MULTILINE)
    for word in ("REDIS_URL", "LLMSTREAM_PREFIX", "LLMSTREAM_LLM", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        assert word in shown
    assert str(ROOT) not in shown


# ----------------------------------------------------------------------------------------------- doctor


def test_doctor_shows_no_secret(fake_tcp):
    code, shown, _ = run("redis://:hunter2@127.0.0.1:9/0", "doctor", OPENAI_API_KEY="sk-not-to-be-seen")
    assert code == 1
    assert re.search(r"^PROBLEM +REDIS_URL", shown, re.MULTILINE)
    assert re.search(r"^OK +OPENAI_API_KEY +is set", shown, re.MULTILINE)
    assert not re.search("hunter2|not-to-be-seen", shown)
    assert re.search(r"^OK +REDIS_URL", run(fake_tcp, "doctor")[1], re.MULTILINE)


def test_doctor_runs_before_anything_is_installed(checkout):  # noqa: F811
    bare = [sys._base_executable, "-I", "-S", "-c", "import sys; sys.path.insert(0, '.'); import runpy;"]
    bare[-1] += "sys.argv = ['', 'doctor']; runpy.run_module('llmstream_nb', run_name='__main__')"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LLMSTREAM")}
    done = subprocess.run(bare, cwd=checkout, env=environ, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search("^note +set-up +not done yet", done.stdout, re.MULTILINE)
    assert not (checkout / ".venv").exists()


# ---------------------------------------------------------------------------------- restore, save-outputs


@pytest.mark.parametrize("with_git", [True, False])
def test_restore_brings_back_what_changed_after_a_backup(tmp_path, with_git):
    shutil.copytree(ROOT / "llmstream_nb", tmp_path / "llmstream_nb")
    (tmp_path / "pyproject.toml").touch()  # a checkout
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for name in ("00-a.ipynb", "01-b.ipynb"):
        (folder / name).write_text(f"as it came: {name}")
    if with_git:
        git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
        for command in (["init", "-q"], ["add", "notebooks"], ["commit", "-qm", "x"]):
            subprocess.run([*git, *command], check=True)
    else:
        shutil.copytree(folder, tmp_path / ".llmstream" / "pristine")
    (folder / "00-a.ipynb").write_text("my work")
    (folder / "01-b.ipynb").unlink()
    (folder / "mine.ipynb").write_text("my own")

    assert run("", "restore", "zz", cwd=tmp_path)[0] == 2
    assert run("", "restore", "00", cwd=tmp_path)[0] == 0
    assert (folder / "00-a.ipynb").read_text() == "as it came: 00-a.ipynb"
    assert not (folder / "01-b.ipynb").exists()
    assert [path.read_text() for path in folder.glob("backup-*/*")] == ["my work"]

    assert run("", "restore", cwd=tmp_path)[0] == 0
    assert (folder / "01-b.ipynb").read_text() == "as it came: 01-b.ipynb"
    assert "as they came" in run("", "restore", cwd=tmp_path)[2]
    assert (folder / "mine.ipynb").read_text() == "my own"
    assert len(list(folder.glob("backup-*"))) == 1


def executed(model_id: str, began: str, version: str):
    """A notebook as one run of it might leave it behind."""
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": model_id}, "text/plain": "View()"}
    cell = new_code_cell("View()", metadata={"execution": {"iopub.execute_input": began}}, execution_count=7)
    cell.outputs = [
        new_output("stream", name="stdout", text="a"),
        new_output("stream", name="stdout", text="b\n"),
        new_output("execute_result", data=view, execution_count=7),
    ]
    cell.id = "one"
    notebook = new_notebook(cells=[cell], metadata={"language_info": {"name": "python", "version": version}})
    state = {model_id: {"model_name": "ViewModel", "state": {"layout": f"IPY_MODEL_{model_id}"}}}
    notebook.metadata["widgets"] = {save_outputs.WIDGET_STATE: {"state": state, "version_major": 2}}
    return nbformat.from_dict(notebook)


def test_outputs_are_saved_in_one_form():
    first = save_outputs.normalise(executed("0" * 28 + "beef", "2020-01-01", "3.11.1"))
    second = save_outputs.normalise(executed("f" * 28 + "1234", "2021-01-01", "3.13.0"))
    assert nbformat.writes(first) == nbformat.writes(second)
    cell = first.cells[0]
    assert (cell.execution_count, cell.outputs[0].text, cell.outputs[1].execution_count) == (1, "ab\n", 1)
    assert list(first.metadata.widgets[save_outputs.WIDGET_STATE]["state"]) == [f"{1:032x}"]
    nbformat.validate(first)


@pytest.mark.parametrize("text", ["<View at 0x7f3a12345678>", str(ROOT / "x"), "/tmp/ipykernel_123/1.py"])
def test_outputs_that_differ_elsewhere_are_not_saved(text):
    cell = new_code_cell("1", outputs=[new_output("stream", text=text)])
    assert save_outputs.unstable(new_notebook(cells=[new_code_cell("0"), cell]))[0].startswith("cell 1 shows")
    assert not save_outputs.unstable(new_notebook(cells=[new_code_cell("0x7f3a12345678")]))


# ------------------------------------------------------------------------------------------------- test


def test_the_summary_counts_and_a_suite_over_its_budget_fails(tmp_path, monkeypatch, capfd):
    (tmp_path / "test_good.py").write_text("def test_a(): pass\n")
    begun = tmp_path / "begun"

    class Popen(subprocess.Popen):
        """The time of a process is up once its last test has begun, however long it took to come to that."""

        def wait(self, timeout=None):
            if timeout == bad.budget:
                wait_for(begun.exists)
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait(timeout)

    (tmp_path / "test_bad.py").write_text(
        "import pathlib, pytest, time\n"
        "def test_b(): assert 0\n"
        "@pytest.fixture\n"
        "def server():\n    yield\n    print('ended in good order')\n"
        f"def test_c(server): pathlib.Path({str(begun)!r}).touch(); time.sleep(60)\n"
    )
    good = suites.Suite("core", "good ones", 60, [str(tmp_path / "test_good.py")])
    bad = suites.Suite("browser", "bad ones", 6, ["-s", str(tmp_path / "test_bad.py")])
    monkeypatch.setattr(suites, "suites", lambda: [good, bad])
    monkeypatch.setattr(suites, "fetch", list)
    monkeypatch.setattr(suites.subprocess, "Popen", Popen)
    assert suites.run("core") == 0
    assert re.search(r"^=+ 1 passed in [\d.]+s =+$", capfd.readouterr().out, re.MULTILINE)
    assert suites.run("core", "nothing_is_called_so") == 1
    capfd.readouterr()
    assert suites.run() == 1
    shown = capfd.readouterr()
    assert "ended in good order" in shown.out
    assert "not done within its 6 seconds" in shown.err
    assert re.search(r"^=+ 1 failed, \d passed, 1 error in [\d.]+s =+$", shown.out, re.MULTILINE)


@pytest.mark.parametrize(("ci", "code"), [("true", 1), ("", 0)])
def test_a_server_that_is_missing_fails_in_ci_alone(tmp_path, monkeypatch, capfd, ci, code):
    (tmp_path / "test_good.py").write_text("def test_a(): pass\n")
    good = suites.Suite("core", "good ones", 60, [str(tmp_path / "test_good.py")])
    monkeypatch.setattr(suites, "suites", lambda: [good])
    monkeypatch.setattr(suites, "fetch", lambda: ["redis-8.2"])
    monkeypatch.setenv("CI", ci)
    assert suites.run() == code
    assert "redis-8.2 is not there" in capfd.readouterr().err


def test_the_tests_can_reach_no_redis_or_key_of_the_user():
    assert suites.ENVIRONMENT["LLMSTREAM_LLM"] == "scripted"
    assert {"REDIS_URL", "OPENAI_API_KEY"} <= {name for name, value in suites.ENVIRONMENT.items() if value is None}
