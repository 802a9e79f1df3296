"""The Hugging Face hub: where it cannot be reached, say so at once."""

import logging
import os
from functools import cache

ANSWER_S = 3.0


@cache
def offline_unless_reachable() -> None:
    """Ask the hub once a process; without an answer in 3 s (it retries 23 s a file) only the local cache is used."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=ANSWER_S)
    # The kind of error depends on the HTTP library that the hub's client is built on.
    except Exception as error:
        import datasets

        logging.getLogger(__name__).warning("%s: %s; using the local cache only", constants.ENDPOINT, error)
        os.environ["HF_HUB_OFFLINE"] = "1"  # for processes started from here
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
