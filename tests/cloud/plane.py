"""PAI and OSS on loopback, for Alibaba's own SDK: what is signed wrongly, asked wrongly or too much is refused as the real ones do.

    with Plane(folder) as plane:
        plane.attach(monkeypatch)      # the SDK's clients dial here; nothing else of it is changed

A bucket is a folder, so that a mount of it is a link: a job's command runs for real in a folder like /ml, with the environment that
PAI documents, on the code, inputs and outputs that were named; a service's command runs for real, behind a gateway that asks for the
service's token, takes a mebibyte at most and strips /api/predict/NAME. Only the containers are missing: both run in this Python's
environment. No machine of the account is free while `quota` of them are taken. `preempt_when` kills a job once, and starts it again
on a new machine.
"""

import base64
import hashlib
import hmac
import http.client
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from tests.conftest import ROOT

REGION, WORKSPACE, BUCKET = "cn-shanghai", "4711", "charts"
MACHINES = {"ecs.gn7i-c8g1.2xlarge", "ecs.gn6i-c4g1.xlarge"}
GATEWAY_BYTES = 1 << 20
SUBRESOURCES = {"acl", "append", "continuation-token", "objectMeta", "partNumber", "position", "uploadId", "uploads"}
NAME = re.compile(r"[A-Za-z0-9_.-]{1,127}")


class Refused(Exception):
    """An answer that is no success: HTTP status, Alibaba's code, a message."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(code)
        self.status, self.code, self.message = status, code, message


class Plane:
    """The state of an account and its bucket below `folder`, and the server that answers for them."""

    def __init__(self, folder: Path):
        self.folder, self.quota = folder, 4
        self.key_id, self.key_secret = f"LTAI5t{secrets.token_hex(9)}", secrets.token_hex(15)
        self.jobs: dict[str, dict[str, Any]] = {}
        self.services: dict[str, dict[str, Any]] = {}
        self.registered: dict[str, Any] = {}  # a model of PAI's own, and the algorithm that trains it
        self.asked: list[tuple[str, str, Any]] = []  # (method, path, body) of what was let in
        self.preempt_when: Callable[[Path], bool] | None = None
        (folder / "oss" / BUCKET).mkdir(parents=True)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.server_port}"

    @property
    def account(self) -> dict[str, str]:
        """What `python -m pai.toolkit.config` would have written."""
        return {"region_id": REGION, "workspace_id": WORKSPACE, "oss_bucket_name": BUCKET, "oss_endpoint": f"http://{self.address}"}

    def __enter__(self) -> "Plane":
        plane = self

        class Handler(Answers):
            of = plane

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        for running in [*self.jobs.values(), *self.services.values()]:
            end(running.get("process"))
        self.server.shutdown()
        self.server.server_close()

    def attach(self, monkeypatch: Any) -> None:
        """The SDK builds its clients' addresses from the region and knows no setting for them: here they are this server's."""
        from alibabacloud_tea_openapi.models import Config
        from pai.api.client_factory import ClientFactory

        def create_client(cls, service_name, region_id, credential_client, network=None):
            config = Config(region_id=region_id, credential=credential_client, signature_algorithm="v2",
                            endpoint=self.address, protocol="http")  # fmt: skip
            return cls.ClientByServiceName[service_name](config)

        monkeypatch.setattr(ClientFactory, "create_client", classmethod(create_client))

    # What a bucket and its mounts are.

    def at(self, uri: str) -> Path:
        """Where an oss:// URI lies; its bucket must be ours."""
        bucket, _, key = uri.removeprefix("oss://").partition("/")
        if not uri.startswith("oss://") or bucket.split(".")[0] != BUCKET:
            raise Refused(400, "InvalidParameter", f"{uri} is in no bucket of this account")
        return self.folder / "oss" / BUCKET / key

    # Training jobs.

    def create_job(self, body: dict[str, Any]) -> dict[str, Any]:
        """Checks what PAI checks, then runs it on."""
        algorithm = body.get("AlgorithmSpec") or (self.registered["algorithm"] if body.get("AlgorithmName") else None)
        machine, channels = body["ComputeResource"], [channel["Name"] for channel in body.get("InputChannels", [])]
        wrong = (
            "WorkspaceId" if body.get("WorkspaceId") != WORKSPACE else
            "TrainingJobName" if not NAME.fullmatch(body.get("TrainingJobName", "")) else
            "AlgorithmSpec" if not algorithm or not algorithm.get("Image") or not algorithm.get("Command") else
            "ComputeResource.EcsSpec" if machine.get("EcsSpec") not in MACHINES else
            "HyperParameters" if not all(NAME.fullmatch(of["Name"]) and isinstance(of["Value"], str)
                                         for of in body.get("HyperParameters", [])) else
            "InputChannels" if any(of.get("Required") and of["Name"] not in channels for of in algorithm["InputChannels"]) else
            None
        )  # fmt: skip
        if wrong:
            raise Refused(400, "InvalidParameter", f"The parameter {wrong} is invalid or missing.")
        for channel in [*body.get("InputChannels", []), *body.get("OutputChannels", [])]:
            self.at(channel.get("InputUri") or channel["OutputUri"])
        self.take(machine["EcsCount"])
        job = f"train{secrets.token_hex(5)}"
        self.jobs[job] = {"body": body, "algorithm": algorithm, "Status": "Creating", "taken": machine["EcsCount"], "starts": 0}
        threading.Thread(target=self.run_job, args=(job,), daemon=True).start()
        return {"TrainingJobId": job}

    def take(self, number: int) -> None:
        taken = sum(of["taken"] for of in [*self.jobs.values(), *self.services.values()])
        if taken + number > self.quota:
            what = (
                f"The instance quota of the account is exceeded: {taken} of {self.quota} are in use, {number} more are asked for."
            )
            raise Refused(403, "QuotaExceeded.Instance", what)

    def run_job(self, name: str) -> None:
        """One machine after another, until one of them is let run to its end."""
        job = self.jobs[name]
        log = self.folder / f"{name}.log"
        job["log"], killed = log, True
        while killed and job["Status"] != "Terminated":
            job["starts"] += 1
            command, options = self.machine(name, job)
            with log.open("a") as out:
                job["process"] = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, **options)
            job["Status"], killed = "Running", False
            while job["process"].poll() is None:
                if self.preempt_when and self.preempt_when(Path(options["env"]["PAI_OUTPUT_CHECKPOINTS"])):
                    self.preempt_when, killed = None, True
                    end(job["process"], signal.SIGKILL)
                time.sleep(0.02)
        code, job["taken"] = job["process"].returncode, 0
        if job["Status"] != "Terminated":
            job["Status"] = "Failed" if code else "Succeed"
        if code:
            job |= {"ReasonCode": "WorkerFailed", "ReasonMessage": f"The exit code of the worker is {code}."}

    def machine(self, name: str, job: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """A folder like /ml, and the environment of help.aliyun.com's page 2261505 and of the SDK's own local jobs."""
        body, root = job["body"], self.folder / f"{name}-{job['starts']}"
        code, config, data, output = root / "usercode", root / "input/config", root / "input/data", root / "output"
        for folder in (root / "tmp", config, data, output):
            folder.mkdir(parents=True)
        place = job["algorithm"]["CodeDir"]["LocationValue"]
        shutil.copytree(self.at(f"oss://{place['Bucket']}/{place['Key']}"), code)
        wanted = {of["Name"]: of["Value"] for of in body.get("HyperParameters", [])}
        (config / "hyperparameters.json").write_text(json.dumps(wanted))
        environment = {
            "PAI_WORKING_DIR": str(code), "PAI_CONFIG_DIR": str(config), "PAI_TRAINING_JOB_ID": name, "PAI_HPS": json.dumps(wanted),
            "PAI_USER_ARGS": " ".join(shlex.quote(word) for of in wanted.items() for word in ("--" + of[0], of[1])),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "23456", "WORLD_SIZE": "1", "RANK": "0", "NPROC_PER_NODE": "1",
            "TMPDIR": str(root / "tmp"), **{f"PAI_HPS_{upper(of)}": value for of, value in wanted.items()},
        }  # fmt: skip
        for channel in body.get("InputChannels", []):
            at, mount = self.at(channel["InputUri"]), data / channel["Name"]
            mount.symlink_to(at if channel["InputUri"].endswith("/") else at.parent)
            environment[f"PAI_INPUT_{upper(channel['Name'])}"] = str(
                mount if channel["InputUri"].endswith("/") else mount / at.name
            )
        for channel in body["OutputChannels"]:
            at = self.at(channel["OutputUri"])
            at.mkdir(parents=True, exist_ok=True)
            (output / channel["Name"]).symlink_to(at)
            environment[f"PAI_OUTPUT_{upper(channel['Name'])}"] = str(output / channel["Name"])
        return job["algorithm"]["Command"], {"cwd": code, "env": container(environment | (body.get("Environments") or {}))}

    def job_facts(self, name: str) -> dict[str, Any]:
        if name not in self.jobs:
            raise Refused(404, "TRAINING_JOB_NOT_FOUND", f"The training job {name} does not exist.")
        job = self.jobs[name]
        kept = (
            "AlgorithmSpec",
            "ComputeResource",
            "InputChannels",
            "OutputChannels",
            "HyperParameters",
            "TrainingJobName",
            "Scheduler",
        )
        return {key: job["body"][key] for key in kept if key in job["body"]} | {
            "TrainingJobId": name, "Status": job["Status"], "ReasonCode": job.get("ReasonCode", ""),
            "ReasonMessage": job.get("ReasonMessage", ""), "TrainingJobUrl": f"http://{self.address}/console/{name}", "WorkspaceId": WORKSPACE,
        }  # fmt: skip

    def log_page(self, name: str, query: dict[str, str]) -> dict[str, Any]:
        self.job_facts(name)
        log = self.jobs[name].get("log")
        if not log or not log.exists():
            raise Refused(404, "TRAINING_JOB_INSTANCE_NOT_FOUND", "The instance of the training job does not exist.")
        lines, size = log.read_text().splitlines(), int(query.get("PageSize", 10))
        begin = (int(query.get("PageNumber", 1)) - 1) * size
        return {"Logs": lines[begin : begin + size], "TotalCount": str(len(lines))}

    def stop_job(self, name: str) -> dict[str, Any]:
        self.job_facts(name)
        self.jobs[name]["Status"] = "Terminated"
        end(self.jobs[name].get("process"))
        return {}

    # Services.

    def create_service(self, body: dict[str, Any]) -> dict[str, Any]:
        name = body.get("name") or body["metadata"]["name"]
        (container_of,) = body["containers"]
        machine = body.get("cloud", {}).get("computing", {}).get("instance_type")
        wrong = (
            "name" if not re.fullmatch(r"[a-z][a-z0-9_]*", name) else
            "instance_type" if machine not in MACHINES else
            "containers.image" if not container_of.get("image") else
            "containers.port" if container_of.get("port", 8000) in (8080, 9090) else
            "storage" if not all(self.at(of["oss"]["path"]).is_dir() for of in body["storage"]) else
            None
        )  # fmt: skip
        if wrong:
            raise Refused(400, "InvalidParameter", f"The parameter {wrong} is invalid or missing.")
        if name in self.services:
            raise Refused(409, "InvalidService.AlreadyExists", f"The service {name} exists.")
        self.take(body["metadata"]["instance"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        script, folder = container_of["script"], self.folder / f"service-{name}-{port}"
        folder.mkdir()
        for number, storage in enumerate(body["storage"]):
            (folder / str(number)).symlink_to(self.at(storage["oss"]["path"]))  # a container has it at the path that is named
            script = script.replace(storage["mount_path"].rstrip("/"), str(folder / str(number)))
        environment = {of["name"]: of["value"] for of in container_of.get("env") or []}
        inside = container({"LISTENING_PORT": str(port), "PYTHONPATH": str(ROOT), **environment})
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(["sh", "-c", script], cwd=folder, env=inside, start_new_session=True, stdout=log, stderr=log)
        token = body.get("token") or secrets.token_hex(20)
        self.services[name] = {"body": body, "process": process, "port": port, "token": token, "log": folder / "log",
                               "taken": body["metadata"]["instance"]}  # fmt: skip
        return {"ServiceName": name, "Status": "Creating"}

    def service(self, name: str) -> dict[str, Any]:
        if name not in self.services:
            raise Refused(404, "InvalidService.NotFound", f"The service {name} is not found.")
        return self.services[name]

    def service_facts(self, name: str) -> dict[str, Any]:
        service = self.service(name)
        ended = service["process"].poll() is not None
        return {
            "ServiceName": name, "ServiceId": f"eas-m-{name}", "ServiceUid": WORKSPACE, "ServiceType": "Standard", "Labels": [],
            "Status": "Failed" if ended else "Running" if listens(service["port"]) else "Waiting", "Reason": "",
            "Message": service["log"].read_text()[-300:] if ended else "", "AccessToken": service["token"],
            "InternetEndpoint": f"http://{self.address}/api/predict/{name}", "ServiceConfig": json.dumps(service["body"]),
        }  # fmt: skip

    def delete_service(self, name: str) -> dict[str, Any]:
        end(self.service(name)["process"])
        del self.services[name]
        return {}


def upper(name: str) -> str:
    return re.sub("[^a-zA-Z0-9_]", "_", name).upper()


def container(environment: dict[str, str]) -> dict[str, str]:
    """Nothing of the tests' own environment, so that nothing of it can be needed."""
    inside = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": "/nonexistent", "OMP_NUM_THREADS": "1",
              "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}  # fmt: skip
    kept = {name: os.environ[name] for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "LD_LIBRARY_PATH") if name in os.environ}
    return inside | kept | environment


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def end(process: subprocess.Popen | None, how: int = signal.SIGTERM) -> None:
    """Ends a process and its children, and waits for it."""
    if process and process.poll() is None:
        os.killpg(process.pid, how)
        process.wait(60)


class Answers(BaseHTTPRequestHandler):
    """The control plane where there is an x-acs-action, the gateway below /api/predict, else OSS."""

    protocol_version, of = "HTTP/1.1", None

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self) -> None:
        address = urlsplit(self.path)
        self.plain, self.query = unquote(address.path), dict(parse_qsl(address.query, keep_blank_values=True))
        self.body = self.read_chunks() if self.headers.get("transfer-encoding") == "chunked" else b""
        self.body += self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.plain.startswith("/api/predict/"):
            self.pass_on()
            return
        of_oss = "x-acs-action" not in self.headers
        try:
            self.check_signature(of_oss)
            if of_oss:
                self.oss()
                return
            self.say(200, self.control())
        except Refused as no:
            facts = {"Code": no.code, "Message": no.message, "RequestId": secrets.token_hex(16).upper(), "HostId": self.of.address}
            if of_oss:
                xml = "".join(f"<{key}>{value}</{key}>" for key, value in facts.items())
                xml = f"<?xml version='1.0'?><Error>{xml}</Error>".encode()  # an answer to HEAD has it in a header
                self.say(no.status, xml, "application/xml", x_oss_err=base64.b64encode(xml).decode())
            else:
                self.say(no.status, facts)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = answer

    def read_chunks(self) -> bytes:
        """A body without a length, as the SDK sends an empty file."""
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def say(self, status: int, body: Any = b"", kind: str = "application/json", **headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def check_signature(self, of_oss: bool) -> None:
        """Signature version 2 of the ROA style, or version 1 of OSS, as Alibaba's pages describe them."""
        head = {name.lower(): value for name, value in self.headers.items()}
        own = "x-oss-" if of_oss else "x-acs-"
        lines = [self.command, *([] if of_oss else [head.get("accept", "")]), head.get("content-md5", ""),
                 head.get("content-type", ""), head.get("x-oss-date") or head.get("date", "")]  # fmt: skip
        lines += [f"{name}:{head[name].strip()}" for name in sorted(head) if name.startswith(own)]
        signed = {key: value for key, value in self.query.items() if not of_oss or key in SUBRESOURCES}
        words = [key + f"={value}" * bool(value) for key, value in sorted(signed.items())]
        text = "\n".join([*lines, self.plain + "?" * bool(words) + "&".join(words)])
        scheme, _, given = head.get("authorization", "").partition(" ")
        key_id, _, signature = given.partition(":")
        if scheme != ("OSS" if of_oss else "acs") or key_id != self.of.key_id:
            code = "InvalidAccessKeyId" if of_oss else "InvalidAccessKeyId.NotFound"
            raise Refused(403, code, f"The AccessKeyId {key_id} you provided does not exist in our records.")
        right = base64.b64encode(hmac.new(self.of.key_secret.encode(), text.encode(), hashlib.sha1).digest()).decode()
        if not hmac.compare_digest(right, signature):
            what = f"Specified signature is not matched with our calculation. AccessKeyId: {key_id}, string to sign is: {text}"
            raise Refused(403, "SignatureDoesNotMatch", what)

    def control(self) -> dict[str, Any]:
        """AIWorkspace, PAI-Studio, DLC and EAS."""
        plane, body = self.of, json.loads(self.body) if self.body else None
        plane.asked.append((self.command, self.plain, body))
        algorithm = {"AlgorithmId": "algo-1", "AlgorithmName": "tune", "AlgorithmVersion": "v1", "AlgorithmProvider": "pai"}
        match self.command, *self.plain.strip("/").split("/")[1:]:
            case "GET", "v1", "models":
                return {"TotalCount": 1, "Models": [plane.registered["model"]]}
            case "GET", "v1", "ecsspecs":
                return {
                    "TotalCount": len(MACHINES),
                    "EcsSpecs": [{"InstanceType": of, "AcceleratorType": "GPU"} for of in MACHINES],
                }
            case "GET", "v1", "algorithms":
                return {"TotalCount": 1, "Algorithms": [algorithm]}
            case "GET", "v1", "algorithms", "algo-1", "versions", "v1":
                return algorithm | {"AlgorithmSpec": plane.registered["algorithm"]}
            case "POST", "v1", "trainingjobs":
                return plane.create_job(body)
            case "GET", "v1", "trainingjobs", name:
                return plane.job_facts(name)
            case "GET", "v1", "trainingjobs", name, "logs":
                return plane.log_page(name, self.query)
            case "PUT", "v1", "trainingjobs", name, "stop":
                return plane.stop_job(name)
            case "POST", "v2", "services":
                return plane.create_service(body)
            case "GET", "v2", "services", region, name if region == REGION:
                return plane.service_facts(name)
            case "DELETE", "v2", "services", region, name if region == REGION:
                return plane.delete_service(name)
        raise Refused(404, "InvalidAction.NotFound", f"Specified api is not found: {self.command} {self.plain}")

    def oss(self) -> None:
        """Objects of the one bucket, path style."""
        bucket, _, key = self.plain.lstrip("/").partition("/")
        if bucket != BUCKET:
            raise Refused(404, "NoSuchBucket", "The specified bucket does not exist.")
        top = self.of.folder / "oss" / BUCKET
        path = top / key
        if self.command == "PUT" and key:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.body)
            self.say(200, ETag=f'"{hashlib.md5(self.body).hexdigest().upper()}"')
        elif self.command == "GET" and not key:
            names = sorted(of.relative_to(top).as_posix() for of in top.rglob("*") if of.is_file())
            found = "".join(
                f"<Contents><Key>{quote(name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>x</ETag><Type>Normal</Type>"
                f"<Size>{(top / name).stat().st_size}</Size><StorageClass>Standard</StorageClass></Contents>"
                for name in names
                if name.startswith(self.query.get("prefix", ""))
            )
            head = "<?xml version='1.0'?><ListBucketResult><EncodingType>url</EncodingType><IsTruncated>false</IsTruncated>"
            self.say(200, f"{head}{found}</ListBucketResult>".encode(), "application/xml")
        elif self.command in ("GET", "HEAD") and path.is_file():
            self.say(200, path.read_bytes(), "application/octet-stream", Last_Modified="Thu, 01 Jan 2026 00:00:00 GMT",
                     x_oss_object_type="Normal", ETag='"x"')  # fmt: skip
        else:
            raise Refused(404, "NoSuchKey", "The specified key does not exist.")

    def pass_on(self) -> None:
        """The gateway of EAS: its token, its limit, and the path without its prefix."""
        name, _, rest = self.plain.removeprefix("/api/predict/").partition("/")
        service = self.of.services.get(name)
        if service is None:
            self.say(404)
        elif self.headers.get("authorization", "").removeprefix("Bearer ") != service["token"]:
            self.say(401, b"Unauthorized: token is invalid", "text/plain")
        elif len(self.body) > GATEWAY_BYTES:
            self.say(413, b"request body is too large", "text/plain")
        elif not listens(service["port"]):
            self.say(503, b"no healthy upstream", "text/plain")
        else:
            inner = http.client.HTTPConnection("127.0.0.1", service["port"], timeout=120)
            inner.request(self.command, f"/{rest}", self.body, dict(self.headers))
            got = inner.getresponse()
            self.say(got.status, got.read(), got.getheader("content-type", ""))
            inner.close()
