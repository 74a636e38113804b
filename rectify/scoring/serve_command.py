"""The command `rectify serve`: a local server that speaks the Perspective API's format."""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket

from rectify.command_line import Parser, execute, say
from rectify.errors import InvalidArgumentError
from rectify.scoring.load import SCORERS, add_allow, load_scorer

KEYS_VARIABLE = "RECTIFY_API_KEYS"
_MAX_CONNECTIONS = 1024
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
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Run the command, until it is interrupted.

    Raises:
        RectifyError: something that was given cannot be used.
    """
    # only here, as --help does without the extra that brings them
    import uvicorn

    from rectify.scoring.server import make_app

    keys = arguments.api_key or [key for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    scorer = load_scorer(arguments.scorer, **({"allow": arguments.allow} if arguments.allow else {}))
    app = make_app(
        scorer,
        attributes=arguments.attributes,
        languages=None if arguments.languages == ["any"] else arguments.languages,
        api_keys=[key.strip() for key in keys],
        quota_per_minute=arguments.quota,
        max_batch=arguments.max_batch,
    )
    with _listen(arguments.host, arguments.port) as listening:
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,  # it would show the keys that stand in addresses
            server_header=False,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_graceful_shutdown=_CLOSING_SECONDS,
        )
        host, port = listening.getsockname()[:2]
        say(f"{scorer.name} ({scorer.revision}) serves at http://{f'[{host}]' if ':' in host else host}:{port}/")
        if not keys and not ipaddress.ip_address(host).is_loopback:
            say(f"anyone who reaches {host} may call it: give --api_key, or --host 127.0.0.1")
        uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 2**16:
        raise InvalidArgumentError(f"port is {port}: give one from 0 to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise InvalidArgumentError(
            f"host {host!r} and port {port} cannot be listened at ({error.strerror or error}): give others"
        ) from error


def main(argv: list[str] | None = None, prog: str = "rectify serve") -> int:
    """The command; returns its exit code."""
    return execute(run, make_parser(prog), argv, extras=["serve"])
