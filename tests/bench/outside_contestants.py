"""Contestants that are wrong or crash, given to the harness as ``outside_contestants:Class``."""

import os
from typing import Any

import torch
from fastbert.bench.models import HuggingFace


class OffByOnePercent(HuggingFace):
    """Fast and wrong."""

    def run(self) -> torch.Tensor:
        return super().run() * 1.01


class Crashes(HuggingFace):
    """Right at first, then takes its process down while it is timed."""

    def outputs(self) -> dict[str, Any]:
        found = super().outputs()
        self.run = lambda: os._exit(8)  # type: ignore[method-assign]
        return found
