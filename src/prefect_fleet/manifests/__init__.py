"""Run manifests: one JSON file a flow run, a record that needs no database.

A flow writes them when `@with_manifest` stands above its `@flow`. What a host does with the files
afterwards, and how people read them, is `python -m prefect_fleet.manifests`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect_fleet.manifests.hooks import with_manifest

__all__ = ["with_manifest"]


def __getattr__(name: str) -> Any:
    """Import Prefect, which takes a second or two, for those alone who decorate a flow."""
    if name == "with_manifest":
        from prefect_fleet.manifests.hooks import with_manifest

        return with_manifest
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
