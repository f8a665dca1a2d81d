"""Links to this repository lead to where it lies: `home` fills them, and checks what a release is to agree on."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

from llmstream_nb.setup.cli import CantDo
from llmstream_nb.setup.environment import ROOT

NOWHERE = "OWNER/llmstream-nb"  # what stands in links until they have a home
PAGES = ("pyproject.toml", "*.md", "*/*.md")
# Over https, where a token may stand before the host, over ssh, and as scp writes it.
GITHUB = re.compile(
    r"(?:(?:https?|ssh|git)://)?(?:[^/]*@)?(?:www\.|ssh\.)?github\.com(?::\d+)?[:/]([\w-]+/[\w.-]+?)(?:\.git)?/?",
    re.ASCII | re.IGNORECASE,
)


def home(check: bool = False, root: Path = ROOT) -> int:
    """Fill owner and name of the remote `origin` into all links, and say where; return 0.

    Args:
        check: change nothing, and return 1 where links, versions or the tag would keep a release.
        root: the repository.

    Raises:
        CantDo: there is no such remote, or it is not at GitHub.
    """
    there = origin(root)
    olds = {NOWHERE, present(root)} - {there}
    wrong = disagreements(root) if check else []
    for path in sorted({path for pattern in PAGES for path in root.glob(pattern)}):
        text = path.read_bytes().decode()
        filled, count = fill(text, olds, there)
        name = path.relative_to(root).as_posix()
        if count and check:
            wrong.append(f"{name}: {count} links don't lead to {there}. python3 -m llmstream_nb home fills them.")
        elif count:
            path.write_bytes(filled.encode())
            print(f"{name}: {count} link{'s' * (count != 1)} filled.")
    print(*wrong, sep="\n", end="\n" * bool(wrong))
    if not wrong:
        print(f"All links lead to {there}" + (", and versions agree." if check else "."))
    return bool(wrong)


def origin(root: Path) -> str:
    """`owner/name` of the remote; nothing else of its address, which may hold a token, leaves this function."""
    if not (root / ".git").exists():  # git would look further up
        raise CantDo("this folder is no git repository: clone it, or run git init and git remote add origin first.")
    address = _git(root, "remote", "get-url", "origin")
    if not address:
        raise CantDo("there is no remote: git remote add origin https://github.com/YOU/NAME.git")
    found = GITHUB.fullmatch(address)
    if not found:
        raise CantDo("the remote origin is no repository at GitHub, which Binder, badges and the site are made for.")
    return found[1]


def present(root: Path) -> str:
    """`owner/name` that links lead to now."""
    urls = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["urls"]
    return str(urls["Repository"]).removeprefix("https://github.com/")


def fill(text: str, olds: set[str], new: str) -> tuple[str, int]:
    """The text with all links to `olds` leading to `new`, and how many they were."""
    total = 0
    for old in olds:
        for form in ("/{0}/{1}", "//{0}.github.io/{1}"):  # a repository, and its site
            before, after = (form.format(*each.split("/")) for each in (old, new))
            text, count = re.subn(rf"{re.escape(before)}(?![\w-])", after, text)
            total += count
    return text, total


def disagreements(root: Path) -> list[str]:
    """What says another version than the one in pyproject.toml."""
    version = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    others = {
        "llmstream_nb/__init__.py": r'(?m)^__version__ = "(.+)"$',
        "README.md": r"(?m)^## Changes\n+\*\*(.+?)\*\*",
    }
    wrong = []
    for name, pattern in others.items():
        found = re.search(pattern, (root / name).read_text("utf-8"))
        if not found or found[1] != version:
            wrong.append(f"{name}: its version is {found and found[1]}, that of pyproject.toml {version}.")
    here = [tag for tag in _git(root, "tag", "--points-at", "HEAD").split() if re.match(r"v?\d", tag)]
    if here and here != [f"v{version}"]:
        wrong.append(f"git: this commit has the tag {', '.join(here)}, where pyproject.toml says {version}.")
    elif not here and _git(root, "tag", "--list", f"v{version}"):
        wrong.append(f"git: v{version} is the tag of another commit. Raise the version.")
    return wrong


def _git(root: Path, *words: str) -> str:
    """What git prints; "" where it fails."""
    try:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        raise CantDo("git is not installed, and only git knows where this repository lies.") from None
