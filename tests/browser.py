"""A real browser, over the WebDriver protocol as chromedriver speaks it: https://www.w3.org/TR/webdriver2/."""

import http.client
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")
TIMEOUT = 60.0  # seconds, for one command
_FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
]
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """One window."""

    def __init__(self, port: int, profile: Path) -> None:
        self._port = port
        self._path = ""
        options = {"binary": CHROMIUM, "args": [*_FLAGS, f"--user-data-dir={profile}"]}
        capabilities = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        session = self._ask("POST", "/session", capabilities={"alwaysMatch": capabilities})
        self._path = f"/session/{session['sessionId']}"

    def _ask(self, method: str, path: str, **values: Any) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT)
        try:
            connection.request(method, self._path + path, json.dumps(values) if method == "POST" else None)
            value = json.loads(connection.getresponse().read())["value"]
        finally:
            connection.close()
        assert not (isinstance(value, dict) and "error" in value), value
        return value

    def close(self) -> None:
        self._ask("DELETE", "")

    def open(self, url: str) -> None:
        """Go there; what was logged before is forgotten."""
        self.console(), self.requests()
        self._ask("POST", "/url", url=url)

    @property
    def url(self) -> str:
        return self._ask("GET", "/url")

    def run(self, script: str, *args: object) -> Any:
        """Run the body of a JavaScript function, and give what it returns."""
        return self._ask("POST", "/execute/sync", script=script, args=args)

    def _find(self, selector: str) -> str:
        return self._ask("POST", "/element", using="css selector", value=selector)[_ELEMENT]

    def click(self, selector: str) -> None:
        self._ask("POST", f"/element/{self._find(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        """Type into what takes keys, after what is there; control keys as the protocol numbers them."""
        self._ask("POST", f"/element/{self._find(selector)}/value", text=text)

    def resize(self, width: int, height: int) -> None:
        """Give the page so many CSS pixels, narrower than a window can be."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def devtools(self, command: str, **params: object) -> Any:
        return self._ask("POST", "/goog/cdp/execute", cmd=command, params=params)

    def console(self) -> list[str]:
        """What the console was told since this was last asked for."""
        return [entry["message"] for entry in self._ask("POST", "/se/log", type="browser")]

    def requests(self) -> list[str]:
        """What was asked for since this was last asked for, whether or not it was let out; without `data:`.

        Nor `chrome:`, which only the browser's own pages may ask for: the new window's may still be loading.
        """
        events = [json.loads(entry["message"])["message"] for entry in self._ask("POST", "/se/log", type="performance")]
        sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("data:", "chrome:"))]


@contextmanager
def browse(profile: Path) -> Iterator[Browser]:
    command: Sequence[str] = [str(CHROMEDRIVER), "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as driver:
        too_late = Timer(TIMEOUT, driver.kill)
        too_late.start()
        try:
            said = iter(driver.stdout.readline, "")
            port = next(int(match[1]) for line in said if (match := re.search(r"successfully on port (\d+)", line)))
            too_late.cancel()
            browser = Browser(port, profile)
            try:
                yield browser
            finally:
                browser.close()
        finally:
            too_late.cancel()
            driver.kill()
