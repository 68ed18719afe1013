"""Stages keep what happened, also when it went wrong, and print one line each."""

import time

import pytest

from redpp_serve.stages import Stages


def test_each_stage_has_a_status_a_reason_and_its_time(capsys):
    stages = Stages()
    with stages.run("hash") as stage:
        stage.reason = "5 layers"
        time.sleep(0.02)
    with stages.run("merge") as stage:
        stage.skip("nothing to do")
    first, second = stages.to_json()
    assert (
        first == {"name": "hash", "status": "done", "reason": "5 layers", "seconds": first["seconds"]}
        and first["seconds"] >= 0.02
    )
    assert (second["status"], second["reason"]) == ("skipped", "nothing to do")
    out, err = capsys.readouterr()
    assert out == "" and [line.split()[:2] for line in err.splitlines()] == [["hash", "done"], ["merge", "skipped"]]
    assert "nothing to do" in err


@pytest.mark.parametrize(
    ("error", "reason"), [(ValueError("bad shape"), "bad shape"), (KeyboardInterrupt(), "KeyboardInterrupt")]
)
def test_a_failure_is_recorded_and_goes_on(error, reason, capsys):
    stages = Stages()
    with pytest.raises(type(error)), stages.run("split"):
        raise error
    assert stages.to_json()[0]["status"] == "failed" and stages.to_json()[0]["reason"] == reason
    assert capsys.readouterr().err == ""  # whoever handles the error prints it


def test_quiet_stages_print_nothing_and_progress_needs_no_terminal(capsys):
    stages = Stages(quiet=True)
    with stages.run("inputs") as stage:
        for k in range(3):
            stage.progress(k + 1, 3)
    assert capsys.readouterr() == ("", "")
