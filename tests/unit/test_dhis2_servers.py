"""Lists of DHIS2 servers, as other programs read them."""

from prefect_dhis2.servers import build_blocks, read_variables

SECRET = "s3cret-word"
LOGIN = {"base_url": "https://x.org", "username": "u", "password": SECRET}


def test_blocks_by_name_and_faults_that_name_the_entry():
    blocks, faults = build_blocks(
        [
            {"name": "play", **LOGIN},
            {"name": "token", "base_url": "https://x.org/dhis/api", "token": SECRET, "retries": 0},
            {"name": "empty", **LOGIN, "token": "", "ca_file": None, "verify_tls": None},
            {"name": "both", **LOGIN, "token": SECRET},
            {"name": "neither", "base_url": "https://x.org"},
            {"name": "typo", **LOGIN, "pasword": SECRET},
            {"name": "play", **LOGIN},
            {"name": 5, **LOGIN},
            {"base_url": f"https://{SECRET}@x.org", "token": SECRET},
            [SECRET],
        ]
    )
    assert list(blocks) == ["play", "token", "empty"]
    assert blocks["token"].base_url == "https://x.org/dhis"
    assert blocks["token"].retries == 0
    assert blocks["empty"].verify_tls is True
    starts = [
        "server both: write a token, or a username with its password, not both",
        "server neither: write a username with its password, or a token",
        "server typo: pasword is not known",
        "server play: is listed twice",
        "server 5: name is a int, not a str",
        "server number 9: name is missing",
        "server number 10: is a list; write a mapping",
    ]
    assert [fault[: len(start)] for fault, start in zip(faults, starts, strict=True)] == starts
    assert SECRET not in " ".join(faults)


def test_no_servers_are_no_fault():
    assert build_blocks([]) == ({}, [])


def test_variables_of_one_server_make_one_entry():
    assert read_variables(
        {
            "DHIS2_SERVERS__A_B__BASE_URL": "https://x.org",
            "DHIS2_SERVERS__A_B__PASSWORD": "123",
            "DHIS2_SERVERS__A_B__RETRIES": "3",
            "DHIS2_SERVERS__C__VERIFY_TLS": "no",
            "DHIS2_SERVER__D__TOKEN": "other",
        }
    ) == [
        {"name": "a-b", "base_url": "https://x.org", "password": "123", "retries": 3},
        {"name": "c", "verify_tls": False},
    ]
