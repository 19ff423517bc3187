"""Seeing or changing the operators that run."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class Dispatch(TorchDispatchMode):
    """A dispatch mode for which torch does not load its compiler, which would take seconds."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return that calls need not be kept from a compiler: none runs in these modes."""
        return False
