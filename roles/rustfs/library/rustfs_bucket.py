#!/usr/bin/python
"""A RustFS bucket and the one user that may use it.

RustFS has no Ansible collection on the registries; its admin API is plain JSON over requests that
are signed like S3's (Source: RustFS 1.0.1, admin API v3).
"""

from __future__ import annotations

import json
import uuid
from urllib.parse import quote

from ansible.module_utils.basic import AnsibleModule

try:
    import boto3
    from botocore.auth import SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.config import Config
    from botocore.credentials import Credentials
    from botocore.exceptions import BotoCoreError, ClientError, EndpointConnectionError
    from botocore.httpsession import URLLib3Session
except ImportError:
    boto3 = None

DOCUMENTATION = r"""
module: rustfs_bucket
short_description: Create a bucket of RustFS with a user that can reach nothing else
description:
  - Reads what there is, compares, and changes only what differs.
  - A user whose secret key no longer works gets the given one.
options:
  endpoint_url: {description: Where RustFS listens., type: str, required: true}
  ca_file:
    description:
      - Certificate of the authority that RustFS's certificate is verified by; without it, by those
        that everybody knows.
    type: path
    default: ""
  region: {description: Region that requests are signed for., type: str, default: us-east-1}
  root_access_key: {description: RustFS's root access key., type: str, required: true}
  root_secret_key: {description: RustFS's root secret key., type: str, required: true}
  name: {description: The bucket., type: str, required: true}
  access_key: {description: Access key of the bucket's user., type: str, required: true}
  secret_key: {description: Secret key of the bucket's user., type: str, required: true}
  previous_access_key:
    description:
      - A user of the bucket before this one, who may go on. Every other user with the bucket's
        policy is removed.
    type: str
    default: ""
author: [prefect-fleet]
"""

RETURN = r"""
changes:
  description: What was done, in words.
  returned: always
  type: list
  elements: str
"""

_TIMEOUT = 30  # seconds, for connecting and for reading


def policy_for(bucket: str) -> dict[str, object]:
    """The policy that lets its holder use one bucket, and no other and nothing else."""
    return {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Action": ["s3:ListBucket", "s3:GetBucketLocation"],
                "Resource": [f"arn:aws:s3:::{bucket}"],
            },
            {
                "Effect": "Allow",
                "Action": [
                    "s3:GetObject",
                    "s3:PutObject",
                    "s3:DeleteObject",
                    "s3:AbortMultipartUpload",
                    "s3:ListMultipartUploadParts",
                ],
                "Resource": [f"arn:aws:s3:::{bucket}/*"],
            },
        ],
    }


def same_policy(one: object, other: object) -> bool:
    """Whether two policies say the same; the order in lists means nothing."""

    def normal(value: object) -> object:
        if isinstance(value, dict):
            return {key: normal(item) for key, item in value.items() if item not in ("", {}, [])}
        if isinstance(value, list):
            items = [normal(item) for item in value]
            return sorted(items, key=lambda item: json.dumps(item, sort_keys=True))
        return value

    return normal(one) == normal(other)


class Admin:
    """RustFS's admin API, as its root user."""

    def __init__(
        self, endpoint_url: str, region: str, access_key: str, secret_key: str, verify: str | bool
    ) -> None:
        self._endpoint_url = endpoint_url.rstrip("/")
        self._auth = SigV4Auth(Credentials(access_key, secret_key), "s3", region)
        self._session = URLLib3Session(verify=verify, timeout=_TIMEOUT)

    def call(self, method: str, path: str, body: object = None) -> tuple[int, str]:
        """Send one signed request; gives back its status and text."""
        data = json.dumps(body).encode() if body is not None else b""
        url = f"{self._endpoint_url}/rustfs/admin/v3/{path}"
        request = AWSRequest(method=method, url=url, data=data)
        request.headers["X-Amz-Content-SHA256"] = "UNSIGNED-PAYLOAD"
        request.context["payload_signing_enabled"] = False
        self._auth.add_auth(request)
        response = self._session.send(request.prepare())
        return response.status_code, response.text

    def change(self, method: str, path: str, body: object = None) -> None:
        """Send a request that must succeed, else RuntimeError with what RustFS said."""
        status, text = self.call(method, path, body)
        if status >= 300:
            raise RuntimeError(f"RustFS answered {status} to {method} {path.split('?')[0]}: {text}")

    def read(self, path: str) -> dict[str, object]:
        """The JSON object at a path, empty where RustFS has no such thing."""
        status, text = self.call("GET", path)
        if status == 404 or (status >= 300 and "not exist" in text):
            return {}
        if status >= 300:
            raise RuntimeError(f"RustFS answered {status} to GET {path.split('?')[0]}: {text}")
        return json.loads(text)


def s3_client(endpoint_url: str, region: str, access_key: str, secret_key: str, verify: str | bool):
    """An S3 client for RustFS: path addressing, one try more at the most."""
    config = Config(
        s3={"addressing_style": "path"},
        connect_timeout=_TIMEOUT,
        read_timeout=_TIMEOUT,
        retries={"max_attempts": 2},
    )
    return boto3.client(
        "s3",
        endpoint_url=endpoint_url,
        region_name=region,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        verify=verify,
        config=config,
    )


def works(client, bucket: str) -> bool:
    """Whether the client's user can really write, read and delete in the bucket."""
    key = f".fleet-check/{uuid.uuid4()}"
    try:
        client.put_object(Bucket=bucket, Key=key, Body=b"check")
        same = client.get_object(Bucket=bucket, Key=key)["Body"].read() == b"check"
        client.delete_object(Bucket=bucket, Key=key)
    except ClientError:
        return False
    return same


def wanted_changes(admin: Admin, root, user, params: dict[str, str]) -> list[tuple[str, object]]:
    """Pairs of a sentence and a function that does it, for what is not as it should be."""
    bucket, access_key = params["name"], quote(params["access_key"], safe="")
    policy, policy_name = policy_for(bucket), quote(f"bucket-{bucket}", safe="")
    changes: list[tuple[str, object]] = []
    if bucket not in {entry["Name"] for entry in root.list_buckets()["Buckets"]}:
        changes.append((f"create bucket {bucket}", lambda: root.create_bucket(Bucket=bucket)))
    found = admin.read(f"info-canned-policy?name={policy_name}").get("policy", {})
    found = json.loads(found) if isinstance(found, str) else found
    if not same_policy(found, policy):
        path = f"add-canned-policy?name={policy_name}"
        changes.append((f"write policy of {bucket}", lambda: admin.change("PUT", path, policy)))
    account = admin.read(f"user-info?accessKey={access_key}")
    body = {"secretKey": params["secret_key"], "status": "enabled"}
    path_user = f"add-user?accessKey={access_key}"
    write_user = (f"write user of {bucket}", lambda: admin.change("PUT", path_user, body))
    if account.get("status") != "enabled":
        changes.append(write_user)
    if account.get("policyName") != f"bucket-{bucket}":
        body_attach = {"policies": [f"bucket-{bucket}"], "user": params["access_key"]}
        changes.append(
            (
                f"let that user use {bucket}",
                lambda: admin.change("POST", "idp/builtin/policy/attach", body_attach),
            )
        )
    users = admin.read("list-users")
    for other in sorted(users.keys() - {params["access_key"], params["previous_access_key"]}):
        if f"bucket-{bucket}" in str(users[other].get("policyName", "")).split(","):
            path_other = f"remove-user?accessKey={quote(other, safe='')}"
            changes.append(
                (
                    f"remove another user of {bucket}",
                    lambda path=path_other: admin.change("DELETE", path),
                )
            )
    # Where all of that is right, only the secret key can keep the user out.
    if not changes and not works(user, bucket):
        changes.append(write_user)
    return changes


def ensure(admin: Admin, root, user, params: dict[str, str], check_mode: bool) -> list[str]:
    """Make everything as it should be; gives back what was done, or would be, in words.

    Raises:
        RuntimeError: RustFS refused something, or the user cannot use the bucket afterwards.
    """
    done: list[str] = []
    # A wrong secret key shows only once the rest is right, hence the second round.
    for _ in range(2):
        changes = wanted_changes(admin, root, user, params)
        done += [sentence for sentence, _ in changes]
        if check_mode or not changes:
            return done
        for _, change in changes:
            change()
        if works(user, params["name"]):
            return done
    raise RuntimeError(f"the user of bucket {params['name']} cannot use it")


def main() -> None:
    """Run as an Ansible module."""
    keys = ("root_access_key", "root_secret_key", "access_key", "secret_key")
    module = AnsibleModule(
        argument_spec={
            "endpoint_url": {"type": "str", "required": True},
            "ca_file": {"type": "path", "default": ""},
            "region": {"type": "str", "default": "us-east-1"},
            "previous_access_key": {"type": "str", "default": "", "no_log": True},
            "name": {"type": "str", "required": True},
            **{key: {"type": "str", "required": True, "no_log": True} for key in keys},
        },
        supports_check_mode=True,
    )
    # A dry run on a new host, where RustFS was not started and its packages are missing.
    not_yet = {"changed": True, "changes": ["RustFS would be there first, then all of this"]}
    if boto3 is None:
        if module.check_mode:
            module.exit_json(**not_yet)
        module.fail_json(msg="This host lacks boto3: install Debian's package python3-boto3.")
    params = module.params
    endpoint, region = params["endpoint_url"], params["region"]
    verify = params["ca_file"] or True
    try:
        admin = Admin(
            endpoint, region, params["root_access_key"], params["root_secret_key"], verify
        )
        root = s3_client(
            endpoint, region, params["root_access_key"], params["root_secret_key"], verify
        )
        user = s3_client(endpoint, region, params["access_key"], params["secret_key"], verify)
        changes = ensure(admin, root, user, params, module.check_mode)
    except (RuntimeError, BotoCoreError, ClientError) as error:
        if module.check_mode and isinstance(error, EndpointConnectionError):
            module.exit_json(**not_yet)
        module.fail_json(msg=f"RustFS at {endpoint}: {error}")
    module.exit_json(changed=bool(changes), changes=changes)


if __name__ == "__main__":
    main()
