"""What a server would run of a package that somebody else made: its code is this project's own, or it is refused.

A package is data but for the code that each archive and each version of the model repository carries, and for the
settings by which a server could be made to run other code. Of an archive, all entries but the network and its settings
count as code; of a version in the model repository, all files but the network.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from redpp_serve.archives import ZIP_ERRORS, check_claims, damaged_entry, open_zip, read_small
from redpp_serve.errors import RedppError, printable
from redpp_serve.files import read_bounded
from redpp_serve.graph.artifact import load
from redpp_serve.options import SERVERS, Serving, takes
from redpp_serve.packaging.bounds import check_answers
from redpp_serve.packaging.mar import (
    ARTIFACT,
    CONFIG,
    MANIFEST,
    WRITTEN,
    artifact_bytes,
    manifest,
    manifest_of,
    serving_sources,
    unreadable,
)
from redpp_serve.packaging.server_config import model_config
from redpp_serve.packaging.templates import render
from redpp_serve.packaging.triton_repository import CONFIG as TRITON_CONFIG
from redpp_serve.packaging.triton_repository import LABELS
from redpp_serve.variants import VARIANTS

MAX_FILES = 10_000  # of a package
_MOST_CODE, _MOST_SETTINGS = 4 << 20, 1 << 20  # bytes of a file
_COMPILED = "__pycache__"  # servers write it, and `serve` has Python look elsewhere
FORMER = {  # release -> digests of the code in an archive and in a version of the model repository
    "0.1.0": (
        "6fe7b5df0e8ad64401ac06bd465a6f8c10dd97b135724d4dd0ef17c7396cba04",
        "cd13b405158c59eaf7ff6822577e221ec2f1c63bc13a15842b913005acde320c",
    )
}
_SETTING = re.compile(r"\s*(\w+):(?: ([\w.+-]+))?")
_FIELD = re.compile(r'\s*(?:(\w+)(?:: ("(?:[^"\\]|\\.)*"|[\w.+-]+)| (\{\}?))|(\}))')
_FIELDS = frozenset(  # of the configurations that releases write
    re.findall(
        r"\w+",
        "name backend max_batch_size input output data_type dims reshape shape version_policy all instance_group count "
        "kind dynamic_batching preferred_batch_size max_queue_delay_microseconds parameters key value string_value "
        "model_warmup batch_size inputs input_data_file label_filename",
    )
)
_PARAMETERS = ('"threads"', '"precision"', '"engine"')


def check_package(folder: Path, server: str, *, name: str, trust: bool = False) -> None:
    """Refuse a package that cannot be served, or whose code and settings are not those of a release of this project.

    Args:
        folder: the packaged folder.
        server: ``torchserve`` or ``triton``.
        name: the model's name, see `serving.serve.model_name`.
        trust: the user vouches for the code (``--trust-package``); everything else is checked all the same.

    Raises:
        RedppError: names what is damaged, what leads out of the folder, or what differs.
    """
    check_tree(folder)
    parts = _archives(folder) if server == SERVERS[0] else _repository(folder / "triton" / name)
    for where, found in parts:
        if found and not trust:
            raise RedppError(
                f"{where} {found}: serving it would run code of whoever made it",
                "the code of this release of redpp-serve, or of an earlier one",
                "package the model again; or, if you trust whoever made this package, add --trust-package",
            )


def check_tree(folder: Path) -> None:
    """Refuse a folder that holds more than files and folders of its own.

    Raises:
        RedppError: names a pipe, a device, a link that leads out of the folder, or too many files.
    """
    top, count = Path(os.path.realpath(folder)), 0
    for place, folders, files in os.walk(top):
        count += len(folders) + len(files)
        if count > MAX_FILES:
            raise _foreign(folder, f"holds more than {MAX_FILES} files")
        for path in (Path(place, inner) for inner in (*folders, *files)):
            leads = os.path.realpath(path)  # which takes links in circles, as Path.resolve does not
            if path.is_symlink() and not Path(leads).is_relative_to(top):
                raise _foreign(path, "is a link that leads out of the package")
            if not (path.is_dir() or path.is_file()):
                raise _foreign(path, "is neither a file nor a folder")


def _foreign(path: Path, found: str) -> RedppError:
    do = "do not use this package; package the model again, or fetch it from its author"
    return RedppError(f"{path} {found}", "a folder as redpp-serve package writes it", do)


def _archives(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield each archive with what is not this project's own in it, empty where all is."""
    for path in (variant.archive_in(folder) for variant in VARIANTS):
        if entry := damaged_entry(path, WRITTEN):
            raise unreadable(path, f"it is damaged at {printable(entry)[:80]}")
        try:
            with open_zip(path, WRITTEN) as archive:
                names = {info.filename for info in archive.infolist()} - {ARTIFACT, CONFIG, MANIFEST}
                code = {name: read_small(archive, name, _MOST_CODE) for name in sorted(names)}
                settings = read_small(archive, CONFIG, _MOST_SETTINGS).decode()
        except (*ZIP_ERRORS, KeyError) as error:
            raise unreadable(path, error) from error
        batch = _batch(path, re.search(r"(?m)^batchSize: *(\d+)$", settings))
        check_answers(load(artifact_bytes(path)).graph, batch)
        yield path, _of_archive(path, code, settings)


def _batch(path: Path, match: re.Match[str] | None) -> int:
    batch = int(match[1][:10]) if match else 1
    if batch not in takes(Serving, "batch_size"):
        raise _foreign(path, f"asks for batches of {batch}")
    return batch


def _of_archive(path: Path, code: Mapping[str, bytes], settings: str) -> str:
    found, model = manifest(path), manifest(path)["model"]
    if found != manifest_of(model.get("modelName"), model["modelVersion"]):
        return f"has a {MANIFEST} of another form"
    known = {match[1] for match in map(_SETTING.fullmatch, model_config(Serving()).splitlines()) if match}
    lines = [(line, _SETTING.fullmatch(line)) for line in settings.splitlines()]
    if odd := [line for line, match in lines if not match or match[1] not in known]:
        return f"has a line in {CONFIG} that no release writes ({printable(odd[0])[:60]!r})"
    return _unknown({"handler.py": render("handler.py").encode(), **serving_sources()}, code, 0)


def _repository(model: Path) -> Iterator[tuple[Path, str]]:
    """Yield the configuration and each version with what is not this project's own in it, empty where all is."""
    path = model / TRITON_CONFIG
    own = {"model.py": render("model.py", artifact=ARTIFACT).encode(), **serving_sources()}
    try:
        config = read_bounded(path, _MOST_SETTINGS).decode()
        yield path, _of_config(config)
        batch = _batch(path, re.search(r"(?m)^max_batch_size: *(\d+)$", config))
        for version in (model / variant.triton_version for variant in VARIANTS):
            check_claims(version / ARTIFACT)
            check_answers(load(version / ARTIFACT).graph, batch)
            files = (inner for inner in sorted(version.rglob("*")) if inner.is_file())
            names = {inner.relative_to(version).as_posix(): inner for inner in files if _COMPILED not in inner.parts}
            names.pop(ARTIFACT, None)
            yield version, _unknown(own, {name: read_bounded(p, _MOST_CODE) for name, p in names.items()}, 1)
    except (OSError, ValueError) as error:
        do = "package the model again"
        raise RedppError(f"{model} cannot be read: {error}", "a model repository of redpp-serve", do) from error


def _of_config(text: str) -> str:
    blocks: list[str] = []
    for line in text.splitlines():
        match = _FIELD.fullmatch(line)
        word, value = (match[1], match[2]) if match else (None, None)
        ends = bool(match and match[4])
        if not match or (ends and not blocks) or not (ends or word in _FIELDS):
            return f"has a line that no release writes ({printable(line)[:60]!r})"
        if (
            (word == "backend" and value != '"python"')
            or (word == "key" and blocks == ["parameters"] and value not in _PARAMETERS)
            or (word == "label_filename" and value != f'"{LABELS}"')
            or (word == "input_data_file" and not re.fullmatch(r'"input_\d+"', value or ""))
        ):
            return f"asks for what no release does ({printable(line.strip())[:60]!r})"
        if ends:
            blocks.pop()
        elif match[3] == "{":
            blocks.append(word or "")
    return ""


def _unknown(own: Mapping[str, bytes], code: Mapping[str, bytes], place: int) -> str:
    """Return how code differs from this release's; empty where it does not, or is that of an earlier release."""
    if code == own or digest(code) in {digests[place] for digests in FORMER.values()}:
        return ""
    differing = sorted(name for name in {*own, *code} if own.get(name) != code.get(name))
    word = "lacks" if differing[0] not in code else "adds" if differing[0] not in own else "has another"
    more = f" (and {len(differing) - 1} more files differ)" if len(differing) > 1 else ""
    return f"{word} {printable(differing[0])[:80]}{more}"


def digest(code: Mapping[str, bytes]) -> str:
    """Return a digest of files by name."""
    whole = hashlib.sha256()
    for name, content in sorted(code.items()):
        whole.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(content).digest())
    return whole.hexdigest()
