"""The console script `graphgrow`. So far it states its version; growing is done from Python."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from graphgrow.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status of the command line `arguments` (those of the process if None)."""
    parser = argparse.ArgumentParser(
        prog="graphgrow",
        description="A graph-rewriting compiler for growing neural networks.",
        epilog="There are no commands yet: import graphgrow from Python, as README.md shows.",
    )
    parser.add_argument("--version", action="version", version=f"graphgrow {__version__}")
    parser.parse_args(arguments)
    parser.print_help()
    return 0
