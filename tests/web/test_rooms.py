"""The rooms of runs: what each found, its report, and a vote on its answers."""

import pytest

from runfiles import write_run
from smoldpo.utils.errors import UsageError
from smoldpo.web.server import rooms


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("first", "second <b>"):
        write_run(folder / name)
    (folder / "first" / "report.html").write_text("<h1>The report</h1>")
    (folder / "begun").mkdir()
    (folder / "begun" / "config.yaml").write_text("{}")
    (folder / "begun" / "environment.json").write_text("{}")
    (folder / "notes").mkdir()
    return folder


def test_runs_say_what_they_found(start_web, folder):
    server = start_web(folder, ".")
    page = server.ask("/").text
    assert "first" in page and "second &lt;b&gt;" in page and "<b>" not in page
    assert page.count("The tuned model prefers") == 2 and "unfinished" in page
    assert "notes" not in page and page.count(">Report<") == 1
    report = server.ask("/run/2")
    assert report.status == 200 and report.text == "<h1>The report</h1>"
    assert "sandbox" in report.headers["content-security-policy"]
    assert server.ask("/run/1").status == 404 and server.ask("/run/first").status == 404
    assert server.ask("/vote/2").status == 200, "a vote on its answers before and after"


def test_what_is_named_is_what_is_shown(folder, tmp_path):
    runs, booths = rooms(folder / "first", None)
    assert list(runs.values()) == [folder / "first"] and list(booths) == ["1"]
    assert booths["1"].votes.path == folder / "first" / "votes.jsonl"
    assert booths["1"].models == ("reference", "policy")
    with pytest.raises(UsageError, match="needs one run"):
        rooms(folder, tmp_path / "votes.jsonl")
    with pytest.raises(UsageError, match="is no run and holds none"):
        rooms(tmp_path, None)
    with pytest.raises(UsageError, match="does not exist"):
        rooms(tmp_path / "no", None)
