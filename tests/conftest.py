"""One thread, and three profiles of hypothesis: dev, ci, nightly, chosen by HYPOTHESIS_PROFILE."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# Tracing a drawn network takes longer than the health check allows and varies with the machine.
_SLOW = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", max_examples=25, **_SLOW)
settings.register_profile("ci", max_examples=75, derandomize=True, **_SLOW)
settings.register_profile("nightly", max_examples=2000, **_SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))
