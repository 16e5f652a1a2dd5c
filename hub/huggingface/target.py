"""The target of a push: makes or finds the repository and the branch or pull request, and checks write access."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionNotFoundError

from ...errors import HubError
from ..names import Revision, parse_revision
from .client import Client

_MAIN: Final = Revision("main")


@dataclass(frozen=True)
class Target:
    """A branch to commit to; for a pull request its number and address."""

    revision: Revision
    pull_request: str | None = None
    number: int | None = None

    def publish(self, client: Client) -> None:
        """Open the pull request, which is a draft until all files are in it."""
        if self.number is None:
            return
        number, doing = self.number, f"opening pull request {self.number} of {client.repo}"
        status = client.ask(doing, lambda api: api.get_discussion_details(client.repo, number).status)
        if status == "draft":
            client.ask(doing, lambda api: api.change_discussion_status(client.repo, number, "open"))


def open_target(client: Client, private: bool | None, revision: str | None, create_pr: bool, title: str) -> Target:
    """Open the target, made where missing. HubError for a missing or refused token, and without write access."""
    if create_pr and revision not in (None, _MAIN):
        raise HubError("a pull request goes to main: give either --create-pr or --revision")
    branch, pushing = parse_revision(revision, _MAIN), f"pushing to {client.repo}"
    user = client.ask(pushing, lambda api: str(api.whoami()["name"]))
    if not create_pr or client.repo.partition("/")[0] == user:
        client.ask(pushing, lambda api: api.create_repo(client.repo, private=private, exist_ok=True))
    if create_pr:
        return _pull_request(client, user, title)
    # Before hours of checking and sending, not after.
    client.ask(pushing, lambda api: api.auth_check(client.repo, write=True))
    if branch != _MAIN and not client.call(pushing, lambda: _exists(client, branch)):
        client.ask(pushing, lambda api: api.create_branch(client.repo, branch=branch, exist_ok=True))
    return Target(branch)


def _exists(client: Client, branch: Revision) -> bool:
    try:
        client.commit_of(branch)
    except RevisionNotFoundError:
        return False
    return True


def _pull_request(client: Client, user: str, title: str) -> Target:
    doing = f"opening a pull request in {client.repo}"

    def mine(api: HfApi) -> list[int]:
        found = api.get_repo_discussions(
            client.repo, author=user, discussion_type="pull_request", discussion_status="open"
        )
        return [int(pull.num) for pull in found if pull.title == title]

    numbers = client.ask(doing, mine)
    # Not retried blindly: after a lost answer a retry would make a second pull request; the next push finds the first.
    if numbers:
        number = max(numbers)
    else:
        number = client.ask(doing, lambda api: int(api.create_pull_request(client.repo, title=title).num), attempts=1)
    address = f"{client.page}/discussions/{number}"
    return Target(Revision(f"refs/pr/{number}"), address, number)
