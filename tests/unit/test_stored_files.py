"""Reading files by their address, objects from a real RustFS."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prefect.blocks.system import Secret
from prefect.settings import PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK, temporary_settings
from prefect_aws import S3Bucket

from prefect_examples.stored_files import StoredFileError, read_stored_file
from prefect_fleet.results import build_block
from tests.unit.shared import ObjectStore

CONTENT = b"date,group,actual\n2026-01-01,\xc3\xa6,1\n"
KEY = "in a folder/results ?#%41+\u00e6.csv"


@pytest.fixture
def bucket(rustfs: ObjectStore) -> Iterator[str]:
    """A bucket other than the block's, with one file in it."""
    with contextlib.closing(rustfs.client()) as client:
        client.create_bucket(Bucket="measured")
        client.put_object(Bucket="measured", Key=KEY, Body=CONTENT)
        yield "measured"
        client.delete_object(Bucket="measured", Key=KEY)
        client.delete_bucket(Bucket="measured")


@pytest.fixture
def use_store(rustfs: ObjectStore, prefect_api: str) -> Iterator[Callable[..., None]]:
    """Return a function that stores the results' block, as the fleet does, for RustFS."""
    with temporary_settings({PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK: "s3-bucket/stored-files"}):

        def store(**changed: str) -> None:
            settings = {
                "name": "stored-files",
                "bucket": "prefect-results",
                "endpoint_url": rustfs.endpoint_url,
                "access_key": rustfs.access_key,
                "secret_key": rustfs.secret_key,
                "region": "us-east-1",
            }
            name, block = build_block(settings | changed)
            block.save(name, overwrite=True)

        yield store
        S3Bucket.delete("stored-files")


def test_a_local_path_is_relative_to_the_folder(tmp_path: Path):
    (tmp_path / "here.csv").write_bytes(CONTENT)
    assert read_stored_file("here.csv", tmp_path) == CONTENT
    assert read_stored_file(str(tmp_path / "here.csv"), Path("/nowhere")) == CONTENT


def test_a_local_file_that_can_not_be_read_is_named_in_full(tmp_path: Path):
    with pytest.raises(StoredFileError, match=r"none\.csv: can't be read: No such file") as raised:
        read_stored_file("none.csv", tmp_path)
    assert str(raised.value).startswith(str(tmp_path))
    with pytest.raises(StoredFileError, match="can't be read: Is a directory"):
        read_stored_file("", tmp_path)


@pytest.mark.parametrize("address", ["https://x/y", "file:///x", "S3://bucket/key"])
def test_an_address_of_another_kind_is_named(address: str, tmp_path: Path):
    with pytest.raises(StoredFileError, match=rf"^{address}: write a local path, or s3://bucket"):
        read_stored_file(address, tmp_path)


@pytest.mark.parametrize("address", ["s3://", "s3://bucket", "s3://bucket/", "s3:///key"])
def test_an_incomplete_s3_address_is_named(address: str, tmp_path: Path):
    with pytest.raises(StoredFileError, match=rf"^{address}: write s3://bucket/key$"):
        read_stored_file(address, tmp_path)


def test_an_object_without_the_setting_names_the_setting(tmp_path: Path):
    with pytest.raises(StoredFileError, match="DEFAULT_STORAGE_BLOCK is not set; set it to"):
        read_stored_file("s3://bucket/key", tmp_path)


@pytest.mark.usefixtures("prefect_api")
def test_an_object_without_the_block_names_the_block(tmp_path: Path):
    with (
        temporary_settings({PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK: "s3-bucket/none"}),
        pytest.raises(StoredFileError, match="there is no block s3-bucket/none"),
    ):
        read_stored_file("s3://bucket/key", tmp_path)


@pytest.mark.usefixtures("prefect_api")
def test_a_block_of_another_type_is_named(tmp_path: Path):
    Secret(value="hush").save("no-bucket")
    with (
        temporary_settings({PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK: "secret/no-bucket"}),
        pytest.raises(StoredFileError, match=r"the block secret/no-bucket .* is no S3 bucket"),
    ):
        read_stored_file("s3://bucket/key", tmp_path)


def test_an_object_of_any_bucket_is_read(
    use_store: Callable[..., None], bucket: str, tmp_path: Path
):
    use_store()
    assert read_stored_file(f"s3://{bucket}/{KEY}", tmp_path) == CONTENT


def test_a_missing_object_or_bucket_is_named(
    use_store: Callable[..., None], bucket: str, tmp_path: Path
):
    use_store()
    address = f"s3://{bucket}/none.csv"
    with pytest.raises(
        StoredFileError, match=r"there is no none\.csv in bucket measured"
    ) as raised:
        read_stored_file(address, tmp_path)
    assert str(raised.value).startswith(f"{address}: can't be read: ")
    with pytest.raises(StoredFileError, match="there is no bucket elsewhere"):
        read_stored_file("s3://elsewhere/none.csv", tmp_path)


@pytest.mark.parametrize("changed", [{"secret_key": "guess-guess"}, {"access_key": "stranger"}])
def test_denied_access_is_named_without_a_key(
    use_store: Callable[..., None], bucket: str, changed: dict[str, str], tmp_path: Path
):
    use_store(**changed)
    with pytest.raises(
        StoredFileError, match=r"access is denied .* to read bucket measured"
    ) as raised:
        read_stored_file(f"s3://{bucket}/{KEY}", tmp_path)
    for key in changed.values():
        assert key not in str(raised.value)
    assert raised.value.__cause__ is None


def test_a_store_that_does_not_answer_is_named(
    use_store: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    use_store(endpoint_url="http://127.0.0.1:1")
    with pytest.raises(StoredFileError, match=r"can't be read: .*http://127\.0\.0\.1:1/"):
        read_stored_file("s3://bucket/key", tmp_path)
