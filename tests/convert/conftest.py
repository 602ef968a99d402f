"""Settings of the conversion tests."""

from __future__ import annotations

import logging

# pytest listens to every logger, and PyTorch then writes a structured trace of each export, which takes longer than
# the export.
for _name in ("torch.__trace", "torch.fx", "torch._dynamo", "torch.export"):
    logging.getLogger(_name).disabled = True
