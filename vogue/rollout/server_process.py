"""A server of vLLM as a process: it ends with its parent, and asks for its key at every door but the one to its health.

    python -P server_process.py PARENT ARGUMENTS…      PARENT 0: it stays until it is ended

vLLM itself asks for the key at the doors that generate; those that change weights would be open to whoever reaches
them. A script, run by its path, so that a server imports nothing of the trainer; -P, since `vllm.py` lies beside it.
"""

import ctypes
import os
import secrets
import signal
import sys

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
KEY, OPEN = "VLLM_API_KEY", "/health"


class Guard:
    """ASGI middleware that lets nobody in without the key, if there is one."""

    def __init__(self, app):
        self._app, self._expected = app, f"Bearer {os.environ.get(KEY, '')}".encode()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and os.environ.get(KEY) and scope["path"] != OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(given, self._expected):
                await send({"type": "http.response.start", "status": 401, "headers": []})
                await send({"type": "http.response.body", "body": b"the key is missing or wrong"})
                return
        await self._app(scope, receive, send)


if __name__ == "__main__":
    parent = int(sys.argv.pop(1))
    if parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # at which vLLM ends its own processes, too
        if os.getppid() != parent:  # it has ended before that
            sys.exit(1)
    from vllm.entrypoints.launchers.api_server.entry import main

    main()
