"""Read a file that a flow is given by its address: a local path, or an object in S3.

Objects are read with the endpoint and the credentials of the block that keeps flow results
(`PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK`, on the fleet `s3-bucket/results`); the bucket is the
address's own. So a flow needs no secrets of its own to read what is in the same store.
"""

from pathlib import Path

from botocore.exceptions import BotoCoreError, ClientError
from prefect.blocks.core import Block
from prefect.settings import get_current_settings
from prefect_aws import S3Bucket

SETTING = "PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK"
_SCHEME = "s3://"
# What a store says where the keys are wrong or may not read; RustFS and AWS differ in the code.
_DENIED = {"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"}


class StoredFileError(RuntimeError):
    """A file that can't be read; the message names the address, why, and the fix."""


def read_stored_file(address: str, folder: Path) -> bytes:
    """Return what the file at `address` holds.

    Args:
        address: `s3://bucket/key`, or a local path.
        folder: what a relative local path is relative to.

    Raises:
        StoredFileError: there is no such file, bucket, key or block, access is denied, the store
            doesn't answer, or the address is of another kind.
    """
    if address.startswith(_SCHEME):
        return _read_object(address)
    if "://" in address:
        raise StoredFileError(f"{address}: write a local path, or s3://bucket/key")
    path = folder / address
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoredFileError(f"{path}: can't be read: {error.strerror}") from error


def _read_object(address: str) -> bytes:
    bucket, _, key = address.removeprefix(_SCHEME).partition("/")
    if not bucket or not key:
        raise StoredFileError(f"{address}: write s3://bucket/key")
    block = _load_block(address)
    try:
        answer = block.credentials.get_client("s3").get_object(Bucket=bucket, Key=key)
        return answer["Body"].read()
    except ClientError as error:
        reason = _explain(error.response.get("Error", {}).get("Code", ""), bucket, key)
        # Not the store's own words: they may quote the access key.
        raise StoredFileError(f"{address}: can't be read: {reason}") from None
    except BotoCoreError as error:
        raise StoredFileError(f"{address}: can't be read: {error}") from error


def _load_block(address: str) -> S3Bucket:
    slug = get_current_settings().results.default_storage_block
    if slug is None:
        raise StoredFileError(
            f"{address}: {SETTING} is not set; set it to the block of the store with this bucket, "
            "for example s3-bucket/results"
        )
    try:
        block = Block.load(slug)
    except ValueError:
        raise StoredFileError(
            f"{address}: there is no block {slug} ({SETTING}); "
            "make deploy creates s3-bucket/results"
        ) from None
    if not isinstance(block, S3Bucket):
        raise StoredFileError(
            f"{address}: the block {slug} ({SETTING}) is no S3 bucket; "
            "write for example s3-bucket/results"
        )
    return block


def _explain(code: str, bucket: str, key: str) -> str:
    if code == "NoSuchBucket":
        return f"there is no bucket {bucket}"
    if code == "NoSuchKey":
        return f"there is no {key} in bucket {bucket}"
    if code in _DENIED:
        return f"access is denied ({code}); the block's credentials need to read bucket {bucket}"
    return f"the store answered {code}"
