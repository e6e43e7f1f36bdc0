"""The two hubs behind one face: list a repository at a pinned commit, bring files of it, push a folder.

The hubs' own clients do the work: endpoints, tokens, proxies, retries and progress bars are theirs (HF_ENDPOINT,
MODELSCOPE_ENDPOINT, HF_HUB_OFFLINE), and so is the check of what arrives. Whatever they raise comes out as a UserError, but
for what this machine's disk refuses: an OSError.
"""

import errno
import glob
import logging
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import NamedTuple

from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.whole import sha256

COMMIT = re.compile(r"[0-9a-f]{40}")
# The address of a repository's page, or of what git clones.
PAGE = re.compile(
    r"https?://[^/]+/(?:models/|datasets/)?([^/?#@]+/[^/?#@]+?)(?:\.git)?(?:/(?:summary|files)?|/tree/([^/?#]+)/?)?(?:[?#].*)?"
)
MODEL, DATA_SET = "model", "dataset"  # what a repository is, in both hubs' words
LATER = "run the same command again: it brings what is missing"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OF_THE_DISK = (*NO_ROOM, errno.EROFS, errno.EACCES, errno.EPERM)


class Barred(UserError):
    """The hub gives nothing of this repository: whoever asks for its next file hears the same."""


class Unreachable(Barred):
    """The hub does not answer, or may not be asked."""


class Wanted(NamedTuple):
    """What a hub says of a file. Hugging Face knows a `sha256` of large files only, but has a hash of all to check them by."""

    size: int
    sha256: str | None
    hashed: bool

    def is_at(self, path: Path) -> bool:
        """Whether the file has that size, and that sha256 if there is one; reads every byte."""
        return path.is_file() and path.stat().st_size == self.size and self.sha256 in (None, sha256(path))


class ModelScope:
    """Its client checks the sha256 of what comes, resumes in the middle of a file and tries again, all by itself."""

    tool, log_in = "modelscope", "modelscope login"

    def __init__(self, kind: str = MODEL) -> None:
        self.kind = kind
        from modelscope_hub import HubApi, HubConfig  # not `modelscope`, which takes ten times as long to import

        logging.getLogger("modelscope_hub.download").addFilter(lambda record: record.levelno < logging.ERROR)  # those we say
        self.api = HubApi(HubConfig())

    def listing(self, repo: str, revision: str | None) -> tuple[str, dict[str, Wanted]]:
        """(the commit that the revision names today, the files at it).

        A branch is pinned to the commit of its newest file, if the hub lists the same files there; else it stays a branch and
        the files' hashes are what is pinned.
        """
        branch = revision or "master"
        with _told(repo, branch):
            files, newest = self._files(repo, branch)
            pinned = COMMIT.fullmatch(newest) and not COMMIT.fullmatch(branch) and self._files(repo, newest)[0] == files
        return newest if pinned else branch, files

    def _files(self, repo: str, revision: str) -> tuple[dict[str, Wanted], str]:
        """(the files, the commit of the newest), in the hub's own words: the client's tidy ones leave the commits out."""
        entries = [of for of in self.api.legacy.list_repo_files(repo, self.kind, revision) if of.get("Type") != "tree"]
        files = {of["Path"]: Wanted(int(of["Size"]), of.get("Sha256") or None, bool(of.get("Sha256"))) for of in entries}
        return files, max(entries, key=lambda of: of.get("CommittedDate") or 0, default={}).get("Revision") or ""

    def lacking(self, repo: str, commit: str, files: dict[str, Wanted], folder: Path) -> set[str]:
        """Which files are not in the folder as listed. The client's verify_cache would pass over names like .gitattributes."""
        return {name for name, wanted in files.items() if not wanted.is_at(folder / name)}

    def fetch(self, repo: str, commit: str, files: dict[str, Wanted], folder: Path) -> list[Problem]:
        """Brings the files and says what kept some away. What then lies there under its name is right; parts of others may lie
        beside it, for the next time."""
        from modelscope_hub.errors import FileDownloadError

        unhashed = [folder / name for name, wanted in files.items() if not wanted.hashed]
        for piece in {piece for path in unhashed for piece in pieces(path)}:  # nothing would tell if it were another file's
            piece.unlink()
        entries = [{"Path": name, "Size": wanted.size, "Sha256": wanted.sha256} for name, wanted in files.items()]
        failed: dict[str, BaseException] = {}
        with _told(repo, commit):
            try:
                self.api.download_repo(repo, self.kind, revision=commit, local_dir=folder, file_list=entries)
            except FileDownloadError as error:
                failed = error.failed_files
        problems: list[Problem] = []
        for name, met in failed.items():
            said = _in_words(met, f"{repo}@{commit}, {name}")
            if said is None:
                raise met
            problems += said.problems
            if isinstance(said, Barred):
                break
        return problems

    def claim(self, repo: str) -> None:
        """Makes the repository, for its owner's eyes only, if it is not there, and fails if it may not be written to: of one
        that is there already only the upload itself says that."""
        from modelscope_hub.errors import AlreadyExistsError

        with suppress(AlreadyExistsError):
            self.api.whoami()
            self.api.create_repo(repo, "model", visibility="private")

    def push(self, repo: str, folder: Path) -> None:
        """Uploads every file of the folder to a claimed repository, in the client's own batches."""
        self.api.upload_folder(repo, "model", folder, commit_message="Upload the merged model", use_cache=False)


class HuggingFace:
    """The same of Hugging Face. Its client checks the size of what comes, and every hash when asked to."""

    tool, log_in = "hf", "hf auth login"

    def __init__(self, kind: str = MODEL) -> None:
        from huggingface_hub import HfApi

        self.kind = kind
        self.api = HfApi()

    def listing(self, repo: str, revision: str | None) -> tuple[str, dict[str, Wanted]]:
        from huggingface_hub.hf_api import RepoFile

        with _told(repo, revision or "main"):
            commit = str(self.api.repo_info(repo, revision=revision, repo_type=self.kind).sha)
            tree = self.api.list_repo_tree(repo, recursive=True, revision=commit, repo_type=self.kind)
            files = [entry for entry in tree if isinstance(entry, RepoFile)]
        return commit, {file.path: Wanted(file.size, file.lfs.sha256 if file.lfs else None, True) for file in files}

    def lacking(self, repo: str, commit: str, files: dict[str, Wanted], folder: Path) -> set[str]:
        """The client looks at all that the folder holds of the repository."""
        if not any((folder / name).is_file() for name in files):
            return set(files)
        with _told(repo, commit):
            found = self.api.verify_repo_checksums(repo, revision=commit, local_dir=folder, repo_type=self.kind)
        return files.keys() & {*found.missing_paths, *(of["path"] for of in found.mismatches)}

    def fetch(self, repo: str, commit: str, files: dict[str, Wanted], folder: Path) -> list[Problem]:
        """One after another, for what a kill cuts has to come again from its start. Raises UserError if one does not come."""
        for cut in (folder / ".cache").rglob("*.incomplete"):  # which its client would leave lying
            cut.unlink()
        only = [glob.escape(name) for name in files]
        with _told(repo, commit):
            self.api.snapshot_download(
                repo, revision=commit, local_dir=folder, allow_patterns=only, max_workers=1, repo_type=self.kind
            )
        wrong = sorted(self.lacking(repo, commit, files, folder))
        for name in wrong:
            (folder / name).unlink(missing_ok=True)
        what, fix = "came with another hash than the hub lists", f"{LATER}, or try the other hub"
        return [Problem(f"{repo}@{commit}, {name}", what, fix) for name in wrong]

    def claim(self, repo: str) -> None:
        """Its `exist_ok` says yes to whoever may read, so the right to write is asked for beside it."""
        self.api.whoami()
        self.api.create_repo(repo, exist_ok=True, private=True)
        self.api.auth_check(repo, write=True)

    def push(self, repo: str, folder: Path) -> None:
        """In one commit."""
        self.api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload the merged model")


def pieces(target: Path) -> list[Path]:
    """What earlier tries left of a file: it, and what ModelScope's client puts beside it, as NAME.incomplete and the like."""
    return [path for path in target.parent.glob(f"{glob.escape(target.name)}*") if path.is_file()]


Hub = ModelScope | HuggingFace
HUBS: dict[str, type[Hub]] = {"modelscope": ModelScope, "hf": HuggingFace}


class HubPlace(NamedTuple):
    """A model on a hub; `revision` is a branch, a tag or a commit, None for the hub's default or what was recorded."""

    hub: str
    repo: str
    revision: str | None = None


def read_source(text: str) -> HubPlace | None:
    """`modelscope:ORG/NAME` or `hf:ORG/NAME`, `@REVISION` behind it or not, or the address of its page in place of ORG/NAME; None
    if the text names no hub, so it is a path.

    Raises UserError if what follows the hub is no ORG/NAME.
    """
    hub, colon, rest = text.partition(":")
    if not colon or hub not in HUBS:
        return None
    repo, _, revision = rest.strip("/").partition("@")
    if page := PAGE.fullmatch(rest):
        repo, revision = page[1], page[2] or ""
    if repo.count("/") != 1 or ".." in repo or not all(repo.split("/")):
        raise UserError(Problem(text, "names no repository", f"write {hub}:ORG/NAME, such as {hub}:Qwen/Qwen2-VL-7B-Instruct"))
    return HubPlace(hub, repo, revision or None)


def pushable(where: str) -> HubPlace:
    """The repository that `where` names, made if it was not there; whoever is logged in with the hub's own tool owns it.

    Raises UserError if it names none, or one that this user may not write to: said before a merge, not after it.
    """
    source, hub = _place(where)
    with _told(source.repo, then="run the same command again", log_in=hub.log_in):
        hub.claim(source.repo)
    return source


def push(where: str, folder: Path) -> None:
    """Uploads a folder to a `pushable` place."""
    source, hub = _place(where)
    then = f"upload the finished folder: {shlex.join([hub.tool, 'upload', source.repo, str(folder)])}"
    with redirect_stdout(sys.stderr), _told(source.repo, then=then, log_in=hub.log_in):  # ModelScope's client prints a report
        hub.push(source.repo, folder)


def _place(where: str) -> tuple[HubPlace, Hub]:
    if not (source := read_source(where)) or source.revision:
        raise UserError(Problem(f"--push {where}", "names no repository on a hub", "write modelscope:ORG/NAME or hf:ORG/NAME"))
    return source, HUBS[source.hub]()


@contextmanager
def _told(repo: str, revision: str = "", then: str = LATER, log_in: str = "") -> Iterator[None]:
    """Says in our words what a hub's client raises; `log_in` is how a user gets the right to write, where that is asked for."""
    try:
        yield
    except Exception as error:
        if said := _in_words(error, repo + (f"@{revision}" if revision else ""), then, log_in):
            raise said from error
        raise


def _in_words(error: BaseException, where: str, then: str = LATER, log_in: str = "") -> UserError | None:
    """None for what no hub's client should raise. Raises what the disk refused, which the clients may wrap."""
    import requests
    from huggingface_hub import errors as hf
    from modelscope_hub import errors as ms

    if isinstance(error, hf.LocalEntryNotFoundError) and error.__cause__:  # it looked here after the hub had failed it
        error = error.__cause__
    for met in (error, error.__cause__):
        if isinstance(met, OSError) and met.errno in OF_THE_DISK:
            raise met
    first = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])[:200]
    no_answer = hf.HTTPError  # type: ignore[attr-defined]  # of whichever httpx it was made for
    own_tool = "log in with the hub's own tool"
    refused = isinstance(error, hf.HfHubHTTPError) and error.response.status_code in (401, 403)
    of_a_token = hf.LocalTokenNotFoundError | hf.RepositoryNotFoundError | ms.AuthenticationError | ms.PermissionDeniedError
    if log_in and (refused or isinstance(error, of_a_token)):  # not access to read is lacking, but a token that may write
        fix = f"log in with a token that may write there (`{log_in}`), then {then}"
        return UserError(Problem(where, f"may not be written to: {first}", fix))
    if log_in and isinstance(error, RuntimeError):  # ModelScope's client, after several batches that did not arrive
        return Unreachable(Problem(where, f"the upload stopped: {first}", f"wait a little, then {then}"))
    match error:
        case hf.OfflineModeIsEnabled():
            fix = f"unset it, then {then}" if log_in else "unset it, or give a folder that is complete"
            return Unreachable(Problem(where, "HF_HUB_OFFLINE is set", fix))
        case hf.RevisionNotFoundError():
            return UserError(Problem(where, "there is no such revision", "name a branch, a tag or a commit of the repository"))
        case hf.GatedRepoError() | ms.PermissionDeniedError():
            return Barred(Problem(where, "is not open to everyone", f"ask for access on its page, then {own_tool}"))
        case hf.RepositoryNotFoundError() | hf.EntryNotFoundError() | ms.NotExistError() | ms.AuthenticationError():
            fix = f"check ORG/NAME, capitals too, and the revision; if it is private, {own_tool}"
            of_all = isinstance(error, hf.RepositoryNotFoundError | ms.AuthenticationError)
            return (Barred if of_all else UserError)(Problem(where, "is not there, or only for those who are logged in", fix))
        case hf.HFValidationError() | ms.InvalidParameter():
            return UserError(Problem(where, f"is refused: {first}", "write ORG/NAME and an existing revision"))
        case ms.FileIntegrityError():
            return UserError(Problem(where, f"the hub sends another file than it lists: {first}", LATER))
        case no_answer() | ms.HubError() | requests.RequestException() | OSError():
            if refused:
                return Barred(Problem(where, f"the hub refuses the token: {first}", f"{own_tool} again"))
            return Unreachable(Problem(where, f"the hub does not answer: {first}", f"look at the connection, then {then}"))
    return None
