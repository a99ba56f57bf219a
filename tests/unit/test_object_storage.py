"""Keeping a file under a key: in buckets of a stand-in and of a real RustFS, and in a folder."""

import contextlib
import hashlib
import shutil
import socket
from pathlib import Path
from typing import IO

import pytest
from prefect_aws import S3Bucket

from prefect_examples.object_storage import (
    BucketStorage,
    FolderStorage,
    ObjectStorageError,
    Storage,
)
from prefect_fleet.results import build_block
from tests.unit.shared import ObjectStore

KEY = "dhis2/play/units.parquet"


def bucket_storage(store: ObjectStore, **changed: str) -> BucketStorage:
    """The storage with the block that the fleet would make."""
    settings = {
        "name": "results",
        "bucket": "results",
        "endpoint_url": store.endpoint_url,
        "access_key": store.access_key,
        "secret_key": store.secret_key,
        "region": "us-east-1",
    }
    return BucketStorage(build_block(settings | changed)[1])


def check_round_trip(storage: Storage, folder: Path, size: int) -> None:
    new, back = folder / "new", folder / "back"
    new.write_bytes(b"0123456789" * (size // 10))
    kept = storage.keep(new, KEY)
    assert (kept.key, kept.bytes) == (KEY, size)
    assert kept.sha256 == hashlib.sha256(new.read_bytes()).hexdigest()
    assert kept.url.endswith(f"/{KEY}")
    assert storage.fetch(KEY, back)
    assert back.read_bytes() == new.read_bytes()


@pytest.mark.parametrize("size", [0, 1000, 20_000_000])
def test_a_bucket_gives_back_what_it_keeps(object_store: ObjectStore, tmp_path: Path, size: int):
    storage = bucket_storage(object_store)
    assert not storage.fetch(KEY, tmp_path / "none")
    check_round_trip(storage, tmp_path, size)
    with contextlib.closing(object_store.client()) as client:
        head = client.head_object(Bucket="results", Key=KEY)
    digest = hashlib.sha256((tmp_path / "new").read_bytes()).hexdigest()
    assert (head["ContentLength"], head["Metadata"]) == (size, {"sha256": digest})


def test_a_folder_gives_back_what_it_keeps(tmp_path: Path):
    storage = FolderStorage(tmp_path / "kept")
    assert not storage.fetch(KEY, tmp_path / "none")
    check_round_trip(storage, tmp_path, 1000)
    check_round_trip(storage, tmp_path, 10)
    assert [path.name for path in (tmp_path / "kept").rglob("*.*")] == ["units.parquet"]


def test_the_folder_of_a_block_stands_before_the_key(s3_standin: ObjectStore, tmp_path: Path):
    block: S3Bucket = bucket_storage(s3_standin).block
    with contextlib.closing(s3_standin.client()) as client:
        client.create_bucket(Bucket="results")
    storage = BucketStorage(block.model_copy(update={"bucket_folder": "team/data/"}))
    (tmp_path / "new").write_text("x")
    kept = storage.keep(tmp_path / "new", KEY)
    assert (kept.bucket, kept.key) == ("results", f"team/data/{KEY}")
    assert kept.url == f"s3://results/team/data/{KEY}"
    assert storage.fetch(KEY, tmp_path / "back")


def test_a_bucket_that_is_not_there_is_named(object_store: ObjectStore, tmp_path: Path):
    (tmp_path / "new").write_text("x")
    absent = bucket_storage(object_store, bucket="elsewhere")
    with pytest.raises(
        ObjectStorageError, match=f"s3://elsewhere/{KEY} can't be written: .*NoSuchB"
    ):
        absent.keep(tmp_path / "new", KEY)


def test_a_store_that_refuses_the_keys_is_said_without_them(rustfs: ObjectStore, tmp_path: Path):
    (tmp_path / "new").write_text("x")
    denied = bucket_storage(rustfs, access_key="s3cret-access", secret_key="s3cret-secret")
    with pytest.raises(ObjectStorageError, match=r"the store answered (403|Inv|Access)") as written:
        denied.keep(tmp_path / "new", KEY)
    with pytest.raises(ObjectStorageError, match=r"the store answered (403|Inv|Access)") as read:
        denied.fetch(KEY, tmp_path / "back")
    for raised in (written.value, read.value):
        assert "s3cret" not in f"{raised!r} {raised.__cause__!r}"


def test_a_bucket_that_is_away_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    (tmp_path / "new").write_text("x")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        storage = bucket_storage(ObjectStore(address, "key", "secret"))
        with pytest.raises(ObjectStorageError, match=f"can't be written: .*{address}"):
            storage.keep(tmp_path / "new", KEY)
        with pytest.raises(ObjectStorageError, match=f"can't be read: .*{address}"):
            storage.fetch(KEY, tmp_path / "back")


def test_a_copy_that_breaks_off_leaves_the_file_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    storage = FolderStorage(tmp_path / "kept")
    (tmp_path / "new").write_text("before")
    storage.keep(tmp_path / "new", KEY)

    def fill_the_disk(source: IO[bytes], target: IO[bytes]) -> None:
        target.write(b"ha")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", fill_the_disk)
    with pytest.raises(ObjectStorageError, match="can't be written: No space left on device"):
        storage.keep(tmp_path / "new", KEY)
    (kept,) = (tmp_path / "kept").rglob("*.*")
    assert kept.read_text() == "before"
    assert len(list(kept.parent.iterdir())) == 1
