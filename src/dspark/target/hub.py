"""Does the hub answer? Asked once, shortly: its client would ask six times over half a minute, with a line for each."""

import functools

SECONDS = 5.0


@functools.cache
def answers() -> bool:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # the kinds of a network that fails, or of a client told to stay offline
        return False
    return True
