"""Keep a file under a key that stays the same: in an S3 bucket, or in a folder.

Readers see the previous file until the new one is there as a whole.
"""

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import BotoCoreError, ClientError
from prefect.filesystems import LocalFileSystem
from prefect.results import get_result_store
from prefect_aws import S3Bucket

# Parts one after the other: more at a time cost memory, and the files here are small.
_TRANSFER = TransferConfig(use_threads=False)


class ObjectStorageError(RuntimeError):
    """A file that can't be kept or read back; the message names it and the fix."""


@dataclass(frozen=True)
class KeptFile:
    """A file as it is kept: where, its size in bytes and its SHA-256 in hexadecimal digits."""

    url: str
    bucket: str | None
    key: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class BucketStorage:
    """The bucket of an `S3Bucket` block."""

    block: S3Bucket

    @property
    def title(self) -> str:
        """What to call it in a message."""
        return f"bucket {self.block.bucket_name}"

    def keep(self, path: Path, key: str) -> KeptFile:
        """Upload the file; S3 shows it when it is whole.

        Raises:
            ObjectStorageError: the bucket did not take it.
        """
        full_key, digest = self._full_key(key), _sha256(path)
        try:
            self.block.credentials.get_client("s3").upload_file(
                str(path),
                self.block.bucket_name,
                full_key,
                ExtraArgs={"Metadata": {"sha256": digest}},
                Config=_TRANSFER,
            )
        except (Boto3Error, BotoCoreError, ClientError) as error:
            raise self._explain("written", full_key, error) from None
        url = f"s3://{self.block.bucket_name}/{full_key}"
        return KeptFile(url, self.block.bucket_name, full_key, path.stat().st_size, digest)

    def fetch(self, key: str, path: Path) -> bool:
        """Download what is kept under `key` to `path`, and tell whether there was anything.

        Raises:
            ObjectStorageError: the bucket does not give it.
        """
        full_key = self._full_key(key)
        try:
            self.block.credentials.get_client("s3").download_file(
                self.block.bucket_name, full_key, str(path), Config=_TRANSFER
            )
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in {"404", "NoSuchKey"}:
                return False
            raise self._explain("read", full_key, error) from None
        except (Boto3Error, BotoCoreError) as error:
            raise self._explain("read", full_key, error) from None
        return True

    def _full_key(self, key: str) -> str:
        folder = self.block.bucket_folder.strip("/")
        return f"{folder}/{key}" if folder else key

    def _explain(self, done: str, key: str, error: Exception) -> ObjectStorageError:
        """Say what happened without the store's own words, which may quote the access key."""
        cause = error if isinstance(error, ClientError) else error.__context__
        if isinstance(cause, ClientError):
            code = cause.response.get("Error", {}).get("Code", "an error")
            reason = f"the store answered {code}; check the block's bucket and credentials"
        elif isinstance(error, BotoCoreError):
            reason = f"{error}"
        else:
            reason = type(error).__name__
        return ObjectStorageError(f"s3://{self.block.bucket_name}/{key} can't be {done}: {reason}")


@dataclass(frozen=True)
class FolderStorage:
    """A folder of this machine."""

    folder: Path

    @property
    def title(self) -> str:
        """What to call it in a message."""
        return f"folder {self.folder}"

    def keep(self, path: Path, key: str) -> KeptFile:
        """Copy the file next to where it goes, then put it in place of what was there.

        Raises:
            ObjectStorageError: the folder can't be written.
        """
        target = self.folder / key
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as part:
                try:
                    with path.open("rb") as source:
                        shutil.copyfileobj(source, part)
                    part.flush()
                    os.fsync(part.fileno())
                    Path(part.name).replace(target)
                except BaseException:
                    Path(part.name).unlink(missing_ok=True)
                    raise
        except OSError as error:
            raise ObjectStorageError(f"{target} can't be written: {error.strerror}") from error
        return KeptFile(target.as_uri(), None, key, target.stat().st_size, _sha256(target))

    def fetch(self, key: str, path: Path) -> bool:
        """Copy what is kept under `key` to `path`, and tell whether there was anything.

        Raises:
            ObjectStorageError: it can't be read.
        """
        source = self.folder / key
        try:
            shutil.copyfile(source, path)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise ObjectStorageError(f"{source} can't be read: {error.strerror}") from error
        return True


Storage = BucketStorage | FolderStorage


async def find_storage(block_name: str | None) -> Storage:
    """Return the bucket of an `S3Bucket` block, or where the current run keeps its results.

    Args:
        block_name: name of the block; None for the run's result storage, which is
            PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK unless the flow says otherwise, and a folder of
            this machine (PREFECT_LOCAL_STORAGE_PATH) where nothing is set.

    Raises:
        ValueError: no block of that name is stored.
        ObjectStorageError: results are kept in a block of another kind.
    """
    if block_name is not None:
        return BucketStorage(await S3Bucket.aload(block_name))
    block = get_result_store().result_storage
    if isinstance(block, S3Bucket):
        return BucketStorage(block)
    if isinstance(block, LocalFileSystem):
        return FolderStorage(Path(block.basepath or ".").expanduser().absolute())
    raise ObjectStorageError(
        f"results are kept in a {type(block).__name__}; name an S3Bucket block in `storage`"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
