"""The page as a browser is given it: which files there are, what they say of themselves, and that
nothing in them leads elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from api.auth import ApiKeyMiddleware, Keys
from api.page import FILES, FOLDER, router
from api.service import Service
from config import ServerSettings
from tests.api.doubles import ScriptedPool, service_over
from tests.api.in_process import application

NAMES = sorted(FILES)
TEXTS = {name: (FOLDER / name).read_text() for name in NAMES}
SCRIPTS = [name for name in NAMES if name.endswith(".js")]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """Of a server that wants a key, asked without one."""
    service: Service = service_over(ScriptedPool())
    app = application(service, router)
    keys = Keys.of(ServerSettings.model_validate({"API_KEY": "secret"}))
    app.add_middleware(ApiKeyMiddleware, keys=keys)
    with TestClient(app, raise_server_exceptions=False) as found:
        yield found


def references(name: str) -> set[str]:
    """What a file of the page names of the others, or of elsewhere."""
    text = TEXTS[name]
    if name.endswith(".html"):
        return set(re.findall(r"(?:src|href)=\"([^\"#]+)\"", text))
    if name.endswith(".css"):
        return set(re.findall(r"url\(([^)]*)\)|@import ([^;]*)", text))
    return set(re.findall(r"(?:from|import) \"([^\"]+)\"", text))


def test_the_table_names_the_files_of_the_folder() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_file_is_given_without_a_key_as_what_it_is(client: TestClient, name: str) -> None:
    answer = client.get(f"/static/{name}")
    assert (answer.status_code, answer.content) == (200, (FOLDER / name).read_bytes())
    assert answer.headers["content-type"] == FILES[name]


def test_the_page_is_its_html(client: TestClient) -> None:
    assert client.get("/").text == TEXTS["index.html"]
    assert client.head("/").headers["content-length"] == str(len(TEXTS["index.html"].encode()))


@pytest.mark.parametrize("path", ["/", "/static/main.js"])
def test_a_browser_may_load_from_this_server_alone(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    policy = dict(each.split(" ", 1) for each in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert set(policy.values()) == {"'none'", "'self'"}
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


def test_a_file_that_is_known_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/static/main.js")
    assert first.headers["cache-control"] == "no-cache"
    tag = first.headers["etag"]
    for known in (tag, f'"other", W/{tag}'):
        again = client.get("/static/main.js", headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    other = client.get("/static/live.js", headers={"If-None-Match": tag})
    assert other.status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/static/",
        "/static/none.js",
        "/static/../page.py",
        "/static/..%2fpage.py",
        "/static/%2e%2e%2fpage.py",
        "/static//etc/passwd",
        "/static/main.js%00",
    ],
)
def test_nothing_but_the_table_can_be_asked_for(client: TestClient, path: str) -> None:
    assert client.get(path).status_code in (401, 404)


@pytest.mark.parametrize("name", NAMES)
def test_whatever_a_file_names_is_in_the_table(name: str) -> None:
    folder = {".html": "static/", ".js": "./"}
    for each in references(name):
        start = folder["." + name.rpartition(".")[2]]
        assert each.startswith(start)
        assert each.removeprefix(start) in FILES


def test_every_file_is_named_by_another() -> None:
    named = {each.rpartition("/")[2] for name in NAMES for each in references(name)}
    assert named == FILES.keys() - {"index.html"}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_leads_elsewhere_or_reads_html(name: str) -> None:
    text = TEXTS[name].replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert not re.search(r"https?:|\"//|data:image", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script>", text)  # the policy forbids them


def test_scripts_ask_for_elements_that_are_there() -> None:
    ids = set(re.findall(r"\bid=\"([\w-]+)\"", TEXTS["index.html"]))
    for name in SCRIPTS:
        for asked in re.findall(r"(?:byId|write)\(\"([\w-]+)\"", TEXTS[name]):
            assert asked in ids, (name, asked)


def test_the_key_is_kept_for_the_session_alone() -> None:
    assert "sessionStorage" in TEXTS["key.js"]
    assert [name for name in SCRIPTS if "localStorage" in TEXTS[name]] == ["theme.js"]


@pytest.mark.parametrize("name", NAMES)
def test_files_are_small(name: str) -> None:
    assert len(TEXTS[name].splitlines()) < 250
