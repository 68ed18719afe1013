"""The hostile files and packages of `hostile`: a sample by default, a tenth among the long tests, all by hand.

The sample runs in this process, up to where a server would start; `run` gives each command a process with limits.
"""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from redpp_serve.cli import main
from tests.attacks.hostile import Case, cases, write_sound
from tests.attacks.run import commands, no_server

SAMPLE = 16


@pytest.fixture(scope="module")
def found(packaged: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """All cases."""
    sound = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REDPP_MARKER", str(sound / "marker"))
        write_sound(sound, packaged, slow=False)
        return cases(sound, seed=1)


def test_there_are_at_least_500(found: list[Case]) -> None:
    assert len({case.name for case in found}) == len(found) >= 500


@pytest.mark.parametrize("number", range(SAMPLE))
def test_a_sample_is_refused_or_harmless(
    found: list[Case], number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REDPP_MARKER", str(tmp_path / "marker"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    case = random.Random(7).sample(found, SAMPLE)[number]
    path = case.make(tmp_path)
    asked = commands(case, path)
    if case.asks == "file":
        asked.pop("package")  # which prunes what is harmless
    asked.pop("plan", None)
    for words in asked.values():
        start = time.monotonic()
        with no_server():
            code = main(words)
        shown = "".join(capsys.readouterr())
        assert code in (0, 2), shown
        assert all(character.isprintable() or character == "\n" for character in shown), ascii(shown)
        assert time.monotonic() - start < 20
        assert not (tmp_path / "marker").exists()


@pytest.mark.exhaustive
def test_a_tenth_keeps_to_limits_of_time_and_memory() -> None:
    command = [sys.executable, "-m", "tests.attacks.run", "--seed", "2", "--changes", "4", "--share", "0/10"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
