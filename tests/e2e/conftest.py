"""What the browser tests share with the other tests of a running fleet."""

from tests.fleet.conftest import forward, laptop, site

__all__ = ["forward", "laptop", "site"]
