"""Sending a directory to the Hugging Face Hub, and saying in one line, before any work, why that will not be possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from httpx2 import HTTPError
from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

LATER = "or leave it out: `kdlib push DIR --repo_id NAME` sends what is finished later"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A repository: ``repo_id`` as NAME or OWNER/NAME; ``private`` None takes the owner's default, ``revision`` None main."""

    repo_id: str
    repo_type: Literal["model", "dataset"] = "model"
    private: bool | None = None
    revision: str | None = None

    def push(self, directory: Path, *, message: str, ignore: Sequence[str] = ()) -> str:
        """Uploads the directory as one commit, making repository and branch where they are not there; the repository's URL."""
        api = HfApi()
        try:
            url = api.create_repo(self.repo_id, repo_type=self.repo_type, private=self.private, exist_ok=True)
            if self.revision is not None:
                api.create_branch(url.repo_id, repo_type=self.repo_type, branch=self.revision, exist_ok=True)
            api.upload_folder(
                repo_id=url.repo_id,
                repo_type=self.repo_type,
                folder_path=directory,
                revision=self.revision,
                commit_message=message,
                ignore_patterns=list(ignore),
            )
        except (HTTPError, HFValidationError, OSError) as error:
            raise ValueError(f"{directory} could not be pushed to {self.repo_id}: {_first_line(error)}") from error
        return str(url)


def check_hub(option: str) -> None:
    """ValueError when the Hub will not take anything from here; ``option`` is what asked for it."""
    if is_offline_mode():
        raise ValueError(f"{option} needs the Hub, and HF_HUB_OFFLINE is set: unset it, {LATER}")
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise ValueError(f"{option} needs a token: log in with `hf auth login`, set HF_TOKEN, {LATER}") from error
    except HfHubHTTPError as error:
        raise ValueError(f"{option}: the Hub refuses the token ({_first_line(error)}): log in again, {LATER}") from error
    except (HTTPError, OSError) as error:
        raise ValueError(f"{option}: the Hub does not answer ({_first_line(error)}): try again, {LATER}") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
