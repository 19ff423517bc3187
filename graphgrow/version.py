"""The version, stated once: packaging, `graphgrow --version` and saved files read it here."""

VERSION = "0.1.0"
