"""Where a push goes: the repository is made or found, the user may write to it, the branch or pull request is there."""

from __future__ import annotations

from dataclasses import dataclass

from huggingface_hub.errors import RevisionNotFoundError

from ..errors import HubError
from .client import Hub, revision_of
from .names import Revision

_MAIN = "main"


@dataclass(frozen=True)
class Target:
    """A branch to commit to; for a pull request its number and address."""

    revision: Revision
    pull_request: str | None = None
    number: int | None = None

    def finish(self, hub: Hub) -> None:
        """A pull request stays a draft until everything is in it."""
        if self.number is None:
            return
        doing = f"opening pull request {self.number} of {hub.repo}"
        details = hub.call(doing, lambda: hub.api.get_discussion_details(hub.repo, self.number or 0))
        if details.status == "draft":
            hub.call(doing, lambda: hub.api.change_discussion_status(hub.repo, self.number or 0, "open"))


def open_target(hub: Hub, private: bool | None, revision: str | None, create_pr: bool, title: str) -> Target:
    """Make what is missing. HubError for a missing or refused token and for a repository the user may not write to."""
    if create_pr and revision not in (None, _MAIN):
        raise HubError("a pull request goes to main: give either --create-pr or --revision")
    branch, pushing = revision_of(revision), f"pushing to {hub.repo}"
    user = hub.call(pushing, lambda: str(hub.api.whoami()["name"]))
    if not create_pr or hub.repo.partition("/")[0] == user:
        hub.call(pushing, lambda: hub.api.create_repo(hub.repo, private=private, exist_ok=True))
    if create_pr:
        return _pull_request(hub, user, title)
    # Before hours of checking and sending, not after.
    hub.call(pushing, lambda: hub.api.auth_check(hub.repo, write=True))
    if branch != _MAIN and not hub.call(pushing, lambda: _exists(hub, branch)):
        hub.call(pushing, lambda: hub.api.create_branch(hub.repo, branch=branch, exist_ok=True))
    return Target(branch)


def _exists(hub: Hub, branch: Revision) -> bool:
    try:
        hub.commit_of(branch)
    except RevisionNotFoundError:
        return False
    return True


def _pull_request(hub: Hub, user: str, title: str) -> Target:
    doing = f"opening a pull request in {hub.repo}"

    def mine() -> list[int]:
        found = hub.api.get_repo_discussions(
            hub.repo, author=user, discussion_type="pull_request", discussion_status="open"
        )
        return [int(pull.num) for pull in found if pull.title == title]

    numbers = hub.call(doing, mine)
    # Not retried blindly: a lost answer would leave a second one behind; the next push finds the first.
    if numbers:
        number = max(numbers)
    else:
        number = hub.call(doing, lambda: int(hub.api.create_pull_request(hub.repo, title=title).num), attempts=1)
    address = f"{hub.api.endpoint}/{hub.repo}/discussions/{number}"
    return Target(Revision(f"refs/pr/{number}"), address, number)
