"""`poa watch`: the dashboard of a run."""

import argparse
from pathlib import Path

from pipeline.commands.arguments import path, whole
from pipeline.errors import UserError

HELP = "the dashboard of a run, over Prometheus"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `poa watch`."""
    parser.add_argument("directory", metavar="RUN", type=path, help="run directory")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", metavar="URL", help="default: %(default)s")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (default: %(default)s)")
    parser.add_argument("--port", type=whole(0, 65535), default=9490, help="0: a free one (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Serve the page until interrupted."""
    from pipeline.monitor.discovery import run_label
    from pipeline.monitor.watch import make_server

    directory = Path(args.directory)
    if not (directory / "config.yaml").is_file():
        raise UserError("no such run", str(directory), "name a directory that `poa train` wrote")
    server = make_server(run_label(directory), args.prometheus, args.host, args.port)
    print(f"watching {directory} on http://{args.host}:{server.server_port}/ (Ctrl-C ends it)", flush=True)
    with server:
        server.serve_forever()
    return 0
