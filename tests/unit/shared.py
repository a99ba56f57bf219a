"""Constants and helpers of the unit tests."""

import sys
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
DHIS2_USERNAME = "reader"
DHIS2_PASSWORD = "pä:ss w%rd"
DHIS2_TOKEN = "d2pat_0123456789abcdefghijklmnopqrstuvwxyzABCDEF"
DHIS2_UNITS = 123


@dataclass(frozen=True)
class ObjectStore:
    """A running S3 object store, and the keys that may do everything there."""

    endpoint_url: str
    access_key: str
    secret_key: str

    def client(self) -> Any:
        """Return a boto3 client of it."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, signature_version="s3v4"),
        )


def load_by_path(path: str) -> ModuleType:
    """Load a file of this repository that is in no package: a role's plugin, or a command."""
    name = f"loaded_{path.removesuffix('.py').replace('/', '_')}"
    # Named, for a command's file has no suffix to tell it by.
    spec = spec_from_loader(name, SourceFileLoader(name, str(REPOSITORY / path)))
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module
