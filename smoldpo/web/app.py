"""The local page: rooms as routes. Names in addresses are looked up, never used as paths."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import jinja2
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from smoldpo.evaluation.headline import headline
from smoldpo.reports.run_files import read_run
from smoldpo.reports.templating import TEMPLATES, environment
from smoldpo.utils.errors import SmoldpoError
from smoldpo.utils.files import NO_SPACE
from smoldpo.web.booth import CHOICES, Booth

HERE = Path(__file__).parent
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; sandbox allow-popups"
)
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><path fill="#0072b2" '
    'd="M0 0h4v8H0z"/><path fill="#e69f00" d="M5 3h3v5H5z"/></svg>'
)
VOTER = "smoldpo-voter"
LONGEST_NAME = 40


def make_app(runs: dict[str, Path], booths: dict[str, Booth]) -> Starlette:
    """The application, without its guard.

    Args:
        runs: run folders by the name in their address.
        booths: where one can vote, by the name in the address.
    """
    rooms = _Rooms(runs, booths)
    return Starlette(
        routes=[
            Route("/", rooms.home),
            Route("/static/{name}", _static),
            Route("/run/{run}", rooms.report),
            Route("/vote/{booth}", rooms.vote),
            Route("/vote/{booth}", rooms.choose, methods=["POST"]),
            Route("/vote/{booth}/result", rooms.result),
            Route("/vote/{booth}/end", rooms.end, methods=["POST"]),
            Route("/vote/{booth}/voter", rooms.name, methods=["POST"]),
        ],
        exception_handlers={HTTPException: _refused},
    )


class _Rooms:
    def __init__(self, runs: dict[str, Path], booths: dict[str, Booth]):
        self._runs, self._booths = runs, booths

    async def home(self, request: Request) -> Response:
        runs = [
            (name, folder.resolve().name, *_state(folder)) for name, folder in self._runs.items()
        ]
        return _page("home.html", runs=runs, booths=self._booths)

    async def report(self, request: Request) -> Response:
        folder = self._known(self._runs, request.path_params["run"])
        try:
            text = (folder / "report.html").read_bytes()
        except OSError:
            raise HTTPException(404, "This run has no report yet.") from None
        return HTMLResponse(text, headers={"Content-Security-Policy": REPORT_POLICY})

    async def vote(self, request: Request) -> Response:
        booth, voter = self._booth(request), _voter(request)
        if voter is None:
            return _page("name.html", booth=booth)
        shown = booth.next(voter)
        if shown is None:
            return RedirectResponse(f"/vote/{booth.name}/result", 303)
        own = booth.votes.by_voter.get(voter, {})
        return _page(
            "vote.html", booth=booth, voter=voter, shown=shown, done=len(own),
            standing=booth.votes.standing(voter),
        )  # fmt: skip

    async def choose(self, request: Request) -> Response:
        booth, voter, form = self._booth(request), _voter(request), await _form(request)
        if voter is None or form.get("choice") not in CHOICES:
            raise HTTPException(400, "The form is not complete; go back and try again.")
        try:
            booth.choose(voter, form.get("ballot", ""), form["choice"])
        except OSError as error:
            why = "the disk is full" if error.errno in NO_SPACE else str(error.strerror)
            raise HTTPException(
                507, f"The vote was not saved: {booth.votes.path}: {why}. Go back and vote again."
            ) from None
        return RedirectResponse(f"/vote/{booth.name}", 303)

    async def end(self, request: Request) -> Response:
        booth, voter = self._booth(request), _voter(request)
        if voter is not None:
            booth.end(voter)
        return RedirectResponse(f"/vote/{booth.name}/result", 303)

    async def result(self, request: Request) -> Response:
        booth, voter = self._booth(request), _voter(request)
        if voter is None or booth.next(voter) is not None:
            return RedirectResponse(f"/vote/{booth.name}", 303)
        return _page(
            "result.html", booth=booth, voter=voter, own=booth.votes.standing(voter),
            all=booth.votes.standing(), agreements=booth.votes.agreements(),
        )  # fmt: skip

    async def name(self, request: Request) -> Response:
        booth, form = self._booth(request), await _form(request)
        voter = " ".join(form.get("voter", "").split())[:LONGEST_NAME]
        if not voter:
            raise HTTPException(400, "Give a name, so that votes can be told apart.")
        answer = RedirectResponse(f"/vote/{booth.name}", 303)
        answer.set_cookie(VOTER, voter.encode().hex(), httponly=True, samesite="strict")
        return answer

    def _booth(self, request: Request) -> Booth:
        booth: Booth = self._known(self._booths, request.path_params["booth"])
        return booth

    def _known(self, among: dict[str, Any], name: str) -> Any:
        if name not in among:
            raise HTTPException(404, "There is no such page.")
        return among[name]


def _state(folder: Path) -> tuple[str, bool]:
    """What a run found, in a sentence, and whether it has a report."""
    try:
        files = read_run(folder)
    except SmoldpoError as error:
        return str(error).removeprefix(f"{folder}: "), False
    said = headline(files.evaluation) if files.evaluation else files.absent["evaluation.json"]
    return said, (folder / "report.html").is_file()


def _voter(request: Request) -> str | None:
    try:
        return bytes.fromhex(request.cookies[VOTER]).decode() or None
    except (KeyError, ValueError):
        return None


async def _form(request: Request) -> dict[str, str]:
    body = (await request.body()).decode("utf-8", "replace")
    return {name: values[0] for name, values in parse_qs(body, max_num_fields=8).items()}


async def _static(request: Request) -> Response:
    found = _files().get(request.path_params["name"])
    if found is None:
        raise HTTPException(404, "There is no such page.")
    text, kind = found
    return Response(text, media_type=kind)


@functools.cache
def _files() -> dict[str, tuple[str, str]]:
    """The files that pages ask for, by name."""
    style = [(folder / name).read_text() for folder, name in (
        (TEMPLATES, "common.css"), (HERE / "static", "web.css"),
    )]  # fmt: skip
    return {
        "web.css": ("\n".join(style), "text/css"),
        "icon.svg": (ICON, "image/svg+xml"),
        "keys.js": ((HERE / "static" / "keys.js").read_text(), "text/javascript"),
    }


@functools.cache
def _templates() -> jinja2.Environment:
    return environment().overlay(loader=jinja2.FileSystemLoader(HERE / "templates"))


def _page(template: str, status: int = 200, **values: Any) -> HTMLResponse:
    text = _templates().get_template(template).render(**values)
    return HTMLResponse(text.encode("utf-8", "replace"), status)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _page("message.html", error.status_code, message=error.detail)
