"""What breaks around a real A/B test: a full disk, a lost folder, a killed supervisor. Users are served on."""

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from redpp_serve.ab.journal import read_journal
from redpp_serve.cli import main
from tests.ab.test_live import Client, living, status, until
from tests.support.tools import tool

pytestmark = pytest.mark.server
DISK_BYTES = 96 << 20


@pytest.fixture(scope="module")
def disk(state_home: Path) -> Iterator[Path]:
    """A small disk that holds all state."""
    path = state_home / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0711", "redpp-test", path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(path))
        yield path
    subprocess.run(["umount", "-l", path], check=True)


@pytest.fixture(scope="module")
def folder(packaged: Path, disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A package whose A/B test runs for the whole module."""
    tool("nginx")
    folder = Path(shutil.copytree(packaged, tmp_path_factory.mktemp("faults") / "small"))
    assert main(["ab", "start", str(folder), "--split", "50:50"]) == 0
    yield folder
    main(["ab", "stop", str(folder)])


@pytest.fixture
def client(folder: Path) -> Client:
    journal = read_journal(folder)
    assert journal and journal.running
    return Client(folder, "torchserve")


def fill(disk: Path) -> Path:
    """Leave no byte free on it."""
    path = disk / "filler"
    with suppress(OSError), path.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
    with suppress(OSError), path.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(1))
    return path


def arms(client: Client, count: int = 30) -> set[str | None]:
    """Arms of good answers; every request must have one."""
    answers = [client.one() for _ in range(count)]
    assert {code for code, _ in answers} == {200}
    return {arm for _, arm in answers}


def test_on_a_full_disk_users_are_served_and_can_be_moved(
    folder: Path, client: Client, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert arms(client) == {"original", "pruned"}
    filler = fill(disk)
    try:
        assert arms(client) == {"original", "pruned"}
        large = client.body + bytes(3 << 20)  # more than nginx would keep in memory by default
        assert client.one(body=large)[0] == 400, "a large body is not passed on to the server, which refuses it"
        assert main(["ab", "rollback", str(folder)]) == 0
        assert arms(client) == {"original"}
        assert main(["ab", "status", str(folder)]) == 0
        out = capsys.readouterr().out
        assert "all users of" in out and "all requests go to original" in out
        until(lambda: "is full" in status(folder).to_text() or "No space left" in status(folder).to_text())
    finally:
        filler.unlink()
    until(lambda: not status(folder).problems)
    assert main(["ab", "promote", str(folder)]) == 0 and arms(client) == {"pruned"}


def test_a_lost_folder_gives_all_users_the_original(
    folder: Path, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    state = Path(client.running.extra["state"])
    assert main(["ab", "promote", str(folder)]) == 0 and arms(client) == {"pruned"}
    shutil.rmtree(state)
    assert arms(client) == {"original"}
    until(lambda: "was lost" in status(folder).to_text())
    before = status(folder).arms["original"].requests
    client.one()
    until(lambda: status(folder).arms["original"].requests == before + 1)  # it is counted again
    assert main(["ab", "promote", str(folder)]) == 0 and arms(client) == {"pruned"}
    assert main(["ab", "rollback", str(folder)]) == 0 and arms(client) == {"original"}
    capsys.readouterr()


def test_the_notes_on_a_running_test_are_written_again(folder: Path, client: Client, disk: Path) -> None:
    for path in (disk / "redpp-serve").iterdir():
        if path.is_file():
            path.unlink()
    until(lambda: read_journal(folder))
    until(lambda: list((disk / "redpp-serve").glob("*-*.json")))
    assert main(["ab", "rollback", str(folder)]) == 0
    assert main(["ab", "start", str(folder), "--split", "50:50"]) == 2, "a second one starts beside it"


def kill_supervisor(folder: Path) -> None:
    journal = read_journal(folder)
    assert journal
    supervisor = psutil.Process(int(journal.supervisor[0]))
    supervisor.kill()
    until(lambda: not living([supervisor]))


def test_a_test_that_lost_its_folder_with_its_supervisor_goes_on_with_the_original(
    folder: Path, client: Client
) -> None:
    assert main(["ab", "promote", str(folder)]) == 0
    kill_supervisor(folder)
    assert arms(client) == {"pruned"}
    shutil.rmtree(client.running.extra["state"])
    assert arms(client) == {"original"}
    assert main(["ab", "start", str(folder), "--split", "50:50"]) == 0
    assert arms(client) == {"original"}
    until(lambda: "was lost" in status(folder).to_text())
    client.one()
    until(lambda: status(folder).arms["original"].requests > 0)
    assert main(["ab", "promote", str(folder)]) == 0 and arms(client) == {"pruned"}


def test_a_killed_supervisor_on_a_full_disk_leaves_users_served_until_stop_ends_all(
    folder: Path, client: Client, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ab", "promote", str(folder)]) == 0
    journal = read_journal(folder)
    assert journal
    processes = [psutil.Process(leader.pid) for leader in journal.living()]
    processes += [child for process in processes for child in process.children(recursive=True)]
    assert len(processes) > 4
    kill_supervisor(folder)
    filler = fill(disk)
    assert arms(client) == {"pruned"}
    assert "the supervisor was killed" in status(folder).problems[0]
    assert main(["ab", "rollback", str(folder)]) == 0 and arms(client) == {"original"}
    capsys.readouterr()
    assert main(["ab", "stop", str(folder), "--keep", str(tmp_path / "kept")]) == 0
    assert "is in" in capsys.readouterr().out and (tmp_path / "kept" / "counts.json").exists()
    until(lambda: not living(processes))
    assert client.url.port
    with socket.create_server(("127.0.0.1", client.url.port)):
        pass
    filler.unlink()
    assert [path.name for path in (disk / "redpp-serve").iterdir()] == ["logs"]
