"""The gateway's configuration as text: nginx in front of one model server, which chooses the arm of every request.

HTTP only: gRPC requests go past the gateway to the server and are not split.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from redpp_serve.ab.spec import Split
from redpp_serve.packaging.server_config import MAX_REQUEST_BYTES

ADDRESS = "127.0.0.1"
ARM_HEADER, REQUEST_ID_HEADER = "X-Redpp-Arm", "X-Request-Id"
# Files in the gateway's folder. nginx looks for the switches at every request: no reload, no connection is cut.
PROMOTED, ROLLED_BACK, SHADOW_OFF = "promoted", "rolled_back", "shadow_off"
CONFIG, ACCESS_LOG, ERROR_LOG, PID = "nginx.conf", "access.log", "error.log", "nginx.pid"
_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


@dataclass(frozen=True)
class Gateway:
    """What the configuration depends on.

    Attributes:
        folder: the gateway's private folder, absolute; its name needs no quoting in nginx.
        port: where users send requests, on the loopback address.
        server: port of the model server's HTTP inference.
        public: path that users post to, such as ``/predictions/NAME``.
        paths: path on the server for the original and for the pruned version.
        split: how users are divided.
        sticky: request header that names the user; None to decide for every request anew.
        salt: mixed into the division, so that another experiment divides the same users differently.
        recorder: port of the shadow recorder; None without shadow mode.
        account: user and group of nginx's worker where root starts it; None elsewhere.
        connections: that the worker may hold; a request in flight takes two, with shadow three.
    """

    folder: Path
    port: int
    server: int
    public: str
    paths: tuple[str, str]
    split: Split
    sticky: str | None
    salt: str
    recorder: int | None = None
    account: tuple[str, str] | None = None
    connections: int = 1024


def gateway_config(gateway: Gateway) -> str:
    """The text of ``nginx.conf``."""
    head = _MAIN.format(
        user=f"user {gateway.account[0]} {gateway.account[1]};\n" if gateway.account else "",
        folder=gateway.folder,
        error_log=ERROR_LOG,
        pid=PID,
        connections=gateway.connections,
        files=gateway.connections + 64,
    )
    temporary = "".join(f"    {name}_temp_path {gateway.folder}/tmp/{name};\n" for name in _TEMPORARY)
    http = [
        temporary,
        _LOG.format(folder=gateway.folder, access_log=ACCESS_LOG),
        _division(gateway),
        _upstreams(gateway),
        _server(gateway),
        _sink(gateway),
    ]
    return head + "http {\n" + "\n".join(filter(None, http)) + "}\n"


def header_variable(header: str) -> str:
    """Nginx's name for a request header."""
    return "$http_" + header.lower().replace("-", "_")


_MAIN = """# Written by redpp-serve ab start.
daemon off;
{user}worker_processes 1;
worker_rlimit_nofile {files};
pid {folder}/{pid};
error_log {folder}/{error_log} warn;
events {{ worker_connections {connections}; }}
"""

# Neither bodies nor users: a request is known by its id, which its sender gets too.
_LOG = """    log_format redpp escape=json '{{"time":"$time_iso8601","request_id":"$request_id","arm":"$arm",'
        '"chosen_by":"$chosen_by","status":$status,"request_bytes":$request_length,"request_time":$request_time,'
        '"upstream_time":$upstream_seconds}}';
    access_log {folder}/{access_log} redpp;
    map $upstream_response_time $upstream_seconds {{ "~^(?<seconds>[0-9.]+)$" $seconds; default null; }}
    default_type application/json;
    server_tokens off;
    uninitialized_variable_warn off;
    keepalive_timeout 75s;
    keepalive_requests 100000;
"""


def _division(gateway: Gateway) -> str:
    """Who gets which arm: the header that asks for one, else the user's part of the split."""
    split, (original, pruned) = gateway.split, gateway.paths
    key, named = "$request_id", ""
    if gateway.sticky:
        user, key = header_variable(gateway.sticky), "$split_key"
        named = f'    map {user} {key} {{ "" $request_id; default {user}; }}\n'
    shares = {"original": split.original, "pruned": split.pruned}
    whole = next((arm for arm, share in shares.items() if share == 100), None)
    parts = f"* {whole};" if whole else f"{split.pruned}% pruned; * original;"
    asked = header_variable(ARM_HEADER)
    return (
        f"{named}"
        f'    split_clients "{gateway.salt}{key}" $split_arm {{ {parts} }}\n'
        f'    map {asked} $asked_arm {{ "" ""; original original; pruned pruned; default unknown; }}\n'
        f"    map $arm $arm_path {{ pruned {pruned}; default {original}; }}\n"
    )


def _upstreams(gateway: Gateway) -> str:
    text = f"    upstream model {{ server {ADDRESS}:{gateway.server}; keepalive 64; keepalive_timeout 30s; }}\n"
    if gateway.recorder is None:
        return text
    # A recorder that has failed once is left alone for a while, and the mirrored request ends in the sink at once:
    # nginx takes a connection's next request only when the mirrored one has ended.
    return text + (
        f"    upstream recorder {{ server {ADDRESS}:{gateway.recorder} max_fails=1 fail_timeout=5s; "
        f"server unix:{gateway.folder}/sink.sock backup; keepalive 16; }}\n"
    )


def _server(gateway: Gateway) -> str:
    # A mirrored request shares its variables with the user's and passes through the server's block: $arm is set in the
    # users' location and nowhere else.
    mirror = "            mirror /.shadow;\n" if gateway.recorder is not None else ""
    return f"""    server {{
        listen {ADDRESS}:{gateway.port};
        client_max_body_size {MAX_REQUEST_BYTES};
        client_body_buffer_size 1m;
        client_body_timeout 30s;
        client_header_timeout 30s;
        add_header {ARM_HEADER} $arm always;
        add_header {REQUEST_ID_HEADER} $request_id always;
        # No named location here: nginx has none for a request whose first line it could not read. 494: long headers.
        error_page 400 414 501 505 /.malformed;
        error_page 494 =400 /.malformed;
        error_page 404 @elsewhere;
        error_page 405 @method;
        error_page 413 @too_large;
        error_page 502 503 @down;
        error_page 504 @late;

        location = {gateway.public} {{
            if ($request_method !~ ^(POST|PUT)$) {{ return 405; }}
            if ($asked_arm = unknown) {{ return 400 '{_error(f"{ARM_HEADER} is neither original nor pruned")}'; }}
            set $arm $split_arm;
            set $chosen_by split;
            if (-f {gateway.folder}/{PROMOTED}) {{ set $arm pruned; set $chosen_by promote; }}
            if (-f {gateway.folder}/{ROLLED_BACK}) {{ set $arm original; set $chosen_by rollback; }}
            if ($asked_arm) {{ set $arm $asked_arm; set $chosen_by header; }}
{mirror}            proxy_pass http://model$arm_path;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
            proxy_set_header {REQUEST_ID_HEADER} $request_id;
            proxy_set_header {ARM_HEADER} "";
            proxy_hide_header {REQUEST_ID_HEADER};
            proxy_connect_timeout 2s;
            proxy_send_timeout 30s;
            proxy_read_timeout 120s;
            # A prediction has no side effect, so a kept connection that the server has just closed is tried anew.
            proxy_next_upstream error non_idempotent;
            proxy_buffers 16 64k;
            proxy_buffer_size 64k;
        }}
{_shadow(gateway)}        location / {{ return 404; }}
        location = /.malformed {{ internal; return 400 '{_error("a request that is not HTTP as this server reads it")}'; }}
        location @elsewhere {{ return 404 '{_error(f"nothing is served here, expected POST {gateway.public}")}'; }}
        location @method {{ return 405 '{_error(f"expected POST {gateway.public}, or PUT")}'; }}
        location @too_large {{
            return 413 '{_error(f"a body of more than {MAX_REQUEST_BYTES} bytes, expected one input of the network")}';
        }}
        location @down {{ return 502 '{_error("the model server does not answer, see redpp-serve ab status")}'; }}
        location @late {{ return 504 '{_error("the model server did not answer in time")}'; }}
    }}
"""


def _shadow(gateway: Gateway) -> str:
    if gateway.recorder is None:
        return ""
    return f"""        location = /.shadow {{
            internal;
            log_subrequest off;
            if (-f {gateway.folder}/{SHADOW_OFF}) {{ return 204; }}
            proxy_pass http://recorder/;
            proxy_method POST;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header {REQUEST_ID_HEADER} $request_id;
            proxy_connect_timeout 100ms;
            proxy_send_timeout 200ms;
            proxy_read_timeout 200ms;
            proxy_next_upstream error timeout http_500 non_idempotent;
        }}
"""


def _sink(gateway: Gateway) -> str:
    if gateway.recorder is None:
        return ""
    return f"""    server {{
        listen unix:{gateway.folder}/sink.sock;
        access_log off;
        client_max_body_size {MAX_REQUEST_BYTES};
        location / {{ return 204; }}
    }}
"""


def _error(text: str) -> str:
    """A JSON body inside nginx's single quotes; the texts above hold neither quotes nor dollars."""
    return f'{{"error": "{text}"}}\\n'
