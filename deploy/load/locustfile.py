"""Drive both versions of a package from many machines, with the requests that `redpp-serve compare` sends.

    locust -f deploy/load/locustfile.py --master --headless --users 32 --run-time 60s --expect-workers 2 \\
        --package dist/model --original URL --pruned URL --header "Authorization: Bearer TOKEN"
    locust -f deploy/load/locustfile.py --worker --master-host HOST --package dist/model     # on each machine

Each worker has a copy of the package, and writes what it has seen into ``--record``. Gather these files, and
`redpp-serve compare dist/model --from-locust FOLDER` gives the figures. With ``--gateway URL --sticky-header NAME``
users ask through the gateway of an A/B test instead: `redpp-serve ab status` judges those.
"""

import io
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from locust import FastHttpUser, constant, events, task

from redpp_serve.comparison.distributed import (
    LONGEST_BLOCK_S,
    SHORTEST_BLOCK_S,
    Header,
    Notebook,
    Sent,
    digest_of,
    file_of,
    order_of,
    turn_at,
)
from redpp_serve.comparison.payloads import Payload, declared_preprocess, payloads_of
from redpp_serve.errors import RedppError
from redpp_serve.handlers.payload import parse
from redpp_serve.handlers.wire import HANDLER_HEADER, LENGTH_HEADER, read_seconds
from redpp_serve.packaging.mar import read_artifact
from redpp_serve.serving.running import find
from redpp_serve.variants import NAMES, ORIGINAL


@events.init_command_line_parser.add_listener
def add_arguments(parser):
    parser.add_argument("--package", help="packaged folder, the same on every machine")
    parser.add_argument("--inputs", help="inputs to send, as for compare (default: the package's)")
    parser.add_argument("--seed", type=int, default=0, help="as for compare (default: 0)")
    for name in NAMES:
        parser.add_argument(f"--{name}", help="URL to post to (default: that of the server on this machine)")
    parser.add_argument("--header", action="append", help="'NAME: VALUE', such as the server's token; repeatable")
    parser.add_argument("--block", type=float, default=1.0, help="seconds in which all ask one version (default: 1)")
    parser.add_argument("--record", default="locust", help="folder of records (default: locust)")
    parser.add_argument("--gateway", help="URL of an A/B test's gateway, in place of both versions")
    parser.add_argument("--sticky-header", help="request header in which users give their name")


def settle(options):
    """Take URLs and token that were not given from the server that runs for the package on this machine.

    Raises:
        RedppError: none runs, or the options make no sense.
    """
    if options.package is None:
        raise RedppError("no --package", "a packaged folder", "give --package FOLDER")
    if not SHORTEST_BLOCK_S <= options.block <= LONGEST_BLOCK_S:
        expected = f"{SHORTEST_BLOCK_S:g} to {LONGEST_BLOCK_S:g} seconds"
        raise RedppError(f"--block {options.block:g}", expected, "write for example --block 1")
    if options.gateway is None and not all(getattr(options, name) for name in NAMES):
        running = find(Path(options.package))
        for name in NAMES:
            setattr(options, name, getattr(options, name) or running.urls[name])
        token = [f"{name}: {value}" for name, value in running.headers["inference"].items()]
        options.header = options.header or token


class Drive:
    """The requests of a run, and where they are written down; one in each worker."""

    def __init__(self, options):
        self.options = options
        folder = Path(options.package)
        self.payloads = payloads_of(folder, options.inputs and Path(options.inputs), options.seed)
        self.urls = (options.gateway,) if options.gateway else (options.original, options.pruned)
        self.headers = dict(line.split(": ", 1) for line in options.header or ())
        self.bodies = [(payload.body, {"Content-Type": payload.content_type}) for payload in self.payloads]
        if urlsplit(self.urls[0]).path.startswith("/v2/"):
            artifact = read_artifact(folder / ORIGINAL.archive)
            self.bodies = [in_the_protocol(payload, artifact) for payload in self.payloads]
        self.file = io.StringIO()
        if not options.gateway:
            Path(options.record).mkdir(parents=True, exist_ok=True)
            self.file = file_of(Path(options.record), socket.gethostname()).open("w", encoding="utf-8")
            server = "triton" if urlsplit(self.urls[0]).path.startswith("/v2/") else "torchserve"
            header = Header(digest_of(self.payloads), options.block, self.urls, server)
            self.notebook = Notebook(self.file, header)


def in_the_protocol(payload: Payload, artifact):
    """Return body and headers of a request of the Open Inference Protocol."""
    from tritonclient.http import InferenceServerClient, InferInput
    from tritonclient.utils import np_to_triton_dtype

    inputs = artifact.graph.inputs
    tensors = parse({"body": payload.body}, inputs, declared_preprocess(artifact))
    given = []
    for spec, tensor in zip(inputs, tensors, strict=True):
        array = tensor[None].numpy()
        given.append(InferInput(spec.name, array.shape, np_to_triton_dtype(array.dtype)))
        given[-1].set_data_from_numpy(array)
    body, length = InferenceServerClient.generate_request_body(given)
    return body, {"Content-Type": "application/octet-stream", LENGTH_HEADER: str(length)}


@events.init.add_listener
def on_init(environment, **_):
    if not environment.parsed_options.worker:  # a worker gets them from its master
        settle(environment.parsed_options)


@events.test_start.add_listener
def on_start(environment, **_):
    if not environment.parsed_options.master:
        environment.drive = Drive(environment.parsed_options)


@events.test_stop.add_listener
def on_stop(environment, **_):
    if not environment.parsed_options.master:
        with suppress(AttributeError):  # it never began
            environment.drive.file.close()


class Client(FastHttpUser):
    """A user who asks again as soon as there is an answer; all of them the same version at a time."""

    host = "http://127.0.0.1"  # every URL is whole
    wait_time = constant(0)
    network_timeout = connection_timeout = 30.0

    def on_start(self):
        self.drive, self.name = self.environment.drive, uuid.uuid4().hex
        sticky = self.drive.options.sticky_header
        self.headers = {**self.drive.headers, **({sticky: self.name} if sticky else {})}
        self.block, self.count = -1, 0
        self.inputs = order_of(self.name, 0, len(self.drive.payloads))

    @task
    def ask(self):
        drive = self.drive
        if drive.options.gateway:
            self.post(drive.options.gateway, next(self.inputs), "gateway")
            return
        block, arm, opens, _ = turn_at(time.time(), drive.options.block)
        time.sleep(max(0.0, opens - time.time()))
        if block != self.block:
            self.block, self.count, self.inputs = block, 0, order_of(self.name, block, len(drive.payloads))
        payload, start, clock = next(self.inputs), time.time(), time.perf_counter()
        response = self.post(drive.urls[arm], payload, NAMES[arm])
        seconds = time.perf_counter() - clock
        handler = read_seconds((response.headers or {}).get(HANDLER_HEADER))
        error = "" if response.status_code else str(response.error)
        turn, self.count = self.count, self.count + 1
        status = response.status_code or 0
        sent = Sent(block, arm, self.name, turn, payload, start, seconds, handler, status, error)
        drive.notebook.add(sent, response.content or b"")

    def post(self, url, payload, name):
        body, headers = self.drive.bodies[payload]
        return self.client.post(url, data=body, headers={**self.headers, **headers}, name=name)
