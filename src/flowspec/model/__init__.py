"""Models, their files and their stages."""

import sys
from typing import Any

# OpenVINO tells its maker, over the network, of every graph that it makes; without this package it has nobody to ask.
_modules: dict[str, Any] = sys.modules
_modules.setdefault("openvino_telemetry", None)
