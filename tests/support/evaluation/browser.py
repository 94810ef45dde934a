"""A headless Chromium for tests of pages; the tests are skipped, with the reason, where there is none."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


#: Each line runs or asks for something where it is shown as anything but text.
HOSTILE = """<img src=x onerror=alert(1)> "'</script><script>alert(2)</script>
"onmouseover="alert(3)" x="<svg onload=alert(4)></svg><iframe src="javascript:alert(5)"></iframe>
![x](http://evil.example/x.png) [click](javascript:alert(6)) <!-- evaluation --> {{ 7 * 7 }}
```
<script>alert(7)</script> | cell | `code`
"""


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of the system (Debian's `chromium` package); playwright would download one of its own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra `dev`)")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        # Tests run in containers, as root, where the browser's own sandbox cannot start and /dev/shm is small.
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def page_of(browser: Any, **kwargs: Any) -> Iterator[Any]:
    """A page in a profile of its own; fails at the end if the page reported an error or asked for anything outside."""
    context = browser.new_context(**kwargs)
    context.set_default_timeout(200_000)  # ms; a busy machine starts a browser's processes late
    page, errors = context.new_page(), []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: (errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: _check_local(request.url, errors))
    yield page
    context.close()
    assert not errors, errors


def _check_local(url: str, errors: list[str]) -> None:
    if not url.startswith(("http://127.0.0.1:", "file://", "data:", "blob:")):
        errors.append(f"asked for {url}")
