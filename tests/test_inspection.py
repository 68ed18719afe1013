"""What `inspect` says about files and networks."""

import json
from pathlib import Path

import pytest
import torch

from redpp_serve.errors import RedppError
from redpp_serve.inspection import describe_file, describe_network
from tests.attacks.files import Net, exported
from tests.support.small import captured, network, write_model


def test_a_state_dict_leads_to_the_architecture_it_needs(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    report = describe_file(model)
    assert report.facts == {"file": "small.pt", "kind": "torch.save state_dict", "bytes": model.stat().st_size}
    assert report.layers == [] and f"inspect {model} --arch torchvision:NAME --input 3x224x224" in report.to_text()
    assert "trust" not in report.to_text()


def test_code_in_a_file_is_named_without_running_it(tmp_path: Path) -> None:
    torch.save(Net(), tmp_path / "module.pt")
    report = describe_file(tmp_path / "module.pt")
    assert report.facts["kind"] == "pickled module" and "attacks.files.Net" in report.facts["runs code"]
    assert "--trust-file --input" in report.to_text() and "--arch" not in report.to_text()
    assert describe_file(exported(tmp_path / "net.pt2")).facts["runs code"] == "when loaded"


def test_what_can_never_be_loaded_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.pt").write_text("<!DOCTYPE html><html>Sign in</html>")
    with pytest.raises(RedppError, match="HTML"):
        describe_file(tmp_path / "page.pt")


def test_layers_say_whether_and_why_not(tmp_path: Path) -> None:
    report = describe_network(captured(write_model(tmp_path)), ())
    found = {layer["name"]: layer for layer in report.to_json()["layers"]}
    assert {name: layer["merge"] for name, layer in found.items()} == {
        "stem.0": {"channels": 8, "reason": ""},
        "body.0": {"channels": 16, "reason": ""},
        "head": {"channels": 5, "reason": "is an output of the network"},
    }
    assert (found["body.0"]["shape"], found["body.0"]["macs"]) == ([16, 8, 3, 3], 36 * 16 * 8 * 9)
    assert sum(layer["parameters"] for layer in found.values()) == 8 * 9 + 16 * 8 * 9 + 16 + 16 * 5 + 5
    assert report.facts["parameters"] == sum(
        t.numel() for k, t in network().state_dict().items() if "num_batches" not in k
    )
    assert report.facts["MACs"] == sum(layer["macs"] for layer in found.values())
    expected = "2 of 3 sets of coupled channels; the layers that they touch are 100% of the MACs"
    assert (
        report.facts["can be narrowed"] == expected and report.sets is None and "channel_sets" not in report.to_json()
    )


def test_sets_are_listed_where_they_are_asked_for(tmp_path: Path) -> None:
    report = describe_network(captured(write_model(tmp_path)), (), channels=True)
    assert (
        report.sets
        == report.to_json()["channel_sets"]
        == [
            {
                "name": "stem.0",
                "channels": 8,
                "producers": ["stem.0"],
                "readers": ["body.0"],
                "with": ["stem.1"],
                "closed": "",
            },
            {
                "name": "body.0",
                "channels": 16,
                "producers": ["body.0"],
                "readers": ["head"],
                "with": ["body.1"],
                "closed": "",
            },
            {
                "name": "head",
                "channels": 5,
                "producers": ["head"],
                "readers": [],
                "with": [],
                "closed": "is an output of the network",
            },
        ]
    )
    text = report.to_text()
    assert "body.0: 16 channels, open\n  written by body.0\n  with body.1\n  read by head\n" in text
    assert "head: 5 channels, closed: is an output of the network" in text and "narrowable" not in text


def test_excluded_layers_and_their_producers_stay(tmp_path: Path) -> None:
    report = describe_network(captured(write_model(tmp_path)), ("head",))
    assert {layer["name"]: layer["merge"]["reason"] for layer in report.to_json()["layers"]}[
        "body.0"
    ] == "head, which goes with it, is excluded"
    assert report.facts["can be narrowed"].startswith("1 of 3 sets of coupled channels")


def test_json_holds_numbers_and_the_whole_digest(tmp_path: Path) -> None:
    document = json.loads(json.dumps(describe_network(captured(write_model(tmp_path)), ()).to_json()))
    assert isinstance(document["parameters"], int) and isinstance(document["macs"], int)
    assert len(document["sha256"]) == 64 and document["can_be_narrowed"] and isinstance(document["notes"], list)


def test_text_shows_channels_not_a_fraction_of_nothing(tmp_path: Path) -> None:
    lines = describe_network(captured(write_model(tmp_path)), ()).to_text().splitlines()
    head = next(line for line in lines if line.startswith("layer"))
    assert head.split()[-2:] == ["channels", "narrowable"]
    rows = {line.split()[0]: line.split()[-2:] for line in lines if line.startswith(("stem.0 ", "body.0 ", "head "))}
    assert rows == {"stem.0": ["8", "yes"], "body.0": ["16", "yes"], "head": ["5", "no"]}
    assert not any("–/" in line for line in lines)


def test_names_from_a_file_cannot_steer_the_terminal(tmp_path: Path) -> None:
    network = captured(write_model(tmp_path))
    network.messages.append("a\x1b[2Jb\nc")
    text = describe_network(network, ()).to_text()
    assert "\x1b" not in text and "b c" in text
