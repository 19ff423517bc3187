"""The version, stated once: packaging, `graphgrow --version` and saved files read it here."""

__version__ = "0.1.0"
