"""The block for flow results."""

from pathlib import Path

import pytest
import yaml
from prefect_aws import AwsCredentials, S3Bucket

from prefect_fleet.results import main

SETTINGS = {
    "name": "results",
    "bucket": "prefect-results",
    "endpoint_url": "https://s3.example.org:9000",
    "access_key": "worker",
    "secret_key": "s3cret-key",
    "region": "us-east-1",
}


@pytest.fixture
def write(tmp_path: Path):
    def write(settings: object, mode: int = 0o600) -> str:
        path = tmp_path / "results.yaml"
        path.write_text(yaml.safe_dump(settings))
        path.chmod(mode)
        return str(path)

    return write


def test_the_block_is_made_changed_and_left_alone(prefect_api: str, write, last_json, tmp_path):
    authority = tmp_path / "ca.pem"
    authority.write_text("")
    with_authority = SETTINGS | {"ca_file": str(authority)}
    assert main([write(with_authority)]) == 0
    assert last_json() == {"block": "s3-bucket/results", "status": "new"}
    assert main([write(with_authority)]) == 0
    assert last_json()["status"] == "unchanged"

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

    # What the file no longer says must leave the block too.
    assert main([write(SETTINGS)]) == 0
    assert last_json()["status"] == "changed"
    parameters = S3Bucket.load("results").credentials.aws_client_parameters
    assert parameters.verify_cert_path is None

    assert main([write(SETTINGS | {"secret_key": "another"})]) == 0
    assert last_json()["status"] == "changed"
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
def test_a_setting_of_no_use_is_named_without_secrets(write, capsys, change: dict, said: str):
    assert main([write(SETTINGS | change)]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "s3cret-key" not in error


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o666])
def test_a_file_open_to_everyone_is_refused(write, capsys, mode: int):
    assert main([write(SETTINGS, mode)]) == 1
    assert "chmod 600" in capsys.readouterr().err


def test_broken_yaml_is_not_quoted(tmp_path: Path, capsys):
    path = tmp_path / "results.yaml"
    path.write_text("secret_key: *s3cret-key\nname: results\n")
    path.chmod(0o600)
    assert main([str(path)]) == 1
    error = capsys.readouterr().err
    assert "is not YAML" in error
    assert "s3cret-key" not in error
