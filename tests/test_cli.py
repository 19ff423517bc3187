"""The console script."""

from __future__ import annotations

import pytest

from graphgrow.cli import main
from graphgrow.version import __version__


def test_the_console_script_states_its_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"graphgrow {__version__}\n"


def test_without_arguments_the_console_script_says_what_there_is(capsys):
    assert main([]) == 0
    assert "no commands yet" in capsys.readouterr().out
