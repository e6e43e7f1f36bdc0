"""The board as an ASGI application: what each address answers. Who may ask: guard.py."""

import hmac
import json
import secrets
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from qwenvl_ft.board import answers as said
from qwenvl_ft.board import form
from qwenvl_ft.board.attempt import Asking, OnPiece, adapter_of
from qwenvl_ft.board.curves import COLOURS
from qwenvl_ft.board.guard import PICTURE_BYTES, Guard
from qwenvl_ft.board.jobs import PROGRAM, Job, Jobs, shown, train_command
from qwenvl_ft.board.render import HERE, Served, drawings, render
from qwenvl_ft.board.runs import Kept, Run, defaults, differences, folders, log_end, read_run
from qwenvl_ft.board.views import answers_facts, num_broken, question_facts, run_facts
from qwenvl_ft.board.words import language_of
from qwenvl_ft.errors import Problem, UserError

JSON_LINES = "application/x-ndjson"


@dataclass
class Board:
    """The pages of the runs below `root`. `token` is what its own forms hold."""

    root: Path
    jobs: Jobs
    kept: Kept = field(default_factory=Kept)
    asking: Asking = field(default_factory=Asking)
    token: str = field(default_factory=secrets.token_urlsafe)

    def page(self, request: Request, name: str, here: str, facts: dict[str, Any], status: int = 200) -> Response:
        """A page in the language of who asks."""
        asked = request.query_params.get("lang")
        lang = language_of(asked, request.cookies.get("lang"), request.headers.get("accept-language", ""))
        query = urlencode([pair for pair in request.query_params.multi_items() if pair[0] != "lang"])
        links = Served(f"{quote(request.url.path, '/%')}{'?' if query else ''}{query}")
        answer = HTMLResponse(render(name, lang, links, here, facts | {"token": self.token}), status)
        if asked == lang:
            answer.set_cookie("lang", lang, max_age=365 * 86400, samesite="strict", httponly=True)
        return answer

    def run(self, name: str) -> Run | None:
        """A run by its name; None where there is none."""
        folder = dict(folders(self.root)).get(name)
        return read_run(name, folder, self.kept) if folder else None

    def named(self, request: Request) -> tuple[str, Run | None, str]:
        """(name, run, state) of the run in the path. Raises HTTPException for a name that there is not."""
        name = request.path_params["name"]
        run = self.run(name)
        state = self.jobs.state(name, run)
        if not state:
            raise HTTPException(404)
        return name, run, state

    def show_runs(self, request: Request) -> Response:
        """Every run below the folder, the one that changed last first."""
        runs = [read_run(name, folder, self.kept) for name, folder in folders(self.root)]
        names = {run.name for run in runs}
        jobs = [Job(name, self.jobs.state(name, None)) for name in self.jobs.processes if name not in names]
        facts = {"runs": sorted(runs, key=lambda run: -run.changed), "jobs": jobs, "root": str(self.root)}
        return self.page(request, "runs.html", "runs", facts)

    def show_run(self, request: Request) -> Response:
        """One run: its curves, what it printed, its settings."""
        name, run, state = self.named(request)
        files = [file for file in said.files_of(self.root) if file.startswith(f"{name}/")]
        links = [(file.removeprefix(f"{name}/"), Served().questions([file], "", "", 1)) for file in files]
        resume = shown(train_command(self.root / name / "config.yaml", resume=True))
        log = log_end(self.root / f"{name}.log")
        facts = {"name": name, "run": run, "state": state, "files": links, "log": log, "resume": resume}
        return self.page(request, "run.html", "runs", facts | run_facts(run, self.language(request)))

    def language(self, request: Request) -> str:
        """en or zh."""
        accepted = request.headers.get("accept-language", "")
        return language_of(request.query_params.get("lang"), request.cookies.get("lang"), accepted)

    def show_compare(self, request: Request) -> Response:
        """Some runs laid over each other."""
        runs = [run for name in dict.fromkeys(request.query_params.getlist("run")) if (run := self.run(name))]
        if not 1 <= len(runs) <= COLOURS:
            raise UserError(Problem("run", f"{len(runs)} runs are chosen", f"choose 2 to {COLOURS}"))
        facts = {"runs": runs, "drawings": drawings(runs, self.language(request)), "differ": differences(runs), "num_left_out": 0}
        return self.page(request, "compare.html", "runs", facts)

    def show_answers(self, request: Request) -> Response:
        """The files of predictions that there are."""
        return self.page(request, "answers.html", "answers", answers_facts(said.files_of(self.root), Served(), self.kept))

    def show_questions(self, request: Request) -> Response:
        """The answers of some files side by side."""
        asked = request.query_params
        names, files = list(dict.fromkeys(asked.getlist("file"))), said.files_of(self.root)
        if len(names) > COLOURS:
            raise UserError(Problem("file", f"{len(names)} files are chosen", f"choose 1 to {COLOURS}"))
        if not names or not set(names) <= files.keys():
            raise HTTPException(404)
        page = asked.get("page", "1")
        number = int(page) if page.isascii() and page.isdigit() and len(page) < 9 else 0
        kind, search = said.check_kind(asked.get("kind") or "all"), asked.get("search", "")[:200]
        every, broken = said.side_by_side(names, files, self.kept), num_broken(names, files, self.kept)
        facts = question_facts(names, every, broken, kind, search, number, Served())
        return self.page(request, "questions.html", "answers", facts)

    def show_picture(self, request: Request) -> Response:
        """A picture that a prediction names."""
        asked = request.query_params
        try:
            row, number = int(asked.get("row", "")), int(asked.get("number", ""))
            path = said.picture_path(asked.get("file", ""), row, number, said.files_of(self.root), self.kept)
            data = said.small(path)
        except (LookupError, ValueError, OSError, UserError):
            raise HTTPException(404) from None
        return Response(data, media_type="image/webp", headers={"cache-control": "private, max-age=3600"})

    def show_new(self, request: Request) -> Response:
        """The form for a run, as `?like=` another has it."""
        like = self.run(request.query_params.get("like", ""))
        given = form.filled(like.settings if like else {})
        given["output_dir"] = str(self.root / "NAME") if like or not given.get("output_dir") else given["output_dir"]
        return self.page(request, "new.html", "new", {"given": given, "problems": [], "draft": None} | form.shown())

    async def post_new(self, request: Request) -> Response:
        """Shows what the form comes to, and starts it where that was asked for."""
        given = await self.posted(request)
        facts: dict[str, Any] = {"given": given, "problems": [], "draft": None} | form.shown()
        try:
            draft = await run_in_threadpool(form.draft, given, self.root)
            command = train_command(draft.path)
            facts |= {"draft": draft, "command": shown(command)}
            if given.get("act") == "start":
                form.save(draft)
                await run_in_threadpool(self.asking.drop)
                self.jobs.start(draft.name, command)
                return RedirectResponse(Served().run(draft.name), 303)
        except UserError as error:
            facts["problems"] = error.problems
        return self.page(request, "new.html", "new", facts, 400 if facts["problems"] else 200)

    async def post_stop(self, request: Request) -> Response:
        """Asks a run to end."""
        await self.posted(request)
        name, run, _ = self.named(request)
        self.jobs.stop(name, run)
        return RedirectResponse(Served().run(name), 303)

    async def post_resume(self, request: Request) -> Response:
        """Goes on with a run from its newest whole checkpoint."""
        await self.posted(request)
        name, run, state = self.named(request)
        if run is None or state in ("running", "starting"):
            raise UserError(Problem(name, f"is {state}", "wait for its end"))
        await run_in_threadpool(self.asking.drop)
        self.jobs.start(name, train_command(run.folder / "config.yaml", resume=True))
        return RedirectResponse(Served().run(name), 303)

    def show_data(self, request: Request) -> Response:
        """The records of a run, as `show --html` draws them."""
        _, run, _ = self.named(request)
        part, start = request.query_params.get("part", ""), request.query_params.get("start", "0")
        if (
            run is None
            or (part != "training" and part != "evaluation")
            or not (start.isascii() and start.isdigit() and len(start) < 8)
        ):
            raise HTTPException(404)
        from qwenvl_ft.board.records import draw_records

        # Its own policy, which stands in it, lets nothing run but its own script.
        headers = {"content-security-policy": "frame-ancestors 'none'"}
        return HTMLResponse(draw_records(run, part, int(start), self.language(request)), headers=headers)

    def try_page(self, request: Request, facts: dict[str, Any], status: int = 200) -> Response:
        """The form for a question, with what was answered."""
        runs = [name for name, folder in folders(self.root) if adapter_of(folder)]
        nothing = {"problems": [], "answers": [], "picture": "", "question": "", "chosen": request.query_params.get("run", "")}
        return self.page(request, "try.html", "try", nothing | {"runs": runs} | facts, status)

    def show_try(self, request: Request) -> Response:
        """The form for a question."""
        return self.try_page(request, {})

    async def post_try(self, request: Request) -> Response:
        """Asks base and tuned; what they say comes as a page, or as it is said for who accepts JSON lines."""
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise HTTPException(415)
        async with request.form(max_files=1, max_fields=8, max_part_size=PICTURE_BYTES) as form:
            self.check_token(str(form.get("token", "")))
            name, question, sent = str(form.get("run", "")), str(form.get("question", "")), form.get("picture")
            picture = await sent.read() if isinstance(sent, UploadFile) else b""
        run = self.run(name)

        def answer(on_piece: OnPiece = lambda who, piece: None) -> Response:
            facts: dict[str, Any] = {"chosen": name, "question": question}
            try:
                if run is None:
                    raise UserError(Problem("run", "there is none of this name", "choose one"))
                return self.try_page(request, facts | self.asking.ask(run, question, picture, on_piece))
            except UserError as error:
                return self.try_page(request, facts | {"problems": error.problems}, 400)

        if request.headers.get("accept") == JSON_LINES:
            return StreamingResponse(as_said(lambda on_piece: bytes(answer(on_piece).body).decode()), media_type=JSON_LINES)
        return await run_in_threadpool(answer)

    async def posted(self, request: Request) -> dict[str, str]:
        """What a form of the board says. Raises HTTPException for what comes from elsewhere."""
        if not request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
            raise HTTPException(415)
        try:
            pairs = parse_qsl((await request.body()).decode(), keep_blank_values=True, max_num_fields=200)
        except ValueError:
            raise HTTPException(400) from None
        given = dict(pairs)
        self.check_token(given.pop("token", ""))
        return given

    def check_token(self, token: str) -> None:
        """Raises HTTPException for a form that is not of this board's pages."""
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self.token.encode()):
            raise HTTPException(403, "this form is not of this board, or older than it: load the page again")

    def refused(self, request: Request, error: Exception) -> Response:
        """The page of what is wrong."""
        if isinstance(error, UserError):
            return self.page(request, "problem.html", "", {"status": "400", "problems": error.problems}, 400)
        assert isinstance(error, HTTPException)
        problems = [Problem(request.url.path[:200], error.detail, "go back to the list of runs")]
        page = self.page(request, "problem.html", "", {"status": str(error.status_code), "problems": problems}, error.status_code)
        page.headers.update(error.headers or {})
        return page


def as_said(answer: Callable[[OnPiece], str]) -> Iterator[str]:
    """JSON lines of what is answered: {who, piece} as it is said, then the {page} that `answer` returns.

    Who goes away in the middle does not end the question, which has the model until it is answered.
    """
    lines: SimpleQueue[dict[str, str] | None] = SimpleQueue()

    def work() -> None:
        try:
            lines.put({"page": answer(lambda who, piece: lines.put({"who": who, "piece": piece}))})
        finally:
            lines.put(None)

    Thread(target=work, daemon=True).start()
    for line in iter(lines.get, None):
        yield json.dumps(line) + "\n"


def asset(name: str) -> Callable[[Request], Awaitable[Response]]:
    """A file of the package."""

    async def answer(request: Request) -> Response:
        return FileResponse(HERE / name, headers={"cache-control": "no-cache"})

    return answer


def make_app(root: Path, key: str | None = None, program: tuple[str, ...] = PROGRAM) -> Starlette:
    """The board of the runs below `root`. `key`: who asks must have it; without one only this machine is answered. `program` starts
    runs."""
    defaults()
    board = Board(root, Jobs(root, program))
    routes = [
        Route("/", board.show_runs),
        Route("/runs/{name:path}", board.show_run),
        Route("/compare", board.show_compare),
        Route("/answers", board.show_answers),
        Route("/questions", board.show_questions),
        Route("/picture", board.show_picture),
        Route("/new", board.show_new, methods=["GET"]),
        Route("/new", board.post_new, methods=["POST"]),
        Route("/data/{name:path}", board.show_data),
        Route("/try", board.show_try, methods=["GET"]),
        Route("/try", board.post_try, methods=["POST"]),
        Route("/stop/{name:path}", board.post_stop, methods=["POST"]),
        Route("/resume/{name:path}", board.post_resume, methods=["POST"]),
        Route("/board.css", asset("board.css")),
        Route("/board.js", asset("board.js")),
    ]
    handlers: dict[Any, Any] = {UserError: board.refused, HTTPException: board.refused}
    app = Starlette(routes=routes, middleware=[Middleware(Guard, key=key)], exception_handlers=handlers)
    app.state.jobs, app.state.asking = board.jobs, board.asking
    return app
