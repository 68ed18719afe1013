"""``redpp.yaml``: the same options as the flags, which win; refusals name file, line and key; the schema agrees."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from redpp_serve.cli import COMMANDS, main, parser
from redpp_serve.config import keys, read, schema
from redpp_serve.errors import RedppError
from redpp_serve.options import ConfigOptions, Range, RangeOr

SECTIONS = {name: command.records for name, command in COMMANDS.items() if ConfigOptions in command.records}
WHOLE = """\
# every kind of value
package:
  arch: net.py:Net
  input: [ids=20:int64:0..999, 3x224x224]
  exclude: head
  target: macs=0.5
  round-to: auto
  batch-size: 16
  distil: 1e1
  dry-run: true
  trust-file: false
serve:
compare:
  server: triton
  require: ["speedup>=1.2,agreement>=0.99", p99_ms<=20]
  sweep: "concurrency=1,4"
ab start:
  split: 90:10
  shadow: true
  observe: true
"""
COMMAND_LINES = [
    "redpp-serve package --arch=net.py:Net --input=ids=20:int64:0..999 --input=3x224x224 --exclude=head "
    "--target=macs=0.5 --round-to=auto --batch-size=16 --distil=1e1 --dry-run",
    "redpp-serve serve",
    "redpp-serve compare --server=triton '--require=speedup>=1.2,agreement>=0.99' '--require=p99_ms<=20' "
    "--sweep=concurrency=1,4",
    "redpp-serve ab start --split=90:10 --shadow --observe=10",
]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        Path("redpp.yaml").write_text(text, encoding="utf-8")
        return Path("redpp.yaml")

    return write


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., argparse.Namespace]:
    """The options that a command would run with."""

    def command(name: str, *words: str) -> argparse.Namespace:
        found: list[argparse.Namespace] = []
        monkeypatch.setitem(COMMANDS, name, replace(COMMANDS[name], run=found.append))
        assert main([*name.split(), *words]) == 0
        return found[0]

    return command


def test_which_commands_take_a_file() -> None:
    assert set(SECTIONS) >= {"package", "serve", "compare", "ab start"}


def test_a_file_stands_for_command_lines(file: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", str(file(WHOLE))]) == 0
    assert capsys.readouterr().out.splitlines() == COMMAND_LINES
    for empty in ("", "# nothing\n", "serve:\n", "compare: {}\n"):
        assert main(["config", str(file(empty))]) == 0


def test_options_from_a_file_are_those_of_the_flags(
    file: Callable[[str], Path], run: Callable[..., argparse.Namespace], capsys: pytest.CaptureFixture[str]
) -> None:
    file(WHOLE)
    for line in COMMAND_LINES:
        words = [word.strip("'") for word in line.split()[1:]]
        name = " ".join(words[:2]) if words[0] == "ab" else words[0]
        own = len(name.split())
        expected = vars(parser().parse_args([*words[:own], "x", *words[own:]]))
        found = vars(run(name, "x", "--config", "redpp.yaml"))
        assert {**found, "config": None, "arguments": None} == {**expected, "arguments": None}
    assert "options of redpp.yaml: --split, --shadow, --observe\n" in capsys.readouterr().err


def test_flags_win_also_where_they_repeat_and_a_unit_keeps_the_users_words(
    file: Callable[[str], Path], run: Callable[..., argparse.Namespace], capsys: pytest.CaptureFixture[str]
) -> None:
    file(WHOLE)
    words = ("m.pt", "--config", "redpp.yaml", "--exclude", "stem", "--batch", "4", "--target=latency=0.6")
    found = run("package", *words)
    assert (found.exclude, found.batch_size, found.target) == (["stem"], 4, {"target_latency": 0.6})
    assert found.input == ["ids=20:int64:0..999", "3x224x224"] and found.distil == 10.0
    assert found.arguments == ["package", *words]
    told = capsys.readouterr().err
    # no values: some are secret
    assert told == "options of redpp.yaml: --arch, --input, --round-to, --distil, --dry-run\n"
    assert run("compare", "x", "--config", "redpp.yaml", "--server", "torchserve").server == "torchserve"
    assert run("compare", "x", "--server", "torchserve").sweep == []  # no file is looked for
    run("serve", "x", "--config", "redpp.yaml")
    assert "options of redpp.yaml: none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\n", "line 1: 'a'. Expected: a section for a command"),
        ("- serve\n", "line 1: a list. Expected: a section"),
        ("\n\nserv:\n  workers: 2\n", "line 3: 'serv' is no command .*Expected: one of package, serve.*write serve"),
        ("serve: [1]\n", "line 1: serve: a list. Expected: options by their flags"),
        ("serve:\n  worker: 2\n", "line 2: serve: 'worker' is no option .*What to do: write workers"),
        ("package:\n  round_to: 8\n", "line 2: package: 'round_to' is no option .*write round-to"),
        ("serve:\n  config: x\n", "line 2: serve: 'config' is no option"),
        ("serve:\n  systemd: print\n", "line 2: serve: 'systemd' is no option"),
        ("serve:\n  workers: 2\n  workers: 3\n", "line 3: serve: 'workers' comes twice, first in line 2"),
        ("serve:\n  ? [1]\n  : 2\n", "line 2: serve: a list as a key"),
        ("serve:\n  workers:\n", "line 2: serve: workers is without a value. Expected: a whole number of at least 1"),
        ("serve:\n  workers: two\n", "line 2: serve: workers is 'two'. Expected: a whole number"),
        ("serve:\n  workers: '2'\n", "workers is the text '2' in quotes. Expected: a whole number"),
        ("serve:\n  workers: 2.5\n", "workers is '2.5'. Expected: a whole number"),
        ("serve:\n  workers: [2]\n", "workers is a list. Expected: a whole number"),
        ("serve:\n  server: Triton\n", "server is 'Triton'. Expected: torchserve or triton. What to do: see --server"),
        ("serve:\n  demo-auth-off: yes\n", "demo-auth-off is 'yes'. Expected: true or false"),
        ("serve:\n  demo-auth-off: 'true'\n", "demo-auth-off is the text 'true' in quotes. Expected: true or false"),
        ("serve:\n  observe: often\n", "observe is 'often'. Expected: a whole number of at least 1, or true for 10"),
        (
            "serve:\n  server: !!python/name:os.system x\n",
            "server is of the tag tag:yaml.org,2002:python/name:os.system",
        ),
        ("serve:\n  <<: {workers: 2}\n", "line 2: serve: '<<' is no option"),
        ("compare:\n  duration: .inf\n", "duration is '.inf'. Expected: a number above 0"),
        ("compare:\n  require:\n  - speedup>=1\n  - speed>=1\n", "line 2: compare: require: 'speed' is no figure"),
        ("compare:\n  sweep: [rate=1,2]\n", "sweep: '2' is none of .*a text with commas in .* needs quotes"),
        ("package:\n  target: {macs: 0.5}\n", "target is a mapping. Expected: a text"),
        ("package:\n  target: macs\n", "target: 'macs' is not macs=R or latency=R"),
        ("package:\n  round-to: Auto\n", "round-to is 'Auto'. Expected: a whole number of at least 1, or auto"),
        ("serve:\n\tworkers: 2\n", "redpp.yaml, line 2: found character .* cannot start any token. Expected: YAML"),
        ("serve: {workers: 2\n", "line 2: expected ',' or '}'"),
        ("serve:\n  server: *a\n", "line 2: found undefined alias 'a'"),
        ("serve: {}\n---\nserve: {}\n", "line 2: but found another document"),
        ("[" * 500, "no YAML: it is nested too deeply"),
        ("compare:\n  require: &a [*a]\n", "require is a list. Expected: a text, or a list of them"),
    ],
)
def test_what_is_wrong_is_named_with_file_line_and_key(
    file: Callable[[str], Path], capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    with pytest.raises(RedppError, match=words) as refusal:
        read(file(text), SECTIONS)
    assert refusal.value.found.startswith("redpp.yaml")
    assert main(["serve", "nowhere", "--config", "redpp.yaml"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("redpp-serve serve: redpp.yaml") and len(err.splitlines()) == 1


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"serve: {server: \xff}")
    (tmp_path / "null").write_bytes(b"serve: {server: \x00}")
    (tmp_path / "long").write_bytes(b"#" * (2 << 20))
    for name, words in (
        ("latin", "is no YAML: .*Expected: YAML in UTF-8"),
        ("null", "is no YAML: unacceptable character"),
        ("long", "cannot be read: .* more than"),
        (".", "cannot be read: .* not a regular file"),
        ("absent", "cannot be read: No such file.*--config"),
    ):
        with pytest.raises(RedppError, match=words):
            read(tmp_path / name, SECTIONS)


def test_without_pyyaml_it_says_what_to_install(
    file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file(WHOLE)
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert main(["serve", "x", "--config", "redpp.yaml"]) == 2
    assert "needs PyYAML, which is not installed" in (err := capsys.readouterr().err) and "pip install" in err


def _samples(item: Any) -> tuple[list[Any], list[Any]]:
    """Values that an option takes, and such that it does not, as YAML has them."""
    takes = item.metadata["takes"]
    if item.default is False:
        return [True, False], ["x", 1, [True], {}]
    if isinstance(takes, tuple):
        good: list[Any] = [takes[0]]
        bad: list[Any] = [f"{takes[0]}x", {}, 7]
    elif isinstance(takes, Range):
        low = int(takes.low) + 1 if takes.whole else (takes.low + min(takes.high, takes.low + 1)) / 2
        good, bad = [low, *([takes.word] if isinstance(takes, RangeOr) else [])], ["x", takes.low - 1, {}]
        bad += [low + 0.5] if takes.whole else []
    else:
        good, bad = (
            {"target": ["macs=0.5"], "sweep": ["rate=2"], "require": ["speedup>=1"]}.get(item.name, ["a b"]),
            [{}],
        )
    if item.metadata["bare"] is not None:
        good = [*good, True]
    if item.default == ():
        good = [*good, [good[0], good[0]]]
    else:
        bad = [*bad, [good[0]]]
    return good, bad


def test_the_schema_takes_what_the_reader_takes(file: Callable[[str], Path]) -> None:
    import jsonschema  # takes a second

    validator = jsonschema.Draft7Validator(schema(SECTIONS))
    validator.check_schema(schema(SECTIONS))
    checked = 0
    for section, records in SECTIONS.items():
        for key, item in keys(records).items():
            if key == "since":  # a moment
                continue
            good, bad = _samples(item)
            for value in good:
                document = {section: {key: value}}
                read(file(yaml.safe_dump(document)), SECTIONS)
                assert validator.is_valid(document), document
            for value in bad:
                document = {section: {key: value}}
                with pytest.raises(RedppError, match=f"{section}: {key}"):
                    read(file(yaml.safe_dump(document)), SECTIONS)
                assert not validator.is_valid(document), document
            checked += 1
    assert checked > 80
    assert validator.is_valid({"serve": None}) and not validator.is_valid({"serv": {}})
    assert not validator.is_valid({"serve": {"worker": 2}})


def test_the_schema_is_printed_and_one_of_the_two_is_wanted(
    file: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(schema(SECTIONS)))
    for words in (["config"], ["config", str(file(WHOLE)), "--schema"]):
        assert main(words) == 2 and "Expected: one of them" in capsys.readouterr().err


def test_the_example_of_the_readme_is_good(file: Callable[[str], Path]) -> None:
    text = (Path(__file__).parents[1] / "redpp_serve/README.md").read_text(encoding="utf-8")
    example = text.split("```yaml\n")[1].split("```")[0]
    assert set(read(file(example), SECTIONS)) == {"package", "compare", "ab start"}
