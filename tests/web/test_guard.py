"""Who is refused: other hosts, other origins, no token, paths out of the folders, large bodies."""

import json
import socket

import pytest

from conftest import jsonl

ANSWERS = [{"prompt": f"Question {n}?", "a": f"good {n}", "b": f"bad {n}"} for n in range(4)]
FORM = "ballot=nothing&choice=skip"


@pytest.fixture(scope="module")
def server(start_web, tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "answers.jsonl").write_text(jsonl(ANSWERS))
    (folder / "secret.txt").write_text("not for the page")
    return start_web(folder, "answers.jsonl")


def test_it_listens_on_this_machine_alone(server):
    with socket.socket() as other:
        other.settimeout(2)
        assert other.connect_ex(("127.0.0.2", server.port)) != 0


def test_the_token_of_the_address_becomes_a_cookie(server):
    answer = server.ask(f"/vote/file?token={server.token}&x=1", cookie=False)
    assert answer.status == 303 and answer.headers["location"] == "/vote/file?x=1"
    cookie = answer.headers["set-cookie"]
    assert f"smoldpo-{server.port}={server.token}" in cookie
    assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower()
    assert server.token not in server.ask("/vote/file").text


@pytest.mark.parametrize("path", ["/", "/vote/file", "/static/web.css", "/no/such"])
def test_without_the_token_nothing_is_shown(server, path):
    for cookie in (
        None,
        f"smoldpo-{server.port}=",
        f"smoldpo-{server.port}={server.token}x",
        "é;=,",
    ):
        answer = server.ask(path, cookie=False, Cookie=cookie)
        assert answer.status == 403 and "token" in answer.text and "Question" not in answer.text
    assert server.ask(f"{path}?token=wrong", cookie=False).status == 403


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "localhost:1", "", None])
def test_another_host_is_refused(server, host):
    assert server.ask("/", host=host).status in (400, 403)
    assert server.ask("/", host=f"LOCALHOST:{server.port}").status == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "", None])
def test_a_form_of_another_page_is_refused(server, origin):
    assert server.ask("/vote/file", "POST", FORM, origin=origin).status == 403
    assert server.ask("/vote/file", "POST", FORM).status == 303


@pytest.mark.parametrize(
    "name",
    ["../secret.txt", "..%2fsecret.txt", "%2e%2e/secret.txt", "..%5csecret.txt", 
     "%252e%252e%252fsecret.txt", "/etc/hostname", "....//secret.txt", "secret.txt%00.css"],
)  # fmt: skip
@pytest.mark.parametrize("room", ["/static/", "/run/", "/vote/"])
def test_no_path_leads_out(server, room, name):
    answer = server.ask(room + name)
    assert answer.status == 404 and "not for the page" not in answer.text


def test_large_and_odd_requests(server):
    assert server.ask("/vote/file", "POST", "x" * (16 << 10 | 1)).status == 413
    assert server.ask("/vote/file", "POST", FORM, content_length=None).status in (411, 413)
    assert server.ask("/vote/file", "DELETE").status == 405
    assert server.ask("/vote/file", "POST", "choice=nothing").status == 400
    assert server.ask("/vote/file/voter", "POST", "voter=+").status == 400


def test_pages_may_load_and_send_nothing_elsewhere(server):
    for path in ("/", "/vote/file", "/no/such"):
        headers = server.ask(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy and "form-action 'self'" in policy
        assert headers["cache-control"] == "no-store" and "server" not in headers


def test_a_vote_by_hand(server, tmp_path_factory):
    shown = server.ask("/vote/file").text
    ballot = shown.split('name="ballot" value="')[1].split('"')[0]
    assert server.ask("/vote/file", "POST", f"ballot={ballot}&choice=tie").status == 303
    (row,) = map(json.loads, (votes := _votes(server)).read_text().splitlines())
    assert row["id"] == ballot and row["winner"] == "tie" and row["voter"] == "ann"
    server.process.kill()
    assert votes.read_text().endswith("\n")


def _votes(server):
    from pathlib import Path

    return Path(f"/proc/{server.process.pid}/cwd").resolve() / "votes.jsonl"
