"""The command `rectify serve`: a local server that speaks the Perspective API's format."""

from __future__ import annotations

import argparse
import gc
import ipaddress
import os
import socket
import sys

from rectify.command_line import Parser, execute, say
from rectify.errors import InvalidArgumentError, first_line
from rectify.scoring.failures import text_free_log
from rectify.scoring.freed_memory import memory_given_back
from rectify.scoring.load import SCORERS, add_allow, load_scorer

KEYS_VARIABLE = "RECTIFY_API_KEYS"
_MAX_CONNECTIONS = 1024
_BACKLOG = 1024  # connections that may come at once
_OTHER_FILES = 256
_SWITCH_SECONDS = 0.001
_CLOSING_SECONDS = 10


def make_parser(prog: str) -> Parser:
    """The flags of the command."""
    parser = Parser(
        prog=prog,
        description="Serve a scorer under the Perspective API's paths: a client needs another URL, and nothing else. "
        "No text is logged or kept.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 for any that is free (default: %(default)s)")
    scorers = "; ".join(f"{form}: {what}" for form, what in SCORERS.items()).replace("%", "%%")
    parser.add_argument("--scorer", default="pocket", help=f"what scores (default: %(default)s). {scorers}")
    add_allow(parser)
    parser.add_argument("--attributes", nargs="+", help="those to answer (default: all of the scorer's)")
    parser.add_argument(
        "--languages",
        nargs="+",
        default=["en"],
        help="codes of those to answer, the first one for requests that name none; 'any' for all (default: en)",
    )
    parser.add_argument(
        "--api_key",
        action="append",
        help="one to accept, may be repeated; as other users see it in the list of processes, better set "
        f"{KEYS_VARIABLE}, several with commas between (default: none is needed)",
    )
    parser.add_argument("--quota", type=int, help="calls a minute of each key, or of all callers (default: no limit)")
    parser.add_argument("--max_batch", type=int, default=64, help="texts scored at a time (default: %(default)s)")
    parser.add_argument(
        "--cors",
        action="append",
        metavar="ORIGIN",
        help="site whose pages may call from a browser, as https://app.example, may be repeated; * for any "
        "(default: none)",
    )
    parser.add_argument(
        "--public_url",
        help="where clients reach the server, if not at the address that it sees itself, as behind a reverse proxy: "
        "the discovery document sends them there",
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Run the command, until it is interrupted.

    Raises:
        RectifyError: something that was given cannot be used.
    """
    # only here, as --help does without the extra that brings them
    import uvicorn

    from rectify.scoring.connections import Patience, patient_protocol
    from rectify.scoring.server import make_app

    keys = arguments.api_key or _keys_of_environment()
    scorer = load_scorer(arguments.scorer, **({"allow": arguments.allow} if arguments.allow else {}))
    app = make_app(
        scorer,
        attributes=arguments.attributes,
        languages=None if arguments.languages == ["any"] else arguments.languages,
        api_keys=[key.strip() for key in keys],
        quota_per_minute=arguments.quota,
        max_batch=arguments.max_batch,
        cors=arguments.cors or (),
        public_url=arguments.public_url,
    )
    connections, backlog = _places()
    with _listen(arguments.host, arguments.port, backlog) as listening, text_free_log(), memory_given_back():
        config = uvicorn.Config(
            app,
            http=patient_protocol(Patience(connections)),
            ws="none",
            log_config=None,
            log_level="error",  # whoever sends no HTTP could fill the log with warnings
            access_log=False,  # it would show the keys that stand in addresses
            server_header=False,
            proxy_headers=False,  # nothing depends on what they say
            backlog=backlog,
            timeout_graceful_shutdown=_CLOSING_SECONDS,
        )
        host, port = listening.getsockname()[:2]
        say(f"{scorer.name} ({scorer.revision}) serves at http://{f'[{host}]' if ':' in host else host}:{port}/")
        if not ipaddress.ip_address(host).is_loopback:
            if not keys:
                say(f"anyone who reaches {host} may call it: give --api_key, or --host 127.0.0.1")
            if arguments.public_url is None:
                say("the discovery document names an address of this machine: behind a mapped port give --public_url")
        # what is there now stays: collecting garbage, and so every request, need not go through it again and again
        gc.freeze()
        sys.setswitchinterval(_SWITCH_SECONDS)  # the event loop waits that long for each thread that computes
        uvicorn.Server(config).run(sockets=[listening])


def _keys_of_environment() -> list[str]:
    """The keys; none where the variable is not set.

    Raises:
        InvalidArgumentError: it is set and holds none, which might be a mistake that opens the server to all.
    """
    if KEYS_VARIABLE not in os.environ:
        return []
    keys = [key.strip() for key in os.environ[KEYS_VARIABLE].split(",")]
    if not any(keys):
        raise InvalidArgumentError(f"{KEYS_VARIABLE} is set and holds no key: give one, or unset it to take any caller")
    return [key for key in keys if key]


def _places() -> tuple[int, int]:
    """How many connections are held, and how many more may come at once, with the files that may be open."""
    try:
        import resource
    except ImportError:  # on Windows sockets are no files
        return _MAX_CONNECTIONS, _BACKLOG
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_CONNECTIONS + _BACKLOG + _OTHER_FILES
    if files != resource.RLIM_INFINITY and files < wanted:
        files = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    if files == resource.RLIM_INFINITY or files >= wanted:
        return _MAX_CONNECTIONS, _BACKLOG
    share = max(8, (files - _OTHER_FILES) // 2)
    return share, share


def _listen(host: str, port: int, backlog: int) -> socket.socket:
    if not 0 <= port < 2**16:
        raise InvalidArgumentError(f"port is {port}: give one from 0 to 65535")
    if not host:  # which would be any address
        raise InvalidArgumentError("host is '': give one, as 127.0.0.1")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=backlog)
    except (OSError, ValueError) as error:  # ValueError: no name of a host can be so
        said = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise InvalidArgumentError(
            f"host {host!r} and port {port} cannot be listened at ({said}): give others"
        ) from error


def main(argv: list[str] | None = None, prog: str = "rectify serve") -> int:
    """The command; returns its exit code."""
    return execute(run, make_parser(prog), argv, extras=["serve"])
