"""An EAS service of PAI: a merged model's folder goes to OSS, and our server answers for it behind PAI's gateway.

The gateway and the server ask for the same token. It is the value of the variable QWENVL_KEY, here and in the service; what is
shown of a service names the variable and never has its value.
"""

import base64
import json
import mimetypes
import re
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qwenvl_ft.cloud.account import TOKEN, Account, in_words, refusal
from qwenvl_ft.cloud.files import Upload
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.model import ADAPTER_CONFIG
from qwenvl_ft.folders.problems import check_model

MOUNT = "/eas/workspace/model"
PORT = 8000  # 8080 and 9090 are EAS's own
ANSWER_SECONDS = 120  # of a request; EAS gives 5 where it is told nothing
GATEWAY_BYTES = 1 << 20  # of a request's body
WORDS_OF_ITS_END = ("Failed", "Stopped", "DeleteFailed")
POLL_SECONDS = 5
NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")


def plan_service(
    account: Account, folder: Path, name: str, image: str, instance_type: str, count: int, token: str
) -> tuple[Upload, dict[str, Any]]:
    """The folder's upload, and the JSON of the service. Raises UserError for a folder that cannot answer, or a name that PAI takes
    for none."""
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        fix = f"merge it first: `qwenvl-ft export --adapter {folder} --out MERGED`, then deploy MERGED"
        raise UserError(Problem(str(folder), "is an adapter, without the base that it belongs to", fix))
    check_model(folder)
    if not NAME.fullmatch(name):
        raise UserError(Problem(f"--name {name}", "is no name of a service", "use small letters, digits and _, a letter first"))
    model = Upload.of(account, "service", folder)
    words = ["qwenvl-ft", "serve", MOUNT, "--name", name, "--host", "0.0.0.0", "--api-key-env", TOKEN,
             "--root-path", f"/api/predict/{name}", "--timeout", str(ANSWER_SECONDS)]  # fmt: skip
    # `serve` takes its port from $LISTENING_PORT, which EAS sets to `port`.
    container = {"image": image, "port": PORT, "script": shlex.join(words), "env": [{"name": TOKEN, "value": token}]}
    return model, {
        "name": name,
        "token": token,
        "metadata": {
            "name": name, "instance": count, "workspace_id": account.workspace_id,
            "rpc": {"keepalive": 1000 * ANSWER_SECONDS},
        },
        "cloud": {"computing": {"instance_type": instance_type}},
        "containers": [container],
        "storage": [{"mount_path": f"{MOUNT}/", "oss": {"path": model.uri}, "properties": {"resource_type": "model"}}],
    }  # fmt: skip


def create(session: Any, config: dict[str, Any]) -> None:
    """Creates the service, whose model is there. Raises UserError for what PAI refuses."""
    with in_words(f"service {config['name']}"):
        session.service_api.create(config=config)


def wait_until_it_answers(session: Any, name: str, say: Callable[[str], None], sleep: Callable[[float], None] = time.sleep) -> str:
    """The address of a service, once it answers there. Raises UserError if it ends before."""
    told = ""
    while True:
        facts = look(session, name)
        status, said = facts.get("Status"), facts.get("Message") or facts.get("Reason") or ""
        if status in WORDS_OF_ITS_END:
            why = refusal(f"service {name}", facts.get("Reason") or "", said)
            if "no room" not in why.what:
                why = Problem(
                    why.where, f"has ended ({status}: {said})", f"see its log in the console, then `qwenvl-ft pai delete {name}`"
                )
            raise UserError(why)
        if status == "Running" and is_answered(session, name):
            return str(facts.get("InternetEndpoint"))
        if (now := f"{name}: {status} {said}".strip()) != told:
            say(told := now)
        sleep(POLL_SECONDS)


def is_answered(session: Any, name: str) -> bool:
    """Whether the gateway leads to the server: for a while it answers with 404 or 503 of its own."""
    try:
        with in_words(f"service {name}"):
            return bool(_predictor(session, name).raw_predict(path="health", method="GET", timeout=30).content)
    except UserError:
        return False


def look(session: Any, name: str) -> dict[str, Any]:
    """What PAI knows of a service. Raises UserError."""
    with in_words(f"service {name}"):
        found: dict[str, Any] = session.service_api.get(name)
    return found


def write_question(question: str, pictures: Sequence[Path], max_new_tokens: int) -> dict[str, Any]:
    """The body of a request. Raises UserError for a picture that cannot be read, and for more than the gateway takes."""
    content: list[dict[str, Any]] = []
    for path in pictures:
        try:
            data = base64.b64encode(path.read_bytes()).decode()
        except OSError as error:
            raise UserError(Problem(str(path), f"cannot be read ({error.strerror})", "give a picture's file")) from None
        url = f"data:{mimetypes.guess_type(path.name)[0] or 'image/png'};base64,{data}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    content.append({"type": "text", "text": question})
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": max_new_tokens}
    if (size := len(json.dumps(body))) > GATEWAY_BYTES:
        fix = "make the pictures smaller, or save them as JPEG: a model sees no more than its max_pixels anyway"
        raise UserError(Problem("the request", f"has {size:,} bytes, and PAI's gateway takes {GATEWAY_BYTES:,}", fix))
    return body


def ask(session: Any, name: str, body: dict[str, Any]) -> str:
    """The service's answer. Raises UserError."""
    with in_words(f"service {name}"):
        return str(_predictor(session, name).predict(body)["choices"][0]["message"]["content"])


def delete(session: Any, name: str) -> None:
    """Deletes a service, which then costs nothing more; its model stays in the bucket. Raises UserError."""
    with in_words(f"service {name}"):
        session.service_api.delete(name)


def _predictor(session: Any, name: str) -> Any:
    from pai.predictor import Predictor
    from pai.serializers import JsonSerializer

    look(session, name)  # where there is no such service, the SDK's Predictor also complains about itself
    return Predictor(name, session=session, serializer=JsonSerializer())
