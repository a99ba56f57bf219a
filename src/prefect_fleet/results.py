"""The block that keeps flow results, a `prefect_aws.S3Bucket`.

Its settings have the keys name, bucket, endpoint_url, access_key, secret_key, region and, where
the store's certificate comes from the fleet's own authority, ca_file. Workers use it when
`PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK=s3-bucket/<name>`.
"""

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prefect_aws import AwsClientParameters, AwsCredentials, S3Bucket
from pydantic import SecretStr

from prefect_fleet.inputs import InputError, require_mapping

KEYS = dict.fromkeys(("name", "bucket", "endpoint_url", "access_key", "secret_key", "region"), str)


def build_block(settings: Any) -> tuple[str, S3Bucket]:
    """Return the block's name and the block that `settings` describe.

    Raises:
        InputError: a key is missing, unknown or of no use.
    """
    require_mapping(settings, required=KEYS, optional={"ca_file": str})
    endpoint = urlsplit(settings["endpoint_url"])
    if endpoint.scheme not in {"http", "https"} or not endpoint.hostname:
        raise InputError(
            "endpoint_url is no address; write for example https://s3.example.org:9000"
        )
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", settings["name"]):
        raise InputError("name may have lower-case letters, digits and dashes only")
    ca_file = settings.get("ca_file") or None
    if ca_file and not Path(ca_file).is_file():
        # The path is part of the block, and every worker that loads the block opens it.
        raise InputError("ca_file is no file here; it must have this path on every worker, too")
    credentials = AwsCredentials(
        aws_access_key_id=settings["access_key"],
        aws_secret_access_key=SecretStr(settings["secret_key"]),
        region_name=settings["region"],
        aws_client_parameters=AwsClientParameters(
            endpoint_url=settings["endpoint_url"],
            # prefect-aws 0.7.12 drops a stored verify_cert_path on loading unless verify is true.
            verify=True,
            verify_cert_path=ca_file,
            # Buckets as host names would need a DNS name and a certificate for each.
            config={"s3": {"addressing_style": "path"}, "signature_version": "s3v4"},
        ),
    )
    return settings["name"], S3Bucket(bucket_name=settings["bucket"], credentials=credentials)
