"""An ASGI application whose start and end go as flags of the environment say."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from typing import Any

START = os.environ.get("SCRIPT_START", "good")
asked = 0


async def end_late() -> None:
    """Find out that nothing can be served after the server has begun to listen."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("api").critical("the server cannot start: no engine came up")
    raise SystemExit(1)


async def live(receive: Any, send: Any) -> None:
    """Start, wait for the end, and then end or hang."""
    await receive()
    if START == "refused":
        await send({"type": "lifespan.startup.failed", "message": "no model stands at /nowhere"})
        return
    if START == "killed":
        os._exit(7)
    if START == "late":
        give_up = asyncio.create_task(end_late())
        await send({"type": "lifespan.startup.complete"})
        await give_up
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    sys.stderr.write(f"WARNING app: the engine is {child.pid}\n")
    await send({"type": "lifespan.startup.complete"})
    await receive()
    if START == "stubborn":
        await asyncio.Event().wait()
    child.kill()
    child.wait()
    await send({"type": "lifespan.shutdown.complete"})


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Ready at the third question; any other route ends the process."""
    global asked
    if scope["type"] == "lifespan":
        await live(receive, send)
        return
    asked += START != "late"
    if scope["path"] != "/health/ready":
        os._exit(9)
    status = 200 if asked > 2 else 503
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})
