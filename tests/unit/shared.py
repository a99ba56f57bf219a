"""Constants and helpers of the unit tests."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parents[2]
DHIS2_USERNAME = "reader"
DHIS2_PASSWORD = "pä:ss w%rd"
DHIS2_UNITS = 123


def load_by_path(path: str) -> ModuleType:
    """Load a file of this repository that is in no package, such as a plugin of a role."""
    name = f"loaded_{path.removesuffix('.py').replace('/', '_')}"
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module
