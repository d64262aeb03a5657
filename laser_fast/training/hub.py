"""Model folders to a repository of the Hugging Face hub, with the token of the environment."""

import logging
import re
from pathlib import Path

from laser_fast import needs_train

with needs_train():
    import huggingface_hub

from laser_fast.config import ConfigError

logger = logging.getLogger(__name__)


def check_hub(repo: str) -> None:
    """Refuse, before there is anything to upload, what cannot be a place for it."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ConfigError(f'expected a hub repository "user/name", got "{repo}"')
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ConfigError(f"nothing can go to {repo} while HF_HUB_OFFLINE is set; unset it")
    if huggingface_hub.get_token() is None:
        raise ConfigError(f"{repo} needs a token of the hub; set HF_TOKEN or run `hf auth login`")


def upload(folder: Path, repo: str, message: str) -> bool:
    """Upload the files of a folder to a repository; a new one is private.

    Returns whether it went well; else a warning says what was wrong, since a run needs no hub.
    """
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except Exception as error:  # of the network, the hub or its client: any
        logger.warning("%s was not uploaded to %s: %s", folder, repo, error)
        return False
    logger.info("uploaded %s to %s", folder, repo)
    return True
