"""The three ways in which graphgrow says no. Each message is one sentence."""

from __future__ import annotations


class UnsupportedOp(ValueError):
    """Tracing or axis analysis met something that it cannot represent."""


class NotApplicable(ValueError):
    """A rewrite cannot be applied; the sentence is the one that `obstacle` returns."""


class NotEquivalent(ValueError):
    """Verification found outputs that differ by more than the tolerance."""
