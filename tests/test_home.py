"""A repository finds its home: links follow its remote, a release is checked, and what serves it there is well-formed."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmstream_nb.setup import cli
from llmstream_nb.setup.environment import ROOT

from . import home

SECRET = "ghp_0123456789abcdef"
KEPT = "https://github.com/OWNER/llmstream-nb-2 https://github.com/someone/else"  # links that lead elsewhere


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=Ann", "-c", "user.email=ann@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A repository with nothing but a remote."""
    git(tmp_path, "init", "-q")
    git(tmp_path, "remote", "add", "origin", "nowhere")
    return tmp_path


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """This repository before it has a home, with a remote."""
    folder = tmp_path / "copy"
    shutil.copytree(ROOT / "llmstream_nb", folder / "llmstream_nb", ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("docs", "workshop"):
        shutil.copytree(ROOT / part, folder / part)
    (folder / "tests").mkdir()
    for name in ("README.md", "pyproject.toml", "tests/__init__.py", "tests/home.py"):
        shutil.copy(ROOT / name, folder / name)
    for path in pages(folder):
        now = home.present(ROOT)
        path.write_bytes(home.fill(path.read_bytes().decode(), {now} - {home.NOWHERE}, home.NOWHERE)[0].encode())
    (folder / "docs" / "other.md").write_bytes(f"{KEPT}\r\nhttps://github.com/OWNER/llmstream-nb.\r\n".encode())
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "all")
    git(folder, "remote", "add", "origin", f"https://me:{SECRET}@github.com/acme/streams.git")
    return folder


def pages(folder: Path) -> list[Path]:
    return [path for pattern in home.PAGES for path in folder.glob(pattern)]


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".git" not in path.parts}


@pytest.mark.parametrize(
    "address",
    [
        "https://github.com/acme/streams",
        "https://github.com/acme/streams.git",
        "https://www.GitHub.com/acme/streams/",
        f"https://{SECRET}@github.com/acme/streams.git",
        f"https://x-access-token:{SECRET}@github.com:443/acme/streams",
        "git@github.com:acme/streams.git",
        "git@github.com:acme/streams",
        "github.com:acme/streams.git",
        "ssh://git@github.com/acme/streams.git",
        "ssh://git@ssh.github.com:443/acme/streams.git",
        "git://github.com/acme/streams.git",
    ],
)
def test_each_form_of_an_address_is_understood(empty: Path, address: str) -> None:
    git(empty, "remote", "set-url", "origin", address)
    assert home.origin(empty) == "acme/streams"


@pytest.mark.parametrize(
    "address",
    [
        f"https://me:{SECRET}@gitlab.com/acme/streams.git",
        f"https://me:{SECRET}@github.com.example.org/acme/streams.git",
        f"https://github.com@example.org/{SECRET}/streams",
        f"https://example.org/github.com/{SECRET}/streams",
        f"https://github.com/acme/streams/{SECRET}/more",
        "git@notgithub.com:acme/streams.git",
        "git@example.org:acme/streams.git",
        "https://github.com/acme",
        "../github.com/acme/streams",
    ],
)
def test_another_host_is_an_error_that_shows_no_address(empty: Path, address: str) -> None:
    git(empty, "remote", "set-url", "origin", address)
    with pytest.raises(cli.CantDo, match="no repository at GitHub") as caught:
        home.home(root=empty)
    assert SECRET not in str(caught.value)


def test_without_a_remote_it_says_what_to_do(empty: Path) -> None:
    git(empty, "remote", "remove", "origin")
    with pytest.raises(cli.CantDo, match="git remote add origin"):
        home.home(root=empty)
    (empty / "inside").mkdir()  # git itself would look further up
    git(empty, "remote", "add", "origin", "https://github.com/acme/streams")
    with pytest.raises(cli.CantDo, match="no git repository"):
        home.origin(empty / "inside")


def test_the_command_fills_all_links_once_and_shows_no_secret(copy: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LLMSTREAM"))}

    def run(*words: str) -> tuple[int, str]:
        command = [sys.executable, "-B", "-m", "llmstream_nb", "home", *words]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=60)
        assert SECRET not in done.stdout + done.stderr
        return done.returncode, done.stdout + done.stderr

    untouched = content(copy)
    code, said = run("--check")
    assert code == 1 and "README.md: " in said and "pyproject.toml: 2 links" in said and content(copy) == untouched

    code, said = run()
    assert code == 0 and "docs/other.md: 1 link filled." in said and "workshop/participants.md: 1 link" in said
    filled = content(copy)
    assert SECRET.encode() not in b"".join(filled.values()) and not (copy / ".venv").exists()
    changed = {path for path in filled if filled[path] != untouched[path]}
    assert changed == {path for path in pages(copy) if path.relative_to(copy).as_posix() in said}
    assert filled[copy / "docs" / "other.md"].decode() == f"{KEPT}\r\nhttps://github.com/acme/streams.\r\n"
    readme = filled[copy / "README.md"].decode()
    assert "/gh/acme/streams/main" in readme and "[site]: https://acme.github.io/streams/\n" in readme
    assert all("OWNER" not in path.read_text("utf-8").replace(KEPT, "") for path in pages(copy))

    assert run() == (0, "All links lead to acme/streams.\n") and content(copy) == filled
    assert run("--check") == (0, "All links lead to acme/streams, and versions agree.\n") and content(copy) == filled


def test_a_fork_takes_its_links_along_and_those_that_come_later(copy: Path, capsys) -> None:
    assert home.home(root=copy) == 0
    git(copy, "remote", "set-url", "origin", "git@github.com:beth/my.streams.git")
    with (copy / "README.md").open("a") as file:  # merged from where there is no home
        file.write("https://codespaces.new/OWNER/llmstream-nb\n")
    assert home.home(root=copy) == 0
    text = "".join(path.read_text("utf-8") for path in pages(copy)).replace(KEPT, "")
    assert "acme" not in text and "OWNER" not in text
    assert text.endswith("\n") and "https://codespaces.new/beth/my.streams\n" in text
    assert home.home(check=True, root=copy) == 0


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("pyproject.toml", '\nversion = "', '\nversion = "9.'),
        ("llmstream_nb/__init__.py", '__version__ = "', '__version__ = "9.'),
        ("README.md", "## Changes\n\n**", "## Changes\n\n**9."),
        ("README.md", "## Changes\n", "## News\n"),
    ],
)
def test_a_version_that_differs_keeps_a_release(copy: Path, capsys, file: str, old: str, new: str) -> None:
    home.home(root=copy)
    text = (copy / file).read_text("utf-8")
    assert text.count(old) == 1
    (copy / file).write_text(text.replace(old, new), "utf-8")
    capsys.readouterr()
    assert home.home(check=True, root=copy) == 1
    said = capsys.readouterr().out
    assert "its version is" in said and "All links" not in said


def test_a_tag_that_differs_keeps_a_release(copy: Path, capsys) -> None:
    home.home(root=copy)
    version = re.findall(r'\nversion = "(.+)"', (copy / "pyproject.toml").read_text("utf-8"))[0]
    git(copy, "commit", "-q", "-a", "-m", "home")
    git(copy, "tag", f"v{version}")
    git(copy, "tag", "workshop-in-may")
    assert home.home(check=True, root=copy) == 0
    git(copy, "tag", "v0.0.1")
    assert home.home(check=True, root=copy) == 1
    assert "this commit has the tag v0.0.1" in capsys.readouterr().out
    git(copy, "commit", "-q", "--allow-empty", "-m", "more")
    assert home.home(check=True, root=copy) == 1
    assert f"v{version} is the tag of another commit" in capsys.readouterr().out


def test_versions_agree_here() -> None:
    assert [line for line in home.disagreements(ROOT) if not line.startswith("git:")] == []


# ----------------------------------------------------------------------------------- what serves it at GitHub


def test_the_workflow_pins_its_actions_and_runs_what_the_readme_says() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    used = re.findall(r"uses: (\S+)", workflow)
    assert used and all(re.fullmatch(r"actions/[\w-]+@v\d+\.\d+\.\d+", action) for action in used)
    rows = re.findall(r"(?m)^\| run all tests \| `(.+?)` \| `(.+?)` \|$", (ROOT / "README.md").read_text("utf-8"))
    assert all(f"command: {command}\n" in workflow for command in rows[0])
    assert "\npermissions:\n  contents: read\n\n" in workflow and "secrets." not in workflow


def test_the_container_sets_up_by_a_command_and_lets_its_own_address_in(monkeypatch) -> None:
    folder = ROOT / ".devcontainer"
    container = json.loads((folder / "devcontainer.json").read_text("utf-8"))
    python, flag, package, *words = shlex.split(container["postCreateCommand"])
    assert (python, flag, package) == ("python3", "-m", "llmstream_nb") and cli.parser().parse_args(words)

    def pattern() -> str | None:
        settings = SimpleNamespace(ServerApp=SimpleNamespace(allow_origin_pat=None))
        exec((folder / "jupyter_server_config.py").read_text("utf-8"), {"c": settings})
        return settings.ServerApp.allow_origin_pat

    monkeypatch.delenv("CODESPACE_NAME", raising=False)
    assert pattern() is None
    monkeypatch.setenv("CODESPACE_NAME", "shiny-disco-x1")
    monkeypatch.setenv("GITHUB_CODESPACES_PORT_FORWARDING_DOMAIN", "app.github.dev")
    own = "https://shiny-disco-x1-8888.app.github.dev"
    assert re.match(pattern(), own)
    for other in ("https://other-x1-8888.app.github.dev", f"{own}.example.org", own.replace(".", "-"), own + "/x"):
        assert not re.match(pattern(), other)
