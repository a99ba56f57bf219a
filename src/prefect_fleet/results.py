"""Store the block that keeps flow results: `python -m prefect_fleet.results FILE`.

FILE is YAML or JSON with mode 0600 and the keys name, bucket, endpoint_url, access_key,
secret_key, region and, where the store's certificate comes from the fleet's own authority,
ca_file. The block is a `prefect_aws.S3Bucket`; workers use it when
`PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK=s3-bucket/<name>`.
The last line of stdout is `{"block": "s3-bucket/<name>", "status": "new|changed|unchanged"}`.
Exit status: 0 done, 1 nothing was done (the reason on stderr), 2 wrong usage.
"""

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prefect_aws import AwsClientParameters, AwsCredentials, S3Bucket
from pydantic import SecretStr

from prefect_fleet.api import ApiError, api_errors, ensure_block
from prefect_fleet.inputs import InputError, file_argument, read_file, require_mapping

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


def main(arguments: list[str] | None = None) -> int:
    """Run the program; see the module's text."""
    path = file_argument(
        "python -m prefect_fleet.results", __doc__, "YAML or JSON file with mode 0600", arguments
    )
    try:
        settings = read_file(path, secret=True)
        try:
            name, block = build_block(settings)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        with api_errors():
            status = asyncio.run(ensure_block(block, name))
    except (InputError, ApiError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps({"block": f"{S3Bucket.get_block_type_slug()}/{name}", "status": status}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
