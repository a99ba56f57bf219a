"""Plan and write block types and blocks, as `prefect block register` and `Block.save` do.

Prefect's own registration runs twice: for the plan with a client that knows what is registered
and keeps what would be written, and for those that differ with one that writes it.
"""

import importlib
import inspect
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType

import httpx
from prefect.blocks.core import Block, InvalidBlockRegistration
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import (
    BlockDocumentCreate,
    BlockDocumentUpdate,
    BlockSchemaCreate,
    BlockTypeCreate,
    BlockTypeUpdate,
)
from prefect.client.schemas.objects import BlockDocument, BlockSchema, BlockType
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from prefect_fleet.api import block_differences
from prefect_fleet.bare_api import PAGE
from prefect_fleet.inputs import InputError
from prefect_fleet.journal import Journal
from prefect_fleet.plan import Item
from prefect_fleet.server_state import read_pages
from prefect_fleet.stock import not_found


@dataclass
class BlockPlan:
    """What becomes of block types and blocks.

    Attributes:
        items: for the plan, the types first.
        classes: block classes to register, as at least one type of theirs differs.
        blocks: blocks to store, by type slug and name.
        types: the types of the server, by slug.
        schemas: the ids of its block schemas.
        documents: the blocks of the server that change, by type slug and name.
    """

    items: list[Item] = field(default_factory=list)
    classes: list[type[Block]] = field(default_factory=list)
    blocks: dict[tuple[str, str], Block] = field(default_factory=dict)
    types: dict[str, BlockType] = field(default_factory=dict)
    schemas: set[str] = field(default_factory=set)
    documents: dict[tuple[str, str], BlockDocument] = field(default_factory=dict)


def import_block_classes(modules: Iterable[str]) -> list[type[Block]]:
    """Return the block classes of modules, those that `prefect block register -m` registers.

    Raises:
        InputError: modules that can't be imported or have none, all of them.
    """
    found: dict[str, type[Block]] = {}
    faults: list[str] = []
    for name in modules:
        try:
            module: ModuleType = importlib.import_module(name)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            faults.append(f"{name} can't be imported ({reason})")
            continue
        classes = [cls for _, cls in inspect.getmembers(module) if Block.is_block_class(cls)]
        if not classes:
            faults.append(f"{name} has no block types")
        found |= {cls.get_block_type_slug(): cls for cls in classes}
    if faults:
        raise InputError("\n".join(faults))
    return list(found.values())


class _TypeRecorder:
    """The part of a client that registering uses; `items` and `writes` fill up.

    It knows what is registered, and keeps what would be.
    """

    def __init__(self, types: dict[str, BlockType]) -> None:
        self.types = types
        self.checksums: set[tuple[str, str | None]] = set()
        self.items: dict[str, Item] = {}
        self.writes = 0
        self._slugs: dict[uuid.UUID, str] = {}

    async def read_block_type_by_slug(self, slug: str) -> BlockType:
        self.items.setdefault(slug, Item("block type", slug, "unchanged"))
        if slug not in self.types:
            raise not_found(f"block type {slug}")
        self._slugs[self.types[slug].id] = slug
        return self.types[slug]

    async def read_block_schema_by_checksum(
        self, checksum: str, version: str | None = None
    ) -> BlockSchema:
        if (checksum, version) not in self.checksums:
            raise not_found(f"block schema {checksum}")
        return BlockSchema.model_construct(id=uuid.uuid4(), checksum=checksum)

    async def create_block_type(self, block_type: BlockTypeCreate) -> BlockType:
        self.writes += 1
        self.items[block_type.slug].status = "new"
        made = BlockType.model_validate(block_type.model_dump() | {"id": uuid.uuid4()})
        self.types[block_type.slug] = made
        self._slugs[made.id] = block_type.slug
        return made

    async def update_block_type(
        self, block_type_id: uuid.UUID, block_type: BlockTypeUpdate
    ) -> None:
        old = self.types[self._slugs[block_type_id]].model_dump()
        new = block_type.model_dump()
        keys = sorted(key for key in new if new[key] != old.get(key))
        self._change(block_type_id, ", ".join(keys))
        self.types[self._slugs[block_type_id]] = BlockType.model_validate(old | new)

    async def create_block_schema(self, block_schema: BlockSchemaCreate) -> BlockSchema:
        assert block_schema.block_type_id is not None, "registration knows the type"
        self._change(block_schema.block_type_id, f"schema of version {block_schema.version}")
        return BlockSchema.model_construct(id=uuid.uuid4())

    def _change(self, block_type_id: uuid.UUID, detail: str) -> None:
        self.writes += 1
        item = self.items[self._slugs[block_type_id]]
        if item.status != "new":
            item.status = "changed"
            item.details.append(f"other {detail}")


async def plan_blocks(
    client: PrefectClient,
    classes: Iterable[type[Block]],
    blocks: Mapping[tuple[str, str], Block],
) -> BlockPlan:
    """Return what becomes of block types and blocks.

    Args:
        client: reads the API.
        classes: block classes that are to be registered.
        blocks: blocks that are to be stored, by type slug and name.
    """
    plan = BlockPlan()
    wanted = {cls.get_block_type_slug(): cls for cls in classes}
    wanted |= {block.get_block_type_slug(): type(block) for block in blocks.values()}
    if not wanted:
        return plan
    for shown in await read_pages(client, "/block_types/filter"):
        plan.types[shown["slug"]] = BlockType.model_validate(shown)
    recorder = _TypeRecorder(dict(plan.types))
    for schema in await read_pages(client, "/block_schemas/filter"):
        plan.schemas.add(schema["id"])
        recorder.checksums.add((schema["checksum"], schema["version"]))
    for cls in wanted.values():
        writes = recorder.writes
        try:
            await cls.aregister_type_and_schema(client=recorder)  # type: ignore[arg-type]
        except InvalidBlockRegistration:
            continue
        if recorder.writes > writes:
            plan.classes.append(cls)
    plan.items += recorder.items.values()
    stored: dict[str, dict[str, BlockDocument]] = {}
    for (slug, name), block in blocks.items():
        if slug not in stored:
            there = await _read_documents(client, slug) if slug in plan.types else []
            stored[slug] = {one.name: one for one in there if one.name}
        item = Item("block", f"{slug}/{name}", "unchanged")
        document = stored[slug].get(name)
        if document is None:
            item.status = "new"
        elif keys := block_differences(block, document.data):
            item.status = "changed"
            item.details.append(f"other {', '.join(keys)}")
            plan.documents[slug, name] = document
        if item.changes:
            plan.blocks[slug, name] = block
        plan.items.append(item)
    return plan


async def _read_documents(client: PrefectClient, slug: str) -> list[BlockDocument]:
    found: list[BlockDocument] = []
    while True:
        page = await client.read_block_documents_by_type(slug, offset=len(found), limit=PAGE)
        found += page
        if len(page) < PAGE:
            return found


class BlockWriter(PrefectClient):
    """A client whose writes of block types and blocks go through a journal."""

    journal: Journal
    plan: BlockPlan

    async def create_block_type(self, block_type: BlockTypeCreate) -> BlockType:
        async def delete() -> None:
            try:
                found = await self.read_block_type_by_slug(block_type.slug)
            except ObjectNotFound:
                return
            await self.delete_block_type(found.id)

        create = super().create_block_type
        what = f"block type {block_type.slug}"
        return await self.journal.write(what, lambda: create(block_type), delete)

    async def update_block_type(
        self, block_type_id: uuid.UUID, block_type: BlockTypeUpdate
    ) -> None:
        update = super().update_block_type
        (old,) = (one for one in self.plan.types.values() if one.id == block_type_id)
        before = BlockTypeUpdate(**old.model_dump(include=BlockTypeUpdate.updatable_fields()))
        await self.journal.write(
            f"block type {old.slug}",
            lambda: update(block_type_id, block_type),
            lambda: update(block_type_id, before),
        )

    async def create_block_schema(self, block_schema: BlockSchemaCreate) -> BlockSchema:
        of_type = {"block_type_id": {"any_": [str(block_schema.block_type_id)]}}

        async def delete() -> None:
            for shown in await read_pages(self, "/block_schemas/filter", block_schemas=of_type):
                if shown["id"] not in self.plan.schemas:
                    await self.request(
                        "DELETE",
                        "/block_schemas/{id}",
                        path_params={"id": shown["id"]},
                    )

        create = super().create_block_schema
        what = f"block schema {block_schema.fields.get('title')}"
        return await self.journal.write(what, lambda: create(block_schema), delete)

    async def create_block_document(
        self, block_document: BlockDocumentCreate, include_secrets: bool = True
    ) -> BlockDocument:
        (slug,) = (
            slug
            for (slug, name), block in self.plan.blocks.items()
            if name == block_document.name and block._block_type_id == block_document.block_type_id
        )
        if (slug, block_document.name) in self.plan.documents:
            # Prefect tries to create it, and updates what is there already.
            request = httpx.Request("POST", "http://planned")
            response = httpx.Response(409, request=request)
            reason = httpx.HTTPStatusError("exists", request=request, response=response)
            raise ObjectAlreadyExists(reason)

        async def delete() -> None:
            for one in await _read_documents(self, slug):
                if one.name == block_document.name:
                    await self.delete_block_document(one.id)

        create = super().create_block_document
        return await self.journal.write(
            f"block {slug}/{block_document.name}",
            lambda: create(block_document, include_secrets),
            delete,
        )

    async def update_block_document(
        self, block_document_id: uuid.UUID, block_document: BlockDocumentUpdate
    ) -> None:
        update = super().update_block_document
        ((slug, name), old) = next(
            pair for pair in self.plan.documents.items() if pair[1].id == block_document_id
        )
        before = BlockDocumentUpdate(
            block_schema_id=old.block_schema_id, data=old.data, merge_existing_data=False
        )
        await self.journal.write(
            f"block {slug}/{name}",
            lambda: update(block_document_id, block_document),
            lambda: update(block_document_id, before),
        )


async def write_blocks(client: BlockWriter, journal: Journal, plan: BlockPlan) -> None:
    """Register and store what differs.

    Args:
        client: stays open until nothing can have to be put back any more.
        journal: keeps the way back.
        plan: what differs.
    """
    client.journal, client.plan = journal, plan
    for cls in plan.classes:
        await cls.aregister_type_and_schema(client=client)
    for (_, name), block in plan.blocks.items():
        await block.asave(name, overwrite=True, client=client)
