"""The options with which commands that write data publish it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass
class DataHubArguments:
    """Publishing what was written as a data set of the Hub.

    Args:
        push_to_hub: send it when it is finished.
        hub_dataset_id: the data set, NAME or OWNER/NAME; the name of output_dir when left out.
        hub_private_repo: make it private; null takes the owner's default.
        hub_revision: a branch of it instead of main.
        license: licence of the data set; null takes the teacher's, from its card.
    """

    push_to_hub: bool = False
    hub_dataset_id: str | None = None
    hub_private_repo: bool | None = None
    hub_revision: str | None = None
    license: str | None = None

    def check(self, teacher: str) -> None:
        """ValueError in one line for a push that would fail in the end; does nothing without push_to_hub."""
        from kdlib.cli.hub.license import check_license, license_of
        from kdlib.cli.hub.target import check_hub

        if self.push_to_hub:
            check_hub("push_to_hub")
            check_license(self.license, {teacher: license_of(teacher)})

    def push(self, directory: Path) -> list[str]:
        """The line that says where the finished directory went; none where nothing is pushed."""
        from kdlib.cli.hub.data import push_data
        from kdlib.cli.hub.target import Target

        if not self.push_to_hub:
            return []
        name = self.hub_dataset_id or directory.resolve().name
        private, revision = self.hub_private_repo, self.hub_revision
        target = Target(repo_id=name, repo_type="dataset", private=private, revision=revision)
        return [f"pushed  {push_data(directory, target, license=self.license)}"]
