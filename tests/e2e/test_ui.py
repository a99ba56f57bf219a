"""The UI in a real browser, at the server's own address in the tailnet."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from lab.podman import install_packages
from tests.fleet.conftest import Laptop, Site, free_port
from tests.fleet.test_runs import DEPLOYMENTS

# Flags that keep the browser from looking for its maker's hosts, and those that it needs as root.
_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
_PATIENCE = 60_000  # milliseconds: the machine may be slow


@pytest.fixture(scope="module")
def browser(forward: Callable[[list[str]], None]) -> Iterator[Browser]:
    """Headless Chromium that reaches the network through a member of the tailnet."""
    if not shutil.which("chromium"):
        install_packages(["chromium"])
    port = free_port()
    forward(["-D", f"127.0.0.1:{port}"])
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=shutil.which("chromium"),
            proxy={"server": f"socks5://127.0.0.1:{port}"},
            args=_FLAGS,
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page of a browser without a memory."""
    context = browser.new_context()
    context.set_default_timeout(_PATIENCE)
    page = context.new_page()
    # Shown when a test fails: a part of the UI that does not come leaves the page empty.
    page.on("requestfailed", lambda request: print(request.url, request.failure))
    page.on("response", lambda answer: answer.ok or print(answer.url, answer.status))
    page.on("console", lambda message: print(message.type, message.text))
    yield page
    context.close()


@pytest.fixture(scope="module")
def ui(site: Site) -> str:
    """Address of the UI."""
    return site.api.removesuffix("/api")


def log_in(page: Page, ui: str, auth: str) -> None:
    """Open the UI and give it the credentials."""
    page.goto(ui)
    page.locator("input[type=password]").fill(auth)
    page.keyboard.press("Enter")


def test_completed_runs_are_seen_after_login(
    page: Page, ui: str, site: Site, laptop: Laptop
) -> None:
    # Started here, so that the newest runs that the page shows are these.
    for deployment in DEPLOYMENTS:
        done = laptop.prefect("deployment", "run", deployment, "--watch", "--watch-timeout", "240")
        assert done.returncode == 0, done.stdout + done.stderr
    log_in(page, ui, site.auth)
    page.get_by_role("link", name="Runs", exact=True).click(timeout=_PATIENCE)
    for flow in (deployment.split("/")[0] for deployment in DEPLOYMENTS):
        run = page.get_by_role("listitem").filter(has_text=flow).filter(has_text="Completed").first
        expect(run).to_be_visible(timeout=_PATIENCE)


def test_wrong_password_shows_nothing(page: Page, ui: str) -> None:
    answers = []
    page.on("response", lambda answer: answers.append((answer.url, answer.status)))
    log_in(page, ui, "admin:wrong-password-of-some-length")
    expect(page.locator("input[type=password]")).to_be_visible(timeout=_PATIENCE)
    page.wait_for_timeout(2000)
    asked = [status for url, status in answers if url.startswith(f"{ui}/api/admin/version")]
    assert asked
    assert set(asked) == {401}
    expect(page.get_by_role("link", name="Runs", exact=True)).to_have_count(0)
