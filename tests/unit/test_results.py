"""The block for flow results."""

import asyncio
from pathlib import Path

import pytest
from prefect_aws import AwsCredentials, S3Bucket

from prefect_fleet.api import ensure_block
from prefect_fleet.inputs import InputError
from prefect_fleet.results import build_block

SETTINGS = {
    "name": "results",
    "bucket": "prefect-results",
    "endpoint_url": "https://s3.example.org:9000",
    "access_key": "worker",
    "secret_key": "s3cret-key",
    "region": "us-east-1",
}


async def store(settings: object) -> str:
    name, block = build_block(settings)
    return await ensure_block(block, name)


def test_the_block_is_made_changed_and_left_alone(prefect_api: str, tmp_path: Path):
    authority = tmp_path / "ca.pem"
    authority.write_text("")
    with_authority = SETTINGS | {"ca_file": str(authority)}
    assert asyncio.run(store(with_authority)) == "new"
    assert asyncio.run(store(with_authority)) == "unchanged"

    bucket = S3Bucket.load("results")
    assert bucket.bucket_name == "prefect-results"
    assert isinstance(bucket.credentials, AwsCredentials)
    assert bucket.credentials.aws_secret_access_key.get_secret_value() == "s3cret-key"
    parameters = bucket.credentials.aws_client_parameters
    assert parameters.verify_cert_path == authority
    client = bucket.credentials.get_s3_client()
    assert client.meta.endpoint_url == "https://s3.example.org:9000"
    assert client.meta.config.s3["addressing_style"] == "path"
    assert client.meta.config.signature_version == "s3v4"

    # What the settings no longer say must leave the block too.
    assert asyncio.run(store(SETTINGS)) == "changed"
    parameters = S3Bucket.load("results").credentials.aws_client_parameters
    assert parameters.verify_cert_path is None

    assert asyncio.run(store(SETTINGS | {"secret_key": "another"})) == "changed"
    stored = S3Bucket.load("results").credentials.aws_secret_access_key
    assert stored.get_secret_value() == "another"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"secret_key": ""}, "secret_key is missing"),
        ({"bucket": None}, "bucket is missing"),
        ({"region": 1}, "region is a int, not a str"),
        ({"verify": False}, "verify is not known"),
        ({"endpoint_url": "s3.example.org"}, "endpoint_url is no address"),
        ({"name": "My Results"}, "name may have lower-case letters"),
        ({"ca_file": "/nowhere/ca.pem"}, "ca_file is no file here"),
    ],
)
def test_a_setting_of_no_use_is_named_without_secrets(change: dict, said: str):
    with pytest.raises(InputError) as raised:
        build_block(SETTINGS | change)
    assert said in str(raised.value)
    assert "s3cret-key" not in str(raised.value)
