"""Run manifests: one JSON file a flow run, a record that needs no database.

A flow writes them when `@with_manifest` stands above its `@flow`. What a host does with the files
afterwards, and how people read them, is `python -m prefect_fleet.manifests`.
"""

from prefect_fleet.manifests.hooks import with_manifest

__all__ = ["with_manifest"]
