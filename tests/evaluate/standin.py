"""A stand-in on loopback for the services that are compared with: DashScope's dialect, uploads too, and OpenAI's."""

import json
import re
import threading
from collections import Counter
from contextlib import contextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.serving import Served


class StandIn:
    """Answers every question with its own last word. `statuses` are what the next requests get in place of an answer."""

    def __init__(self):
        self.statuses, self.asked, self.keys, self.files, self.bodies = [], Counter(), set(), {}, []
        self.code, self.delay = "Throttling.RateQuota", threading.Event()
        self.delay.set()
        self.after = None  # requests after which `delay` holds
        self.app = Starlette(routes=[
            Route("/v1/models", self.models), Route("/v1/chat/completions", self.openai, methods=["POST"]),
            Route("/api/v1/uploads", self.policy), Route("/upload", self.upload, methods=["POST"]),
            Route("/api/v1/services/aigc/multimodal-generation/generation", self.dashscope, methods=["POST"]),
        ])  # fmt: skip
        self.served = ("alone",)

    @contextmanager
    def serving(self):
        served = Served(self.app, None)
        self.url = served.url
        try:
            yield self
        finally:
            self.delay.set()
            served.stop()
            served.thread.join(30)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in self.served]})

    async def policy(self, request: Request) -> Response:
        fields = "policy signature oss_access_key_id x_oss_object_acl x_oss_forbid_overwrite".split()
        return JSONResponse(
            {"request_id": "1", "data": {**dict.fromkeys(fields, "x"), "upload_dir": "dir", "upload_host": f"{self.url}/upload"}}
        )

    async def upload(self, request: Request) -> Response:
        async with request.form() as form:
            self.files[form["key"]] = await form["file"].read()
        return Response()

    async def answered(self, request: Request, words) -> tuple[int, str, dict]:
        """(status, answer, body) of a request; waits where it is to be killed."""
        body = json.loads(await request.body())
        self.keys.add(request.headers.get("authorization"))
        self.bodies.append(body)
        if self.after is not None and sum(self.asked.values()) >= self.after:
            from anyio import to_thread

            await to_thread.run_sync(self.delay.wait)
        text = words(body)
        status = self.statuses.pop(0) if self.statuses else 200
        if status == 200:
            self.asked[text] += 1
        return status, re.findall(r"\w+", text)[-1], body

    async def dashscope(self, request: Request) -> Response:
        def words(body):
            return "".join(part.get("text", "") for part in body["input"]["messages"][-1]["content"])

        status, answer, _ = await self.answered(request, words)
        if status != 200:
            return JSONResponse({"code": self.code, "message": "too many", "request_id": "1"}, status)
        choice = {"message": {"role": "assistant", "content": [{"text": answer}]}, "finish_reason": "stop"}
        usage = {"input_tokens": 30, "output_tokens": 2, "total_tokens": 32, "image_tokens": 20}
        return JSONResponse({"output": {"choices": [choice]}, "usage": usage, "request_id": "1"})

    async def openai(self, request: Request) -> Response:
        def words(body):
            said = body["messages"][-1]["content"]
            return said if isinstance(said, str) else "".join(part.get("text", "") for part in said)

        status, answer, body = await self.answered(request, words)
        if status != 200:
            key = request.headers.get("authorization", "")
            return JSONResponse({"error": {"message": f"no, {key}", "code": self.code, "type": "x", "param": None}}, status)
        choice = {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "length"}
        usage = {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11}
        return JSONResponse(
            {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice], "usage": usage}
        )
