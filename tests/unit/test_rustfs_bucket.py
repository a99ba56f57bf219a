"""The module for a bucket and its user, against a RustFS that is a few dictionaries."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from ansible.module_utils.testing import patch_module_args
from botocore.exceptions import ClientError, EndpointConnectionError, SSLError

from tests.unit.certificates import Authority, serving
from tests.unit.shared import load_by_path

rustfs_bucket = load_by_path("roles/rustfs/library/rustfs_bucket.py")

PARAMS = {
    "endpoint_url": "http://192.0.2.1:9000",
    "region": "us-east-1",
    "root_access_key": "root-access-key",
    "root_secret_key": "root-secret-key",
    "name": "results",
    "access_key": "reader+writer/1",
    "secret_key": "kW8vB2nQ7xT4mZ1pR9cL",
    "previous_access_key": "",
}
POLICY = "bucket-results"
CREATE = "create bucket results"
WRITE_POLICY = "write policy of results"
WRITE_USER = "write user of results"
ATTACH = "let that user use results"


class Rustfs:
    """What a RustFS knows."""

    def __init__(self) -> None:
        self.buckets: dict[str, dict[str, bytes]] = {}
        self.policies: dict[str, dict[str, Any]] = {}
        self.users: dict[str, dict[str, str]] = {}
        self.changed: list[str] = []

    def may_use(self, access_key: str, secret_key: str, bucket: str) -> bool:
        user = self.users.get(access_key, {})
        return (
            bucket in self.buckets
            and user.get("secretKey") == secret_key
            and user.get("status") == "enabled"
            and rustfs_bucket.same_policy(
                self.policies.get(user.get("policyName", "")), rustfs_bucket.policy_for(bucket)
            )
        )

    def admin(self, method: str, path: str, body: Any) -> tuple[int, str]:
        """Answer a request of the admin API as RustFS 1.0.1 does."""
        parts = urlsplit(path)
        query = {key: value for key, (value,) in parse_qs(parts.query).items()}
        if method != "GET":
            self.changed.append(parts.path)
        match method, parts.path:
            case "GET", "info-canned-policy":
                if query["name"] not in self.policies:
                    return 400, "<Message>policy does not exist</Message>"
                shown = json.dumps({"ID": ""} | self.policies[query["name"]])
                return 200, json.dumps({"policy_name": query["name"], "policy": shown})
            case "PUT", "add-canned-policy":
                self.policies[query["name"]] = body
            case "GET", "user-info":
                if query["accessKey"] not in self.users:
                    return 404, ""
                user = self.users[query["accessKey"]]
                return 200, json.dumps({"status": user["status"], "policyName": user["policyName"]})
            case "GET", "list-users":
                return 200, json.dumps(self.users)
            case "DELETE", "remove-user":
                del self.users[query["accessKey"]]
            case "PUT", "add-user":
                before = self.users.get(query["accessKey"], {"policyName": ""})
                self.users[query["accessKey"]] = before | body
            case "POST", "idp/builtin/policy/attach":
                self.users[body["user"]]["policyName"] = ",".join(body["policies"])
            case _:
                return 501, f"no such call: {method} {path}"
        return 200, ""


class Admin(rustfs_bucket.Admin):
    """The module's own client but for its sending."""

    def __init__(self, rustfs: Rustfs) -> None:
        self._rustfs = rustfs

    def call(self, method: str, path: str, body: object = None) -> tuple[int, str]:
        return self._rustfs.admin(method, path, body)


class S3:
    """The calls of an S3 client that the module makes."""

    def __init__(self, rustfs: Rustfs, access_key: str, secret_key: str) -> None:
        self._rustfs = rustfs
        self._keys = access_key, secret_key

    def _bucket(self, name: str) -> dict[str, bytes]:
        if not self._rustfs.may_use(*self._keys, name):
            raise ClientError({"Error": {"Code": "AccessDenied"}}, "S3")
        return self._rustfs.buckets[name]

    def list_buckets(self) -> dict[str, Any]:
        return {"Buckets": [{"Name": name} for name in self._rustfs.buckets]}

    def create_bucket(self, Bucket: str) -> None:
        self._rustfs.changed.append("bucket")
        self._rustfs.buckets[Bucket] = {}

    def put_object(self, Bucket: str, Key: str, Body: bytes) -> None:
        self._bucket(Bucket)[Key] = Body

    def get_object(self, Bucket: str, Key: str) -> dict[str, Any]:
        return {"Body": io.BytesIO(self._bucket(Bucket)[Key])}

    def delete_object(self, Bucket: str, Key: str) -> None:
        del self._bucket(Bucket)[Key]


@pytest.fixture
def rustfs() -> Rustfs:
    return Rustfs()


@pytest.fixture
def ensure(rustfs: Rustfs) -> Callable[..., list[str]]:
    """Return a function that brings the RustFS to the state of PARAMS; it says what it did."""

    def ensure(check_mode: bool = False, **changes: str) -> list[str]:
        params = PARAMS | changes
        user = S3(rustfs, params["access_key"], params["secret_key"])
        root = S3(rustfs, params["root_access_key"], params["root_secret_key"])
        return rustfs_bucket.ensure(Admin(rustfs), root, user, params, check_mode)

    return ensure


def test_everything_is_made_and_the_second_time_nothing(rustfs: Rustfs, ensure):
    assert ensure() == [CREATE, WRITE_POLICY, WRITE_USER, ATTACH]
    assert rustfs.buckets == {"results": {}}, "or the check left its object behind"
    assert rustfs.policies == {POLICY: rustfs_bucket.policy_for("results")}
    assert rustfs.users == {
        PARAMS["access_key"]: {
            "secretKey": PARAMS["secret_key"],
            "status": "enabled",
            "policyName": POLICY,
        }
    }
    rustfs.changed.clear()
    assert ensure() == []
    assert rustfs.changed == []


def drop_bucket(rustfs: Rustfs) -> None:
    rustfs.buckets.clear()


def widen_policy(rustfs: Rustfs) -> None:
    rustfs.policies[POLICY]["Statement"][1]["Action"].append("s3:*")


def drop_policy(rustfs: Rustfs) -> None:
    rustfs.policies.clear()


def change_user(**changes: str) -> Callable[[Rustfs], None]:
    return lambda rustfs: rustfs.users[PARAMS["access_key"]].update(changes)


def drop_user(rustfs: Rustfs) -> None:
    rustfs.users.clear()


@pytest.mark.parametrize(
    ("drifts", "changes"),
    [
        ([drop_bucket], [CREATE]),
        ([widen_policy], [WRITE_POLICY]),
        ([drop_policy], [WRITE_POLICY]),
        ([change_user(policyName="")], [ATTACH]),
        ([change_user(policyName=f"readwrite,{POLICY}")], [ATTACH]),
        ([change_user(status="disabled")], [WRITE_USER]),
        ([change_user(secretKey="another")], [WRITE_USER]),
        ([drop_user], [WRITE_USER, ATTACH]),
        # A wrong secret that something else hides at first.
        ([drop_bucket, change_user(secretKey="another")], [CREATE, WRITE_USER]),
        ([widen_policy, change_user(secretKey="another")], [WRITE_POLICY, WRITE_USER]),
    ],
)
def test_exactly_what_drifted_is_mended(rustfs: Rustfs, ensure, drifts: list, changes: list[str]):
    ensure()
    for drift in drifts:
        drift(rustfs)
    assert ensure() == changes
    assert rustfs.may_use(PARAMS["access_key"], PARAMS["secret_key"], "results")
    assert ensure() == []


def test_other_buckets_policies_and_users_stay(rustfs: Rustfs, ensure):
    ensure()
    ensure(name="other", access_key="second", secret_key="third")
    assert set(rustfs.buckets) == {"results", "other"}
    assert ensure() == []
    assert not rustfs.may_use("second", "third", "results")


def test_a_user_before_this_one_goes_on_only_while_it_is_named(rustfs: Rustfs, ensure):
    ensure()
    new = {"access_key": "new", "secret_key": "zQ6yH3tB8wV5nX2cK7dM"}
    ensure(**new, previous_access_key=PARAMS["access_key"])
    assert set(rustfs.users) == {PARAMS["access_key"], "new"}
    assert ensure(**new, previous_access_key=PARAMS["access_key"]) == []
    assert ensure(**new, check_mode=True) == ["remove another user of results"]
    assert set(rustfs.users) == {PARAMS["access_key"], "new"}
    assert ensure(**new) == ["remove another user of results"]
    assert set(rustfs.users) == {"new"}


def test_check_mode_says_the_same_and_changes_nothing(rustfs: Rustfs, ensure):
    assert ensure(check_mode=True) == [CREATE, WRITE_POLICY, WRITE_USER, ATTACH]
    assert rustfs.changed == []
    ensure()
    assert ensure(check_mode=True) == []


def test_a_user_that_never_gets_in_is_an_error(rustfs: Rustfs, ensure, monkeypatch):
    monkeypatch.setattr(rustfs, "may_use", lambda *_arguments: False)
    with pytest.raises(RuntimeError, match="the user of bucket results cannot use it"):
        ensure()


def test_a_store_that_gives_back_something_else_does_not_work(rustfs: Rustfs, ensure, monkeypatch):
    ensure()
    user = S3(rustfs, PARAMS["access_key"], PARAMS["secret_key"])
    assert rustfs_bucket.works(user, "results") is True
    monkeypatch.setattr(user, "get_object", lambda **_names: {"Body": io.BytesIO(b"other")})
    assert rustfs_bucket.works(user, "results") is False


@pytest.mark.parametrize("method", ["read", "change"])
def test_what_rustfs_refuses_is_an_error_without_the_query(method: str, rustfs: Rustfs):
    rustfs.admin = lambda *_request: (403, "AccessDenied")  # type: ignore[method-assign]
    arguments = {"read": ["user-info?accessKey=key"], "change": ["PUT", "user-info?accessKey=key"]}
    with pytest.raises(RuntimeError, match=r"answered 403 to \w+ user-info: AccessDenied"):
        getattr(Admin(rustfs), method)(*arguments[method])


# --- The policy -----------------------------------------------------------------------------------


def test_the_policy_names_this_bucket_and_nothing_else():
    statements = rustfs_bucket.policy_for("results")["Statement"]
    assert {resource for one in statements for resource in one["Resource"]} == {
        "arn:aws:s3:::results",
        "arn:aws:s3:::results/*",
    }
    actions = {action for one in statements for action in one["Action"]}
    assert not any("*" in action or "Policy" in action for action in actions)
    assert {one["Effect"] for one in statements} == {"Allow"}


def test_the_order_and_empty_values_mean_nothing_in_a_policy():
    policy = rustfs_bucket.policy_for("results")
    shown = json.loads(json.dumps(policy))
    shown["Statement"].reverse()
    shown |= {"ID": ""}
    for statement in shown["Statement"]:
        statement["Action"].reverse()
        statement |= {"Sid": "", "Condition": {}, "NotAction": []}
    assert rustfs_bucket.same_policy(shown, policy)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("Effect", "Deny"),
        ("Action", ["s3:ListBucket"]),
        ("Resource", ["arn:aws:s3:::*"]),
        ("Condition", {"StringEquals": {"aws:username": "x"}}),
    ],
)
def test_every_real_difference_of_a_policy_counts(key: str, value: object):
    policy = rustfs_bucket.policy_for("results")
    changed = json.loads(json.dumps(policy))
    changed["Statement"][0][key] = value
    assert not rustfs_bucket.same_policy(changed, policy)
    assert not rustfs_bucket.same_policy({}, policy)


# --- As a module ----------------------------------------------------------------------------------


@pytest.fixture
def run(rustfs: Rustfs, monkeypatch, capsys) -> Callable[..., dict[str, Any]]:
    """Return a function that runs the module and gives back its result."""
    monkeypatch.setattr(rustfs_bucket, "Admin", lambda *_arguments: Admin(rustfs))
    monkeypatch.setattr(
        rustfs_bucket,
        "s3_client",
        lambda _url, _region, key, secret, _verify: S3(rustfs, key, secret),
    )

    def run(check: bool = False) -> dict[str, Any]:
        given = PARAMS | {"_ansible_check_mode": check}
        with patch_module_args(given), pytest.raises(SystemExit):
            rustfs_bucket.main()
        out = capsys.readouterr().out
        for name in ("root_secret_key", "secret_key", "root_access_key", "access_key"):
            assert PARAMS[name] not in out
        return json.loads(out)

    return run


def test_check_mode_passes_on_a_host_without_rustfs(run, monkeypatch):
    unreachable = EndpointConnectionError(endpoint_url="http://192.0.2.1:9000")

    def ensure(*_arguments: Any) -> list[str]:
        raise unreachable

    monkeypatch.setattr(rustfs_bucket, "ensure", ensure)
    assert run(check=True)["changed"] is True
    assert "failed" in run()
    monkeypatch.setattr(rustfs_bucket, "boto3", None)
    assert run(check=True)["changed"] is True
    assert "python3-boto3" in run()["msg"]


def test_the_module_says_what_it_did(rustfs: Rustfs, run):
    assert run(check=True)["changed"] is True
    assert rustfs.changed == []
    result = run()
    assert (result["changed"], result["changes"]) == (
        True,
        [CREATE, WRITE_POLICY, WRITE_USER, ATTACH],
    )
    assert (run()["changed"], run()["changes"]) == (False, [])


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("RustFS answered 503"),
        EndpointConnectionError(endpoint_url="http://192.0.2.1:9000"),
        ClientError({"Error": {"Code": "InvalidAccessKeyId"}}, "ListBuckets"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_module_fails_with_the_address_and_the_reason(run, monkeypatch, error: Exception):
    def refuse(_self: S3) -> None:
        raise error

    monkeypatch.setattr(S3, "list_buckets", refuse)
    result = run()
    assert result["failed"] is True
    assert result["msg"] == f"RustFS at http://192.0.2.1:9000: {error}"


def test_a_host_without_boto3_is_told_the_package(run, monkeypatch):
    monkeypatch.setattr(rustfs_bucket, "boto3", None)
    assert "python3-boto3" in run()["msg"]


def test_rustfs_is_verified_by_the_given_authority(tmp_path: Path):
    authority = Authority(tmp_path)
    with serving(authority.issue()) as url:
        keys = (url, "us-east-1", "key", "secret")
        assert rustfs_bucket.Admin(*keys, authority.file).call("GET", "x") == (200, "")
        rustfs_bucket.s3_client(*keys, authority.file).list_buckets()
        # Python's own list does not have the fleet's authority.
        with pytest.raises(SSLError):
            rustfs_bucket.Admin(*keys, True).call("GET", "x")
        with pytest.raises(SSLError):
            rustfs_bucket.s3_client(*keys, True).list_buckets()
